"""The whole chain on the real SmolLM2-135M (scripts/fetch_smollm2.sh writes it to models/)."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import hisvd
from hisvd import neurons
from hisvd.cached_moments import input_moment, output_moment
from hisvd.calibration_cache import read_cache
from hisvd.component.low_rank import swap_linears
from hisvd.factor_forms import factor_tensors
from hisvd.int6_fit import fit_weight
from hisvd.pivoting import pack_pivoted
from hisvd.sparse_int6 import dequantize, pack_weight
from hisvd.utils.data_utils import EVALUATION_SPLIT, evaluation_windows, load_text, tokenize
from hisvd.utils.eval_utils import perplexity
from hisvd.utils.model_utils import open_checkpoint
from hisvd.whitening_svd import H_DAMPING, cholesky_root, optimal_factors

MODEL = Path(os.environ.get("HISVD_TEST_MODEL", ROOT / "models" / "smollm2-135m"))
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODEL.is_dir(), reason="run scripts/fetch_smollm2.sh to fetch the model"),
]


@pytest.fixture(scope="module", autouse=True)
def few_spectra():
    """Spectra at four widths of an MLP in place of eight, which take longer than all else in calibration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neurons, "SPECTRUM_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    size = ["--nsamples", 16, "--seqlen", 256, "--dataset", "python-docs"]
    result = run("calibrate", "--model_path", MODEL, "--model_name", "smol", "--output_dir", root, *size)
    assert result.code == 0, result
    return root / "smol_n16_s256_with_hessian"


@pytest.fixture(scope="module")
def compressed(cache, tmp_path_factory):
    """Models at 0.8 with default settings, and at 0.8 and 0.6 by low rank without the update."""
    root = tmp_path_factory.mktemp("compressed")

    def make(name, targets, *options):
        where = ["--model_path", MODEL, "--calib_cache", cache, "--save_model", root / name]
        result = run("compress", *where, "--target_compression", targets, *options)
        assert result.code == 0, result

    make("default", "0.8")
    make("one_shot", "0.8,0.6", "--update", "none", "--moves", "low_rank")  # one decomposition serves both targets
    return root


@pytest.fixture(scope="module")
def windows():
    ids = tokenize(load_text("python-docs", EVALUATION_SPLIT, "data"), AutoTokenizer.from_pretrained(MODEL))
    return evaluation_windows(ids, 256, 32, "python-docs")


def test_quality_falls_with_the_budget_and_neurons_and_update_help(compressed, windows):
    names = ("default", "one_shot_80p", "one_shot_60p")
    paths = {"dense": MODEL} | {name: compressed / name for name in names}
    few, many = windows[:8], windows[:24]  # neurons and the update gain little, which shows on many windows
    ppl = {k: perplexity(hisvd.load(p, torch.float32), few, k)["perplexity"] for k, p in paths.items()}
    assert ppl["dense"] < ppl["one_shot_80p"] < ppl["one_shot_60p"], ppl
    assert ppl["dense"] < ppl["default"] < 2.5 * ppl["dense"], ppl
    pair = [perplexity(hisvd.load(paths[k], torch.float32), many, k)["perplexity"] for k in ("default", "one_shot_80p")]
    assert pair[0] < pair[1], pair


def test_saved_bytes_shrink_by_what_was_promised(compressed):
    original = (MODEL / "model.safetensors").stat().st_size
    for target in (0.8, 0.6):
        folder = compressed / f"one_shot_{100 * target:g}p"
        report = json.loads((folder / "hisvd.json").read_text())
        saved = original - sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        rows = sum(row.get("stored_shape", row["shape"])[0] for row in report["sublayers"] if row["form"] == "pivoted")
        promised = 2 * report["linear_numbers_before"] * (1 - target) - 4 * rows  # bfloat16; one int32 per row
        assert saved == pytest.approx(promised, rel=0.01)


