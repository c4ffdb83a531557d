"""--target_bytes: what linears take in bytes, what rounding costs, and the storage of each that adds the least loss."""

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import expect_sentence, logits_of, run, saved_tensors
from test_neurons import output_metric
from test_rounding import normal
from test_width_allocation import mlp_curves

import hisvd
from hisvd.byte_budget import SIZE_ALONE, Curves, least_loss_storages, storages_at
from hisvd.calibration_cache import read_cache
from hisvd.factor_forms import FORMS, factor_tensors
from hisvd.integer_codes import INTEGERS
from hisvd.quantization import added_loss, integer_entries, rounding_energy
from hisvd.rank_allocation import Allowed, rank_curve
from hisvd.shape_utils import Storage, stored_bytes

DTYPES = (None, *INTEGERS)
NOISE = {None: 0.0, "int8": 1e-4, "int4": 1e-2}


@pytest.mark.parametrize("rank", [1, 7, 24, 40])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_tensors(dtype, form, rank):
    shape = (40, 70)
    entries = {"weight": normal(*shape).bfloat16()}
    if rank < 40 and FORMS[form].parameters(rank, shape) < 40 * 70:
        entries = factor_tensors(normal(40, rank), normal(rank, 70, seed=1), form, torch.bfloat16)
    if dtype:
        entries = integer_entries(entries, torch.eye(70), dtype)
    assert stored_bytes(rank, shape, form, dtype) == sum(t.nbytes for t in entries.values())


@pytest.mark.parametrize("name", INTEGERS)
def test_what_rounding_costs_is_known_beforehand(name):
    estimated = measured = 0.0
    for seed in range(3):
        # In 4 bits, stronger correlations than these make feedback ask for more than the largest code.
        inputs = normal(96, 24, seed=seed)
        weight, root = normal(30, 96, seed=seed), torch.linalg.cholesky(inputs @ inputs.T + 4 * torch.eye(96))
        f = output_metric(30, seed)
        estimated += float(rounding_energy(weight, root, f, name))
        coded = integer_entries({"weight": weight}, root @ root.T, name)
        measured += 2 * added_loss({"weight": weight}, coded, root, f)
    assert estimated == pytest.approx(measured, rel=0.3)


def menu_of(spectra, shapes, mlps=()):
    """The linears outside MLPs, and MLPs, in 16 bits, int8 and int4."""
    menu = []
    for dtype in DTYPES:
        storage = Storage("svd", dtype, in_bytes=True)
        others = [
            rank_curve(s, shape, storage, Allowed(), NOISE[dtype]) for s, shape in zip(spectra, shapes, strict=True)
        ]
        places = [None] * sum(len(mlp.members) for mlp in mlps)
        own = [
            dataclasses.replace(
                mlp, storages=(storage,) * len(mlp.members), noises=(NOISE[dtype],) * len(mlp.members), _known={}
            )
            for mlp in mlps
        ]
        menu.append(Curves([*others, *places], own))
    return menu


def test_no_other_storages_and_ranks_of_the_same_size_lose_less():
    shapes = [(6, 40), (9, 35), (5, 64)]
    spectra = [normal(min(s), seed=k).abs().sort(descending=True).values for k, s in enumerate(shapes)]
    menu = menu_of(spectra, shapes)
    fronts = [
        [(float(t), float(b)) for curves in menu for t, b in zip(*curves.others[k], strict=True)] for k in range(3)
    ]
    every = [(sum(t for t, _ in c), sum(b for _, b in c)) for c in itertools.product(*fronts)]
    for multiplier in (1e-6, 1e-4, 1e-3, 1e-2, SIZE_ALONE):
        places, size = storages_at(menu, multiplier)
        loss = min(
            sum(menu[p].others[k].tails[r] for k, (p, r) in enumerate(zip(places, ranks, strict=True)))
            for ranks in itertools.product(*map(range, (6, 9, 5)))
            if sum(menu[p].others[k].sizes[r] for k, (p, r) in enumerate(zip(places, ranks, strict=True))) <= size
        )
        assert float(loss) <= min(t for t, b in every if b <= size) * (1 + 1e-9)
    assert size == min(b for _, b in every)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.9])
