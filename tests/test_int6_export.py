"""compress.py --export int6 on tiny models: formats, the quality gate, bad usage."""

import json

import pytest
import torch
from conftest import IDS, build_model, calibrate_arguments, expect_sentence, run, saved_tensors, short_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import hisvd
from hisvd import evaluation
from hisvd.calibration_cache import read_cache
from hisvd.component.int6_linear import INT6SparseLinear, fused_product
from hisvd.int6_gate import longest_within
from hisvd.sparse_int6 import FORMAT_NAME, USER_ALIAS, pack_weight
from hisvd.utils.data_utils import CALIBRATION_SPLIT, calibration_windows, load_text, split_held_out, tokenize
from hisvd.utils.eval_utils import perplexity

ALL = ("--export", "int6", "--quality_gate_delta", "none")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("target", ["1.0", "0.8"])
def test_folder_and_pt_load_to_the_same_logits_and_generate(chain, family, target):
    folder, file = chain(family, target, "folder", *ALL), chain(family, target, "file.pt", *ALL)
    models = [hisvd.load(folder), hisvd.load(file), AutoModelForCausalLM.from_pretrained(folder).eval()]
    codes = [m for m in models[0].modules() if isinstance(m, INT6SparseLinear)]
    assert len(codes) >= 4 * 7 and all(m.scales.dtype == torch.float32 for m in codes)
    with torch.no_grad():
        logits = [model(IDS).logits for model in models]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    half = hisvd.load(folder, dtype=torch.bfloat16)
    assert all(m.scales.dtype == torch.float32 for m in half.modules() if isinstance(m, INT6SparseLinear))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (models[1].generate(IDS, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_report_measures_bits_on_the_file(chain):
    folder = chain("llama", "1.0", "out", *ALL)
    figures = json.loads((folder / "hisvd.json").read_text())["int6"]
    assert (figures["format"], figures["user_alias"]) == (FORMAT_NAME, USER_ALIAS)
    assert figures["bits_per_stored_value"] == 6 and figures["pair_sparsity"] == 0.5 and figures["weights"] == 28
    tensors = saved_tensors(folder)
    names = [name for name in tensors if name.endswith("proj.packed_weight")]
    bits = weights = 0
    for name in names:
        columns = 64 * -(-(160 if "down" in name else 64) // 64)
        weights += tensors[name].shape[0] * columns
        parts = [tensors[name.replace("packed_weight", part)] for part in ("packed_weight", "metadata", "scales")]
        bits += 8 * sum(part.numel() * part.element_size() for part in parts)
    assert figures["payload_bits_per_weight"] == 3 and figures["metadata_bits_per_weight"] == 0.5
    assert figures["total_bits_per_weight"] == pytest.approx(bits / weights)


def test_whitening_means_nothing_to_linears_that_are_not_factored(chain):
    options = (*ALL, "--update", "none")
    plain, none = (
        chain("llama", "1.0", "a.pt", *options),
        chain("llama", "1.0", "b.pt", *options, "--whitening", "none"),
    )
    plain, none = saved_tensors(plain), saved_tensors(none)
    assert plain.keys() == none.keys() and all(torch.equal(tensor, none[name]) for name, tensor in plain.items())


def test_magnitude_mode_is_the_plain_rule_on_the_weights_themselves(chain, model_folders):
    folder = chain("llama", "1.0", "out", *ALL, "--int6_mode", "magnitude", "--update", "none")
    model, original = hisvd.load(folder), saved_tensors(model_folders["llama"])
    for name, module in model.named_modules():
        if isinstance(module, INT6SparseLinear):
            plain = pack_weight(original[f"{name}.weight"])
            assert torch.equal(module.packed_weight, plain["packed_weight"]), name


def test_calibrated_mode_has_a_smaller_error_than_magnitude(chain, model_folders, caches):
    dense, tokens = hisvd.load(model_folders["llama"]), read_cache(caches["llama"]).read_tokens()
    errors = {}
    for mode in ("magnitude", "calibrated"):
        model = hisvd.load(chain("llama", "1.0", mode, *ALL, "--int6_mode", mode, "--update", "none"))
        with torch.no_grad():
            errors[mode] = (model(tokens).logits - dense(tokens).logits).square().mean().item()
    assert errors["calibrated"] < errors["magnitude"]


@pytest.mark.parametrize("expected", [0, 1, 9, 14, 28])
@pytest.mark.parametrize("most", [0, 1, 13, 27, 28])
def test_gate_takes_the_longest_prefix_that_fits(most, expected):
    class Text:
        tokens = IDS

        def perplexity(self, exported):
            assert exported == set(names[: len(exported)])
            return 10.0 + (0 if not exported else 0.2 if len(exported) <= most else 0.3)

    names = [f"linear_{i:02d}" for i in range(28)]
    report = longest_within(0.025, names, expected, Text())
    assert report["exported"] == names[:most]
    assert report["perplexity_before"] == 10.0 and report["perplexity_after"] == (10.2 if most else 10.0)


@pytest.mark.parametrize("target", ["1.0", "0.7"])
def test_quality_gate_bounds_the_perplexity_and_lists_what_it_did(chain, tmp_path, target):
    plain = chain("llama", target, "plain.pt") if target != "1.0" else None
    reports = {}
    for delta in ("0", "10"):
        folder = chain("llama", target, f"gate_{delta}", "--export", "int6", "--quality_gate_delta", delta)
        reports[delta] = json.loads((folder / "hisvd.json").read_text())["quality_gate"]
        gate, model = reports[delta], hisvd.load(folder)
        assert gate["perplexity_after"] <= (1 + float(delta)) * gate["perplexity_before"]
        codes = {n for n, m in model.named_modules() if isinstance(m, INT6SparseLinear)}
        assert {next(s for s in gate["exported"] if name.startswith(s)) for name in codes} == set(gate["exported"])
        assert len(gate["exported"]) + len(gate["not_exported"]) == 28
        assert not list(folder.glob("*.bin")) and not (folder / "int6_gate.json").exists()
    assert not reports["10"]["not_exported"]
    if plain:
        kept = saved_tensors(plain)
        for name, tensor in saved_tensors(tmp_path / "gate_0").items():
            if not any(name.startswith(f"{sublayer}.") for sublayer in reports["0"]["exported"]):
                assert torch.equal(tensor, kept[name]), name


def test_gate_reports_the_perplexity_that_evaluate_measures(chain, caches, tmp_path):
    folder = chain("llama", "1.0", "out", "--export", "int6", "--quality_gate_delta", "10")
    gate = json.loads((folder / "hisvd.json").read_text())["quality_gate"]
    held_out = read_cache(caches["llama"]).read_held_out()
    measured = perplexity(hisvd.load(folder, torch.float32), held_out, "held-out")
    assert measured["perplexity"] == pytest.approx(gate["perplexity_after"], rel=1e-4)
    assert measured["tokens_scored"] == gate["tokens"]


def test_evaluate_counts_half_of_the_parameters(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "peaks_on_cpu", lambda *_: {})
    folder = chain("llama", "1.0", "out", *ALL)
    where = ["--datasets", "python-docs", "--seqlen", 32, "--nsamples", 2, "--json", tmp_path / "e.json"]
    assert run("evaluate", "--model_path", folder, *where, "--speed").code == 0
    assert json.loads((tmp_path / "e.json").read_text())[0]["linear_kept"] == 0.5


def test_damaged_int6_folder_is_refused(chain, tmp_path):
    folder = chain("llama", "1.0", "out", *ALL)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.metadata"))
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})
    with pytest.raises(hisvd.HiSVDError, match=r"q_proj\.metadata"):
        hisvd.load(folder)
    where = ["--datasets", "python-docs", "--seqlen", 32, "--nsamples", 2]
    for options in ([], ["--offload_folder", tmp_path / "offload"]):
        expect_sentence(run("evaluate", "--model_path", folder, *where, *options), name)


def test_perplexity_layer_by_layer_compiles_nothing(chain, tmp_path, monkeypatch):
    """The product of few tokens, which takes many seconds to compile, is for decoding."""
    folder = chain("llama", "1.0", "out", *ALL)

    def compiled(*_, **__):
        raise AssertionError("torch.compile was called")

    monkeypatch.setattr(torch, "compile", compiled)
    fused_product.cache_clear()
    where = ["--datasets", "python-docs", "--seqlen", 32, "--nsamples", 2, "--offload_folder", tmp_path / "offload"]
    assert run("evaluate", "--model_path", folder, *where).code == 0


@pytest.mark.parametrize("delta", ["-1", "nan", "inf", "much"])
def test_bound_of_the_gate_must_be_a_number_or_none(caches, model_folders, tmp_path, delta):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "o"]
    goal = ["--target_compression", "1", "--export", "int6", "--quality_gate_delta", delta]
    expect_sentence(run("compress", *where, *goal), "--quality_gate_delta")