def test_generation_with_cache_equals_generation_without(compressed):
    tokenizer = AutoTokenizer.from_pretrained(compressed / "default")
    model = AutoModelForCausalLM.from_pretrained(compressed / "default", dtype=torch.float32)
    ids = tokenizer("The Python language reference describes", return_tensors="pt")
    settings = {"max_new_tokens": 16, "do_sample": False}
    cached, plain = (model.generate(**ids, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_packing_loses_nothing_on_real_weights(cache):
    statistics, sublayers = read_cache(cache), read_cache(cache).sublayers
    checkpoint = open_checkpoint(str(MODEL))
    largest = 0.0
    for index in (0, 14, 29):
        tensors = statistics.read_layer(index)
        for s in (s for s in sublayers if s.layer == index):
            weight = checkpoint.read([f"{s.name}.weight"])[f"{s.name}.weight"]
            root = cholesky_root(input_moment(s, tensors, CPU), H_DAMPING)
            f = output_moment(s, tensors, "two_sided", CPU)
            left, right, _ = optimal_factors(weight, root, f, s.full_rank // 2)
            ((rows, coefficients, permutation),) = pack_pivoted(left, [s.full_rank // 2])
            base, coefficients = (rows @ right).float(), coefficients.float()
            x = torch.randn(64, s.in_features, generator=torch.Generator().manual_seed(0))
            expected = x @ right.float().T @ left.float().T
            t = x @ base.T
            y = torch.cat([t, t @ coefficients.T], -1).index_select(-1, permutation)
            assert (y - expected).norm() <= 1e-4 * expected.norm(), s.name
            largest = max(largest, coefficients.abs().max().item())
    assert largest < 1.5


def test_calibrated_int6_codes_have_half_the_error_of_the_plain_rule(cache):
    tensors, checkpoint = read_cache(cache).read_layer(14), open_checkpoint(str(MODEL))
    for s in read_cache(cache).sublayers_of(14):
        weight = checkpoint.read([f"{s.name}.weight"])[f"{s.name}.weight"]
        moment = input_moment(s, tensors, CPU)
        errors = {}
        for mode, code in (("plain", pack_weight(weight)), ("calibrated", fit_weight(weight, moment))):
            error = weight.double() - dequantize(**code, in_features=s.in_features, dtype=torch.float64)
            errors[mode] = ((error @ moment) * error).sum()
        assert errors["calibrated"] < errors["plain"] / 2, (s.name, errors)


def test_both_forms_of_the_same_ranks_have_the_same_perplexity_in_bfloat16(cache, compressed, windows):
    """Weights rounded to it, whose errors scatter results by up to 0.2 % on so few tokens; its arithmetic would too."""
    checkpoint, statistics = open_checkpoint(str(MODEL)), read_cache(cache)
    stored = hisvd.load(compressed / "one_shot_80p")
    assert stored.dtype == torch.bfloat16
    pivoted, svd = hisvd.load(compressed / "one_shot_80p", torch.float32), hisvd.load(MODEL, torch.float32)
    ranks = {name: entry["rank"] for name, entry in pivoted.config.quantization_config.modules.items()}
    swap_linears(svd, {name: {"form": "svd", "rank": rank} for name, rank in ranks.items()})
    for index in range(statistics.num_layers):
        tensors = statistics.read_layer(index)
        for s in (s for s in statistics.sublayers_of(index) if s.name in ranks):
            weight = checkpoint.read([f"{s.name}.weight"])[f"{s.name}.weight"]
            root = cholesky_root(input_moment(s, tensors, CPU), H_DAMPING)
            f = output_moment(s, tensors, "two_sided", CPU)
            factors = optimal_factors(weight, root, f, ranks[s.name])[:2]
            svd.get_submodule(s.name).load_state_dict(factor_tensors(*factors, "svd", torch.bfloat16, root))
    figures = {name: perplexity(m, windows, name)["perplexity"] for name, m in (("pivoted", pivoted), ("svd", svd))}
    assert figures["pivoted"] == pytest.approx(figures["svd"], rel=3e-3), figures
    one = [perplexity(model, windows[:1], "one window")["perplexity"] for model in (stored, pivoted)]
    assert one[0] == pytest.approx(one[1], rel=0.05)
