"""compress.py on tiny models: budgets on the saved file, both formats, exports, resume."""

import json

import pytest
import torch
from conftest import IDS, calibrate_arguments, expect_sentence, linear_parameters, run, saved_tensors
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hisvd
from hisvd.cached_moments import input_moment
from hisvd.utils import save_utils


@pytest.mark.parametrize("form", ["pivoted", "svd"])
def test_budget_holds_in_the_saved_file(chain, model_folders, form):
    targets = "0.9,0.8,0.7,0.6,0.5,0.4,0.3"
    output = chain("llama", targets, "out", "--factors", form)
    dense = linear_parameters(saved_tensors(model_folders["llama"]))
    for target in targets.split(","):
        folder = output.with_name(f"out_{100 * float(target):g}p")
        kept = linear_parameters(saved_tensors(folder)) / dense
        assert float(target) - 0.001 <= kept <= float(target), (target, kept)
        report = json.loads((folder / "hisvd.json").read_text())
        assert report["linear_kept"] == kept and report["target_compression"] == float(target)
        assert report["weight_bytes_after"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_everything_outside_the_linears_is_kept_bit_for_bit(chain, model_folders):
    original = saved_tensors(model_folders["qwen2"])
    compressed = saved_tensors(chain("qwen2", "0.5", "out"))
    outside = {name for name in original if "proj.weight" not in name}
    assert any(name.endswith("q_proj.bias") for name in outside)
    for name in outside:
        assert torch.equal(original[name], compressed[name]), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("form", ["pivoted", "svd"])
def test_folder_and_pt_load_to_the_same_logits_by_every_way(chain, family, form):
    folder = chain(family, "0.6", "folder", "--factors", form)
    file = chain(family, "0.6", "file.pt", "--factors", form)
    models = [
        hisvd.load(folder),
        hisvd.load(file),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        hisvd.load(file, dtype=torch.float32, device="cpu"),
    ]
    assert not any(model.training for model in models)
    with torch.no_grad():
        logits = [model(IDS).logits for model in models]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert hisvd.load(file, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_generation_with_cache_equals_generation_without(chain, family):
    model = hisvd.load(chain(family, "0.7", "out.pt"))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, **settings, use_cache=True)
    assert cached.shape == (2, 32)
    assert torch.equal(cached, model.generate(IDS, **settings, use_cache=False))


def test_pivoted_equals_svd_of_the_same_ranks(model_folders, caches, tmp_path):
    """Same ranks in both forms: from one plan, so that only the packing differs."""
    from hisvd.calibration_cache import read_cache
    from hisvd.compression import factor_layers, prepared
    from hisvd.planning import Plan
    from hisvd.settings import CompressionSettings, Resources

    cache = read_cache(caches["llama"])
    ranks = {s.name: max(1, s.full_rank // 3) for s in cache.sublayers}
    weights = {}
    for form in ("pivoted", "svd"):
        for name, export in ((form, "dense"), (f"{form}_factored", "none")):
            settings = CompressionSettings(factors=form, whitening="input", update="none", export=export)
            plans = [Plan(0.5, form, ranks)]
            job = prepared(model_folders["llama"], cache, tmp_path / name, plans, settings, Resources())
            factor_layers(job)
            weights[name] = saved_tensors(job.writers[0.5].folder)
    for name, dense in weights["svd"].items():
        torch.testing.assert_close(dense, weights["pivoted"][name], rtol=1e-4, atol=1e-6)
    stored = {form: linear_parameters(weights[f"{form}_factored"]) for form in ("pivoted", "svd")}
    assert stored["svd"] - stored["pivoted"] == sum(r * r for r in ranks.values())


def test_dense_export_is_a_plain_model_with_the_same_logits(chain):
    dense, factored = chain("llama", "0.6", "dense", "--export", "dense"), chain("llama", "0.6", "factored")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(dense).eval()
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, hisvd.load(factored)(IDS).logits, rtol=1e-3, atol=1e-4)


def test_two_sided_needs_gradients(model_folders, tmp_path):
    assert run("calibrate", *calibrate_arguments(model_folders["llama"], tmp_path), "--no_gradients").code == 0
    cache = tmp_path / "tiny_n6_s32_with_hessian"
    where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--target_compression", "0.6"]
    expect_sentence(run("compress", *where, "--save_model", tmp_path / "o", "--whitening", "two_sided"), str(cache))
    assert run("compress", *where, "--save_model", tmp_path / "o").code == 0
    settings = json.loads((tmp_path / "o" / "hisvd.json").read_text())["settings"]
    assert (settings["allocation"], settings["whitening"]) == ("hisvd", "input")


@pytest.mark.parametrize("allocation", ["hisvd", "loss", "uniform"])
@pytest.mark.parametrize("whitening", ["two_sided", "input", "none"])
def test_every_allocation_with_every_whitening_meets_the_budget(chain, model_folders, allocation, whitening):
    output = chain("llama", "0.6", "out", "--allocation", allocation, "--whitening", whitening)
    kept = linear_parameters(saved_tensors(output)) / linear_parameters(saved_tensors(model_folders["llama"]))
    assert 0.599 <= kept <= 0.6


def test_target_one_is_the_original(chain, model_folders):
    original = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    with torch.no_grad():
        assert torch.equal(hisvd.load(chain("llama", "1.0", "out"))(IDS).logits, original(IDS).logits)


def test_save_pretrained_writes_the_format_again(chain, tmp_path):
    model = hisvd.load(chain("llama", "0.6", "out"))
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(hisvd.load(tmp_path / "again")(IDS).logits, model(IDS).logits)


def test_whitening_lowers_the_error_on_the_calibration_inputs(chain, model_folders, caches):
    """Input whitening must beat the plain SVD in the metric that it optimises, sublayer by sublayer."""
    from hisvd.calibration_cache import read_cache

    original = saved_tensors(model_folders["llama"])
    options = ("--export", "dense", "--allocation", "uniform", "--update", "none")
    results = {w: saved_tensors(chain("llama", "0.5", w, *options, "--whitening", w)) for w in ("input", "none")}
    cache = read_cache(caches["llama"])
    for index in range(cache.num_layers):
        tensors = cache.read_layer(index)
        for s in cache.sublayers_of(index):
            h = input_moment(s, tensors, torch.device("cpu"))
            error = {}
            for whitening, weights in results.items():
                difference = (original[f"{s.name}.weight"] - weights[f"{s.name}.weight"]).double()
                error[whitening] = torch.trace(difference @ h @ difference.T)
            assert error["input"] < error["none"]


def test_interrupted_run_keeps_its_shards(chain, model_folders, caches, tmp_path, monkeypatch):
    from hisvd import factoring
    from hisvd.utils.save_utils import ModelWriter

    expected = saved_tensors(chain("llama", "0.6", "whole", "--update", "none"))
    real_write = ModelWriter.write_shard

    def write_two(self, index, tensors):
        if index == 2:
            raise KeyboardInterrupt
        real_write(self, index, tensors)

    arguments = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"]]
    arguments += ["--target_compression", "0.6", "--save_model", tmp_path / "out", "--update", "none"]
    monkeypatch.setattr(ModelWriter, "write_shard", write_two)
    stopped = run("compress", *arguments)
    assert stopped.code == 130 and "run the same command again" in stopped.error
    assert not (tmp_path / "out").exists()
    done = {f: f.stat().st_mtime_ns for f in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(done) == 2

    monkeypatch.setattr(ModelWriter, "write_shard", real_write)
    decomposed = []
    real = factoring.optimal_factors
    monkeypatch.setattr(factoring, "optimal_factors", lambda *args: decomposed.append(1) or real(*args))
    assert run("compress", *arguments).code == 0
    assert len(decomposed) <= 2 * 7  # two of four layers remained
    resumed = saved_tensors(tmp_path / "out")
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[k], resumed[k]) for k in expected)
    assert not (tmp_path / "out.partial").exists()


def test_every_matrix_is_decomposed_once_for_several_targets(chain, monkeypatch):
    from hisvd import factoring

    calls = []
    real = factoring.optimal_factors
    monkeypatch.setattr(factoring, "optimal_factors", lambda *args: calls.append(1) or real(*args))
    chain("llama", "0.8,0.6,0.4", "out", "--update", "none", "--moves", "low_rank")
    assert len(calls) <= 4 * 7


@pytest.mark.parametrize("method", ["stable", "effective", "mathematical"])
@pytest.mark.parametrize("modulation", ["logarithmic", "power", "exponential", "linear"])
def test_plan_only_prints_the_table_from_the_cache_alone(caches, tmp_path, method, modulation):
    options = [
        "--calib_cache",
        f"{caches['llama']}.pkl",
        "--target_compression",
        "0.8",
        "--plan_only",
        "--allocation",
        "hisvd",
    ]
    result = run(
        "compress", *options, "--rank_method", method, "--modulation", modulation, "--json", tmp_path / "plan.json"
    )
    assert result.code == 0
    (report,) = json.loads((tmp_path / "plan.json").read_text())
    assert 0.799 <= report["linear_kept"] <= 0.8
    assert len(report["sublayers"]) == 28 and f"{report['linear_numbers_after']:,}" in result.output
    assert all(str(row["rank"]) in result.output for row in report["sublayers"] if row["form"] != "dense")


def test_type_depth_clusters_change_the_plan_within_the_budget(caches, tmp_path):
    options = ["--calib_cache", caches["llama"], "--target_compression", "0.6", "--plan_only", "--allocation", "hisvd"]
    ranks = {}
    for cluster_by in ("type", "type_depth"):
        assert run("compress", *options, "--cluster_by", cluster_by, "--json", tmp_path / "p.json").code == 0
        (report,) = json.loads((tmp_path / "p.json").read_text())
        assert 0.599 <= report["linear_kept"] <= 0.6
        ranks[cluster_by] = [row["rank"] for row in report["sublayers"]]
    assert ranks["type"] != ranks["type_depth"]


def test_the_published_command_line_and_deterministic_output(chain):
    options = (
        "--rank_method stable --alpha 1.0 --lwe_strength 1.0 --tail_redundancy_weight 1.0 --modulation logarithmic"
    )
    first, second = chain("llama", "0.8", "a.pt", *options.split()), chain("llama", "0.8", "b.pt")
    a, b = saved_tensors(first), saved_tensors(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_existing_output_is_never_overwritten(chain, model_folders, caches, tmp_path):
    output = chain("llama", "0.8", "out.pt")
    before = output.read_bytes()
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--target_compression", "0.5"]
    expect_sentence(run("compress", *where, "--save_model", output), str(output), "already exists")
    assert output.read_bytes() == before


def test_shards_are_indexed_as_transformers_expects(chain, monkeypatch):
    monkeypatch.setattr(save_utils, "MAX_SHARD_BYTES", 150_000)
    folder = chain("llama", "0.6", "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(folder / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert {"config.json", "tokenizer.json", "generation_config.json", "README.md", "hisvd.json"} <= {
        f.name for f in folder.iterdir()
    }
