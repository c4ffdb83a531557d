"""The streaming engine and the cache: right moments, resume, checksums."""

import json
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, build_model, calibrate_arguments, run, short_text
from processes import Started
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hisvd
from hisvd.cached_moments import input_moment, unpacked
from hisvd.calibration_cache import SPECTRA, read_cache
from hisvd.component.adapter import Adapter
from hisvd.errors import HiSVDError
from hisvd.gradient_pass import DRAWN, loss_gradient, sample_labels
from hisvd.input_moments import InputMoments
from hisvd.utils.data_utils import CALIBRATION_SPLIT, calibration_windows, load_text, split_held_out, tokenize


def calibration_tokens(folder):
    """What calibrate_arguments makes calibrate.py read."""
    ids = tokenize(load_text(short_text(), CALIBRATION_SPLIT), AutoTokenizer.from_pretrained(folder))
    ids, _ = split_held_out(ids, 6, 32, "random")
    return calibration_windows(ids, 6, 32, "random", 3, "the short text")


def moments_of_whole_model(folder):
    """E[x xᵀ] of every linear, from hooks on the ordinary model: sublayer name → (n, n)."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = calibration_tokens(folder)
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
            h = input_moment(s, tensors, torch.device("cpu"))
            torch.testing.assert_close(h, expected[s.name], rtol=1e-4, atol=1e-5 * expected[s.name].abs().max().item())


def gradient_moments_of(model, tokens):
    """E[g gᵀ] of every linear's output, by autograd through the whole model: sublayer name → (m, m)."""
    outputs = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, y))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    draws = torch.rand(6, 31, DRAWN + 1, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    at_logits = loss_gradient(logits.detach(), tokens[:, 1:].flatten(), draws)
    gradients = torch.autograd.grad(logits, list(outputs.values()), at_logits)
    rows = {name: g.reshape(-1, g.shape[-1]).double() for name, g in zip(outputs, gradients, strict=True)}
    return {name: g.T @ g / tokens.numel() for name, g in rows.items()}


def gradient_moments_stored(cache, sublayer):
    """F (m, m) of a sublayer in a cache."""
    tensors = cache.read_layer(sublayer.layer)
    return unpacked(tensors[f"{sublayer.path}.F"]).double()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_streamed_gradient_moments_equal_autograds(model_folders, caches, family):
    folder, cache = model_folders[family], read_cache(caches[family])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = gradient_moments_of(model, calibration_tokens(folder))
    for s in cache.sublayers:
        scale = expected[s.name].abs().max().item()
        torch.testing.assert_close(gradient_moments_stored(cache, s), expected[s.name], rtol=1e-5, atol=1e-5 * scale)


def test_gradients_at_logits_have_the_mean_of_both_fisher_matrices_as_second_moment():
    count = 20_000
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0]).double().repeat(count, 1)
    draws = torch.rand(count, DRAWN + 1, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 2
    gradients = loss_gradient(logits, labels, draws)
    p = logits[0].softmax(-1)
    text = p - torch.nn.functional.one_hot(labels, 4)
    expected = (text.T @ text / count + p.diag() - p.outer(p)) / 2
    torch.testing.assert_close(gradients.T @ gradients / count, expected, rtol=0, atol=0.01)
    assert not gradients[:, 2].any()


def test_labels_are_drawn_as_often_as_the_model_predicts_them():
    p = torch.tensor([2.0, 0.0, -torch.inf, 1.0]).softmax(-1).repeat(1000, 1)
    drawn = sample_labels(p, torch.rand(1000, generator=torch.Generator().manual_seed(1)))
    counts = torch.nn.functional.one_hot(drawn, 4).sum(1)
    assert (counts - DRAWN * p).abs().max() <= 1  # spread evenly for every single token
    torch.testing.assert_close(counts.double().mean(0) / DRAWN, p[0].double(), rtol=0, atol=2e-3)
    ends = sample_labels(p[:2], torch.tensor([0.0, 1 - 2**-24]))
    assert ends[0, 0] == 0 and ends[1, -1] == 3


def test_without_gradients_the_cache_holds_only_the_forward_pass(model_folders, caches, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    assert run("calibrate", *arguments, "--no_gradients").code == 0
    forward = tmp_path / "tiny_n6_s32_with_hessian"
    assert sorted(f.name for f in forward.iterdir()) == [
        *(f"layer_{i:03d}.safetensors" for i in range(4)),
        "manifest.json",
        "tokens.safetensors",
    ]
    for i in range(4):
        assert (forward / f"layer_{i:03d}.safetensors").read_bytes() == (
            caches["llama"] / f"layer_{i:03d}.safetensors"
        ).read_bytes()


def test_spectra_and_leading_vectors_belong_to_the_weights(model_folders, caches):
    weights = load_file(model_folders["llama"] / "model.safetensors")
    cache = read_cache(caches["llama"])
    for s in cache.sublayers_of(2):
        tensors = cache.read_layer(2)
        _, sigma, vh = torch.linalg.svd(weights[f"{s.name}.weight"].double(), full_matrices=False)
        torch.testing.assert_close(tensors[f"{s.path}.singular_values"].double(), sigma, rtol=1e-5, atol=1e-5)
        overlap = (tensors[f"{s.path}.Vh"].double() @ vh[: len(tensors[f"{s.path}.Vh"])].T).abs()
        torch.testing.assert_close(overlap.diagonal(), torch.ones(len(overlap)).double(), rtol=1e-3, atol=1e-3)


class ThreeReaders(torch.nn.Module):
    """q and k receive one tensor, v a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(5, size) for size in (3, 4, 2))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x.clone())


def test_linears_share_a_moment_if_they_receive_the_very_same_tensor():
    layer, x = ThreeReaders(), torch.randn(2, 7, 5)
    moments = InputMoments(layer, "layer 0", Adapter("generic", "layers", {}))
    for _ in range(2):
        layer(x)
        moments.add_batch()
    moments.finish()
    assert moments.groups == {"q": ["q", "k"], "v": ["v"]}
    rows = x.flatten(0, 1).double()
    for name, moment in moments.moments.items():
        torch.testing.assert_close(moment / moments.tokens[name], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [{"in": ("q", "k", "v")}, {"in": ("q",), "other": ("k", "v")}])
def test_an_adapter_that_groups_by_name_what_receives_other_tensors_is_refused(inputs):
    layer = ThreeReaders()
    moments = InputMoments(layer, "layer 0", Adapter("family", "layers", inputs))
    layer(torch.randn(2, 7, 5))
    with pytest.raises(HiSVDError, match=r"layer 0 .*\['q', 'k'\].* unlike in the 'family' adapter"):
        moments.add_batch()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tokenizer):
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4
    )
    root = tmp_path_factory.mktemp("whole")
    model = build_model(config, root / "model", tokenizer, torch.bfloat16)
    assert Started(ROOT / "calibrate.py", *calibrate_arguments(model, root)).wait(120) == 0
    return model, root / "tiny_n6_s32_with_hessian"


@pytest.mark.parametrize("kill_after", ["layer_002.safetensors", "gradients_005.safetensors"])
def test_killed_run_resumes_to_the_same_bits_and_redoes_no_layer(whole_run, tmp_path, kill_after):
    model, whole = whole_run
    process = Started(ROOT / "calibrate.py", *calibrate_arguments(model, tmp_path))
    folder = tmp_path / whole.name
    while not (folder / kill_after).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    manifest = json.loads((folder / "manifest.json").read_text())
    done = [entry["file"] for entry in manifest["layers"] + manifest["gradients"]]
    assert 0 < len(done) < 16
    kept = {file: (folder / file).stat().st_mtime_ns for file in done}

    assert Started(ROOT / "calibrate.py", *calibrate_arguments(model, tmp_path)).wait(120) == 0
    assert all((folder / file).stat().st_mtime_ns == stamp for file, stamp in kept.items())
    names = sorted(f.name for f in whole.iterdir())
    assert names == sorted(f.name for f in folder.iterdir() if not f.name.endswith(".tmp"))
    assert len(names) == 18  # a manifest, tokens, 8 layers, 8 gradients: hidden states are deleted
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_finished_cache_is_left_alone(model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    assert run("calibrate", *arguments).code == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "tiny_n6_s32_with_hessian").iterdir()}
    again = run("calibrate", *arguments)
    assert again.code == 0 and "nothing to do" in again.output
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "tiny_n6_s32_with_hessian").iterdir()}


def test_the_function_fills_the_same_cache_and_prints_nothing(model_folders, caches, tmp_path, capfd):
    settings = hisvd.CalibrationSettings(nsamples=6, seqlen=32, dataset=short_text(), batch_size=4)
    quiet = hisvd.Resources(progress=False)
    for _ in range(2):  # the second time it is finished already
        cache = hisvd.calibrate(model_folders["llama"], tmp_path / "any name", settings, quiet)
        assert cache.complete and cache.folder == tmp_path / "any name"
    output, error = capfd.readouterr()
    assert output == "" and "layers" not in error
    assert sorted(f.name for f in cache.folder.iterdir()) == sorted(f.name for f in caches["llama"].iterdir())
    for file in caches["llama"].iterdir():
        assert (cache.folder / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(HiSVDError, match=r"made with another text \(\S+, fingerprint \w{12}, now"):
        hisvd.calibrate(model_folders["llama"], cache.folder, replace(settings, seqlen=16), quiet)


def test_batch_size_changes_only_rounding(model_folders, caches, tmp_path):
    arguments = calibrate_arguments(model_folders["mistral"], tmp_path)
    assert run("calibrate", *arguments, "--batch_size", 1).code == 0
    one, four = read_cache(tmp_path / "tiny_n6_s32_with_hessian"), read_cache(caches["mistral"])
    for index in range(one.num_layers):
        a, b = one.read_small(index, SPECTRA), four.read_small(index, SPECTRA)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
