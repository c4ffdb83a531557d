"""What --moves and --export plain ask for, choose by default, refuse and report."""

import json
import math
import shutil

import pytest
import torch
from conftest import calibrate_arguments, expect_sentence, run

import hisvd
from hisvd import cache_defaults
from hisvd.cache_defaults import resolved
from hisvd.calibration_cache import read_cache


@pytest.fixture
def command(model_folders, caches, tmp_path):
    """command(*options, target, cache): compress.py on the tiny Llama, without update unless `options` say so."""

    def call(*options, target="0.6", cache=caches["llama"]):
        where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--save_model", tmp_path / "out"]
        return run("compress", *where, "--target_compression", target, "--update", "none", *options)

    return call


@pytest.fixture(scope="module")
def without_gradients(model_folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("without")
    assert run("calibrate", *calibrate_arguments(model_folders["llama"], root), "--no_gradients").code == 0
    return next(root.glob("tiny*"))


@pytest.fixture
def without_mlps(caches, tmp_path):
    """The cache as it is of a family that has no adapter."""
    folder = shutil.copytree(caches["llama"], tmp_path / "without_mlps")
    manifest = json.loads((folder / "manifest.json").read_text())
    for layer in manifest["layers"]:
        layer["mlps"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def settings_of(tmp_path):
    return json.loads((tmp_path / "out" / "hisvd.json").read_text())["settings"]


def test_both_is_the_default_where_the_cache_allows_it(command, tmp_path):
    assert command().code == 0
    assert settings_of(tmp_path)["moves"] == "both"


@pytest.mark.parametrize(
    "options", [("--allocation", "hisvd"), ("--allocation", "uniform"), ("--whitening", "input")], ids=lambda o: o[1]
)
def test_other_rules_and_metrics_make_it_low_rank(command, tmp_path, options):
    assert command(*options).code == 0
    assert settings_of(tmp_path)["moves"] == "low_rank"
    for moves in (["--moves", "both"], ["--moves", "neurons"], ["--export", "plain"]):
        expect_sentence(command(*options, *moves), " ".join(moves), options[1], "--moves low_rank")


@pytest.mark.parametrize("kind", ["without_gradients", "without_mlps"])
def test_a_cache_that_knows_no_neurons_allows_low_rank_alone(command, tmp_path, request, kind):
    cache = request.getfixturevalue(kind)
    assert not read_cache(cache).has_neurons
    for moves in (["--moves", "both"], ["--moves", "neurons"], ["--export", "plain"]):
        expect_sentence(command(*moves, cache=cache), " ".join(moves), "--moves low_rank")
    result = command(cache=cache)
    assert result.code == 0, result
    assert settings_of(tmp_path)["moves"] == "low_rank"


def test_low_rank_needs_no_mlps(caches, without_mlps):
    settings = hisvd.CompressionSettings(moves="low_rank")
    (with_mlps,), (without,) = (hisvd.plan(cache, 0.6, settings) for cache in (caches["llama"], without_mlps))
    assert with_mlps == without and not without.shapes
    assert hisvd.plan(without_mlps, 0.6) == [without]


def test_plain_takes_neurons_alone(command):
    for moves in ("both", "low_rank"):
        expect_sentence(command("--export", "plain", "--moves", moves), "--export plain", f"--moves {moves}")
    assert command("--export", "plain", "--moves", "neurons", "--width_multiple", 8).code == 0


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_plain_has_one_width_a_multiple(caches, multiple):
    settings = hisvd.CompressionSettings(export="plain", width_multiple=multiple)
    size = sum(s.size for s in read_cache(caches["llama"]).sublayers)
    for plan in hisvd.plan(caches["llama"], [0.9, 0.7, 0.5], settings):
        sublayers = read_cache(caches["llama"]).sublayers
        widths = {plan.shape(s)[1] for s in sublayers if s.path == "mlp.down_proj"}
        assert len(widths) == 1 and widths.copy().pop() % multiple == 0
        kept = sum(plan.parameters_of(s) for s in sublayers)
        assert plan.target * size - multiple * 4 * 3 * 64 < kept <= plan.target * size
        assert all(plan.is_dense(s) for s in sublayers)
    assert not hisvd.plan(caches["llama"], 1, settings)[0].shapes


@pytest.mark.parametrize("moves", ["both", "low_rank", "neurons"])
def test_rank_multiple(caches, moves):
    cache = read_cache(caches["llama"])
    for plan in hisvd.plan(cache, [0.9, 0.6], hisvd.CompressionSettings(moves=moves, rank_multiple=8)):
        shapes = [plan.shape(s) for s in cache.sublayers]
        assert all(size % 8 == 0 for shape in shapes for size in shape)
        assert all(plan.is_dense(s) or plan.ranks[s.name] % 8 == 0 for s in cache.sublayers)
        assert sum(plan.parameters_of(s) for s in cache.sublayers) <= plan.target * sum(s.size for s in cache.sublayers)


def test_ranks_of_large_linears_are_aligned_by_default(caches, monkeypatch):
    cache, unset = read_cache(caches["llama"]), hisvd.CompressionSettings()
    assert resolved(unset, cache).rank_multiple == 1 and resolved(unset, cache).min_saving == 0
    monkeypatch.setattr(cache_defaults, "SMALLEST_ALIGNED", min(s.full_rank for s in cache.sublayers))
    assert resolved(unset, cache).rank_multiple == 8
    assert resolved(hisvd.CompressionSettings(budget="bytes"), cache).rank_multiple == 32
    assert resolved(hisvd.CompressionSettings(rank_multiple=1), cache).rank_multiple == 1
    assert resolved(unset, cache).min_saving == 0.05
    assert resolved(hisvd.CompressionSettings(min_saving=0.0), cache).min_saving == 0
    staged = resolved(hisvd.CompressionSettings(allocation="hisvd"), cache)
    assert staged.rank_multiple == 1 and staged.min_saving == 0


@pytest.mark.parametrize("moves", ["both", "low_rank"])
def test_min_saving(caches, moves):
    cache = read_cache(caches["llama"])
    plain, sparing = (
        hisvd.plan(cache, 0.8, hisvd.CompressionSettings(moves=moves, min_saving=least))[0] for least in (0, 0.25)
    )

    def saved(plan):
        factored = [s for s in cache.sublayers if not plan.is_dense(s)]
        return [1 - plan.parameters_of(s) / math.prod(plan.shape(s)) for s in factored]

    assert min(saved(plain)) < 0.25 <= min(saved(sparing))
    size = sum(s.size for s in cache.sublayers)
    assert 0.75 * size < sum(sparing.parameters_of(s) for s in cache.sublayers) <= 0.8 * size


@pytest.mark.parametrize(("option", "value", "least"), [("--rank_multiple", 8, 1), ("--min_saving", 0.5, 0)])
def test_limits_of_ranks_need_the_loss_allocation(command, option, value, least):
    expect_sentence(command(option, value, "--allocation", "uniform"), f"{option} {value}", "--allocation loss")
    expect_sentence(command(option, least - 1), f"{option} {least - 1}")


def test_plain_refuses_a_target_that_holds_no_multiple(command):
    result = command("--export", "plain", "--width_multiple", 64, target="0.5")
    expect_sentence(result, "Target 0.5", "--width_multiple")
    smallest = result.error.split("at least ")[-1].split()[0].rstrip(".")
    assert command("--export", "plain", "--width_multiple", 64, target=smallest).code == 0
    expect_sentence(command("--width_multiple", 0), "--width_multiple 0")


def test_neurons_alone_refuse_a_target_below_the_attention(command):
    result = command("--moves", "neurons", target="0.2")
    expect_sentence(result, "Target 0.2", "--moves neurons")
    smallest = result.error.split()[-1].rstrip(".")
    assert float(smallest) > 0.28 and command("--moves", "neurons", target=smallest).code == 0
    expect_sentence(command(target="0.001"), "Target 0.001", "--moves both")


def test_plan_only_shows_widths_and_where_parameters_went(command, tmp_path):
    result = command("--plan_only")
    assert result.code == 0 and not (tmp_path / "out").exists()
    assert " of 160" in result.output
    for moves, shown in (("neurons", True), ("low_rank", False)):
        assert (" of 160" in command("--plan_only", "--moves", moves).output) == shown


def test_the_report_says_what_each_move_took(command, tmp_path):
    assert command().code == 0
    report = json.loads((tmp_path / "out" / "hisvd.json").read_text())
    by_type = report["by_type"]
    assert sum(row["before"] for row in by_type.values()) == report["linear_numbers_before"]
    assert sum(row["stored"] for row in by_type.values()) == report["linear_numbers_after"]
    for kind, row in by_type.items():
        assert row["before"] - row["removed_with_neurons"] - row["saved_by_factors"] == row["stored"]
        assert (row["removed_with_neurons"] > 0) == kind.startswith("mlp")


def test_the_loss_that_a_plan_estimates_is_less_with_both_moves(caches):
    """On random weights too: low rank and neurons alone are choices that both moves may make."""
    from hisvd.allocations import RankProblem
    from hisvd.moves import mlp_curves
    from hisvd.rank_allocation import tails_of
    from hisvd.shape_utils import Storage

    cache, losses = read_cache(caches["llama"]), {}
    for moves in ("both", "low_rank", "neurons"):
        settings = resolved(hisvd.CompressionSettings(moves=moves), cache)
        problem, (plan,) = RankProblem(cache, settings), hisvd.plan(cache, 0.6, settings)
        spectra = dict(zip(problem.sublayers, problem.singular_values("two_sided_singular_values"), strict=True))
        total, members = 0.0, set()
        for mlp in mlp_curves(problem, ranked=True, chosen=[Storage("pivoted")] * len(problem.sublayers)):
            own = [problem.sublayers[member] for member in mlp.members]
            members |= set(own)
            width = plan.shape(own[-1])[1]
            total += mlp.loss(width)
            total += sum(float(c.tails[plan.ranks[s.name] - 1]) for c, s in zip(mlp.curves_at(width), own, strict=True))
        others = (s for s in problem.sublayers if s not in members)
        losses[moves] = total + sum(float(tails_of(spectra[s])[plan.ranks[s.name] - 1]) for s in others)
    assert losses["both"] <= 1.01 * min(losses["low_rank"], losses["neurons"])


def test_mild_targets_count_the_guarded_losses_of_removal(caches):
    from hisvd.allocations import RankProblem, guard_at

    cache, settings = read_cache(caches["llama"]), hisvd.CompressionSettings()
    parts = [guard_at(target, settings) for target in (0.3, 0.6, 0.65, 0.7, 1.0)]
    assert parts == pytest.approx([0, 0, 0.5, 1, 1])
    in_bytes = hisvd.CompressionSettings(budget="bytes")  # int4 alone saves three quarters of them
    assert [guard_at(target, in_bytes) for target in (0.15, 0.175)] == pytest.approx([0, 1])
    problem = RankProblem(cache, resolved(settings, cache))
    first, mlp = problem.mlps[0]
    measured, half, guarded = (problem.removal_losses(first.layer, mlp.output, part) for part in (0, 0.5, 1))
    assert bool((guarded[1:] > measured[1:]).all()) and not guarded[0] and not measured[0]
    torch.testing.assert_close(half, (measured + guarded) / 2)
