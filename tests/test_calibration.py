"""The streaming engine and the cache: right moments, resume, checksums."""

import json
import signal
import time

import pytest
import torch
from conftest import build_model, calibrate_arguments, run, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hisvd.calibration_cache import read_cache
from hisvd.utils.data_utils import CALIBRATION_SPLIT, calibration_windows, load_text, tokenize


def moments_of_whole_model(folder):
    """E[x xᵀ] of every linear, from hooks on the ordinary model: sublayer name → (n, n)."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenize(load_text("python-docs", CALIBRATION_SPLIT, "data"), AutoTokenizer.from_pretrained(folder))
    tokens = calibration_windows(ids, 6, 32, "random", 3, "python-docs")
    moments = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):

            def hook(_, args, name=name):
                x = args[0].reshape(-1, args[0].shape[-1]).double()
                moments[name] = x.T @ x / tokens.numel()

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(tokens)
    return moments


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_streamed_moments_equal_those_of_the_whole_model(model_folders, caches, family):
    expected = moments_of_whole_model(model_folders[family])
    cache = read_cache(caches[family])
    assert cache.complete and {s.name for s in cache.sublayers} == set(expected)
    for index in range(cache.num_layers):
        tensors = cache.read_layer(index)
        sublayers = cache.sublayers_of(index)
        assert len({s.input_group for s in sublayers}) == 4  # q,k,v and gate,up share their input
        for s in sublayers:
            v = tensors[f"{s.input_group}.eigenvectors"].double()
            h = v @ torch.diag(tensors[f"{s.input_group}.eigenvalues"].double()) @ v.T
            torch.testing.assert_close(h, expected[s.name], rtol=1e-4, atol=1e-5 * expected[s.name].abs().max().item())


def test_spectra_and_leading_vectors_belong_to_the_weights(model_folders, caches):
    weights = load_file(model_folders["llama"] / "model.safetensors")
    cache = read_cache(caches["llama"])
    for s in cache.sublayers_of(2):
        tensors = cache.read_layer(2)
        _, sigma, vh = torch.linalg.svd(weights[f"{s.name}.weight"].double(), full_matrices=False)
        torch.testing.assert_close(tensors[f"{s.type}.singular_values"].double(), sigma, rtol=1e-5, atol=1e-5)
        overlap = (tensors[f"{s.type}.Vh"].double() @ vh[: len(tensors[f"{s.type}.Vh"])].T).abs()
        torch.testing.assert_close(overlap.diagonal(), torch.ones(len(overlap)).double(), rtol=1e-3, atol=1e-3)


def test_killed_run_resumes_to_the_same_bits_and_redoes_no_layer(tmp_path, tokenizer):
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4
    )
    model = build_model(config, tmp_path / "model", tokenizer, torch.bfloat16)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start("calibrate", *calibrate_arguments(model, whole)).wait(120) == 0
    process = start("calibrate", *calibrate_arguments(model, killed))
    folder = killed / "tiny_n6_s32_with_hessian"
    while not (folder / "layer_002.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(json.loads((folder / "manifest.json").read_text())["layers"])
    assert 0 < done < 8
    kept = {f: f.stat().st_mtime_ns for f in sorted(folder.glob("layer_*"))[:done]}

    assert start("calibrate", *calibrate_arguments(model, killed)).wait(120) == 0
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in kept.items())
    names = sorted(f.name for f in (whole / folder.name).iterdir())
    assert names == sorted(f.name for f in folder.iterdir() if not f.name.endswith(".tmp"))
    assert len(names) == 9  # a manifest and 8 layers: hidden states are gone
    for name in names:
        assert (folder / name).read_bytes() == (whole / folder.name / name).read_bytes(), name


def test_finished_cache_is_left_alone(model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    assert run("calibrate", *arguments).code == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "tiny_n6_s32_with_hessian").iterdir()}
    again = run("calibrate", *arguments)
    assert again.code == 0 and "nothing to do" in again.output
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "tiny_n6_s32_with_hessian").iterdir()}


def test_batch_size_changes_only_rounding(model_folders, caches, tmp_path):
    arguments = calibrate_arguments(model_folders["mistral"], tmp_path)
    assert run("calibrate", *arguments, "--batch_size", 1).code == 0
    one, four = read_cache(tmp_path / "tiny_n6_s32_with_hessian"), read_cache(caches["mistral"])
    for a, b in zip(one.read_spectra(), four.read_spectra(), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)