def test_fewer_bytes_mean_fewer_bits_within_the_budget(share):
    mlps = [mlp_curves(2, 64, 24, seed=1), mlp_curves(5, 64, 24, seed=2)]
    shapes = [(24, 24), (24, 24)]
    spectra = [torch.rand(24, generator=torch.Generator().manual_seed(k)).sort(descending=True).values for k in (5, 6)]
    menu = menu_of(spectra, shapes, mlps)
    whole = 2 * (2 * 24 * 24 + 2 * 3 * 24 * 64)
    places = least_loss_storages(menu, share * whole)
    bits = [(16, 8, 4)[place] for place in places]
    assert len(bits) == 8 and storages_at(menu, SIZE_ALONE).size < 0.2 * whole
    richer = least_loss_storages(menu, min(1, share + 0.3) * whole)
    assert sum(bits) <= sum((16, 8, 4)[place] for place in richer)


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("llama", 0.6, ("--update", "none")),
        ("qwen2", 0.4, ("--update", "none", "--moves", "low_rank")),
        ("mistral", 0.3, ()),
    ],
)
def test_the_files_take_the_bytes_that_were_asked_for(model_folders, caches, tmp_path, family, target, options):
    where = ["--model_path", model_folders[family], "--calib_cache", caches[family]]
    goal = ["--target_bytes", target, "--save_model", tmp_path / "out", "--json", tmp_path / "figures.json"]
    result = run("compress", *where, *goal, *options)
    assert result.code == 0, result
    tensors = saved_tensors(tmp_path / "out")
    linears = {n: t for n, t in tensors.items() if "proj" in n and not n.endswith("bias")}
    report = json.loads((tmp_path / "out" / "hisvd.json").read_text())
    stored = sum(t.nbytes for t in linears.values())
    assert stored == report["linear_bytes_after"] and f"{stored:,}" in result.output
    assert 0.96 * target <= stored / report["linear_bytes_before"] <= target
    assert sum(report["linear_dtypes"].values()) == len(report["sublayers"])
    assert any(t.dtype == torch.int8 for t in linears.values()) or any(t.dtype == torch.uint8 for t in linears.values())
    assert {t.dtype for t in linears.values() if t.is_floating_point() and t.numel()} <= {torch.bfloat16, torch.float32}
    exact = logits_of(hisvd.load(model_folders[family]))
    assert (logits_of(hisvd.load(tmp_path / "out")) - exact).norm() < exact.norm()
    plan = run("compress", "--calib_cache", caches[family], "--target_bytes", target, "--plan_only", *options)
    assert f"{stored:,}" in plan.output and "int" in plan.output.partition("type ")[0]


def test_the_update_goes_with_a_budget_in_bytes_and_resumes(model_folders, caches, tmp_path, monkeypatch):
    from hisvd.utils.save_utils import ModelWriter

    tokens = read_cache(caches["llama"]).read_tokens()
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--target_bytes", "0.3"]
    for name, options in (("plain", ["--update", "none"]), ("whole", [])):
        assert run("compress", *where, "--save_model", tmp_path / name, *options).code == 0
    with torch.no_grad():
        wanted, plain, updated = (
            hisvd.load(path).model(tokens).last_hidden_state
            for path in (model_folders["llama"], tmp_path / "plain", tmp_path / "whole")
        )
    assert (updated - wanted).norm() < (plain - wanted).norm()

    real_write = ModelWriter.write_shard

    def stop_at_the_second(self, index, tensors):
        if index == 1:
            raise KeyboardInterrupt
        real_write(self, index, tensors)

    monkeypatch.setattr(ModelWriter, "write_shard", stop_at_the_second)
    assert run("compress", *where, "--save_model", tmp_path / "out").code == 130
    monkeypatch.setattr(ModelWriter, "write_shard", real_write)
    assert run("compress", *where, "--save_model", tmp_path / "out").code == 0
    expected, resumed = saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "out")
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[k], resumed[k]) for k in expected)


def test_several_targets_are_named_by_their_bytes(model_folders, caches, tmp_path):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--update", "none"]
    assert run("compress", *where, "--target_bytes", "0.6,0.45", "--save_model", tmp_path / "out").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out_60b", "out_45b"}


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ((), "Pass one of --target_compression"),
        (("--target_bytes", "0.4", "--target_compression", "0.8"), "Pass one of --target_compression"),
        (("--target_bytes", "1.4"), "--target_bytes 1.4 is outside (0, 1]"),
        (("--target_bytes", "half"), "--target_bytes 'half' is not a number"),
        (("--target_bytes", "0.001"), "Target 0.001 is too small"),
        (("--target_bytes", "0.4", "--linear_dtype", "int8"), "--linear_dtype int8"),
        (("--target_bytes", "0.4", "--export", "plain"), "--export plain"),
        (("--target_bytes", "0.4", "--allocation", "uniform"), "--allocation loss"),
        (("--target_bytes", "0.4", "--whitening", "input"), "--whitening two_sided"),
    ],
)
def test_bad_budgets(caches, options, fragment):
    expect_sentence(run("compress", "--calib_cache", caches["llama"], "--plan_only", *options), fragment)