def test_model_with_nothing_to_export_is_refused(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = build_model(config, tmp_path / "model", tokenizer)
    assert run("calibrate", *calibrate_arguments(model, tmp_path)).code == 0
    where = ["--model_path", model, "--calib_cache", tmp_path / "tiny_n6_s32_with_hessian"]
    goal = ["--target_compression", "1", "--export", "int6", "--save_model", tmp_path / "o"]
    expect_sentence(run("compress", *where, *goal), "nothing to store", "64 inputs")


def test_gate_without_held_out_text_says_so(model_folders, tokenizer, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(tokenizer.decode(calibration_text(tokenizer)[: 6 * 32 + 10]))
    arguments = [*calibrate_arguments(model_folders["llama"], tmp_path), "--sampling", "first"]
    arguments[arguments.index(short_text())] = text
    assert run("calibrate", *arguments).code == 0
    where = ["--model_path", model_folders["llama"], "--calib_cache", tmp_path / "tiny_n6_s32_with_hessian"]
    goal = ["--target_compression", "1", "--export", "int6", "--save_model", tmp_path / "o"]
    expect_sentence(run("compress", *where, *goal), "--quality_gate_delta none")


def calibration_text(tokenizer):
    return tokenize(load_text("python-docs", CALIBRATION_SPLIT, "data"), tokenizer)


@pytest.mark.parametrize("sampling", ["first", "random"])
@pytest.mark.parametrize("tokens", [192, 200, 300, 10_000, 100_000])
def test_held_out_windows_are_never_calibrated_on(sampling, tokens):
    ids, held_out = split_held_out(torch.arange(tokens), 6, 32, sampling)
    windows = calibration_windows(ids, 6, 32, sampling, 3, "t")
    assert not set(windows.flatten().tolist()) & set(held_out.flatten().tolist())
    assert len(held_out) == {192: 0, 200: 0, 300: 0, 10_000: 15, 100_000: 16}[tokens] and held_out.shape[1] == 32
