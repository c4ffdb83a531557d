"""--refine norms: its gradients against autograd through the whole model, what it changes, and its resumption."""

import json

import pytest
import torch
from conftest import HEADS, IDS, SHARED, build_model, calibrate_arguments, run, saved_tensors
from transformers import Gemma2Config, GPT2Config, LlamaConfig, OPTConfig

import hisvd
from hisvd import norm_tuning
from hisvd.calibration_cache import read_cache
from hisvd.component.families import adapter_for
from hisvd.layer_tensors import norm_gains
from hisvd.norm_tuning import adam_step, divergence_gradient
from hisvd.utils.streaming import decoder_layers

ONE_SHOT = ("--update", "none")
STEPS = 6
SIZES = SHARED | HEADS | {"num_hidden_layers": 2, "initializer_range": 0.1}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=24),  # norms multiply by 1 + weight, and follow o and down too
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1),
    "opt": OPTConfig(
        vocab_size=300,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.1,
    ),
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(norm_tuning, "STEPS", STEPS)


def divergence(model, original, tokens):
    """The mean KL divergence per token of the model's predictions from the original's."""
    p, q = (m(tokens).logits.log_softmax(-1) for m in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean()


def gains_of(model):
    adapter = adapter_for(model)
    layers = enumerate(decoder_layers(model, adapter))
    return {f"{adapter.layers}.{i}.{name}": gain for i, layer in layers for name, gain in norm_gains(layer).items()}


def test_the_gradient_at_the_top_is_that_of_the_divergence():
    torch.manual_seed(0)
    head = torch.randn(7, 5)
    states, wanted = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5)
    p, q = ((x @ head.T).log_softmax(-1) for x in (wanted, states))
    expected = (p.exp() * (p - q)).sum(-1)
    divergences, gradient = divergence_gradient(lambda x: x @ head.T, states.detach(), wanted, at_once=4)
    torch.testing.assert_close(divergences, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), states)[0], rtol=1e-4, atol=1e-5)


def test_a_step_goes_against_the_gradient_by_a_fraction_of_every_gain():
    scale = torch.tensor([2.0, 0.5, 0.0])
    state = {"step": torch.zeros((), dtype=torch.long), "divergences": torch.zeros(STEPS + 1, dtype=torch.float64)}
    state |= {"gain.a": scale.clone(), "scale.a": scale, "mean.a": torch.zeros(3), "square.a": torch.zeros(3)}
    adam_step(state, {"a": torch.tensor([3.0, -1e-6, 1.0])}, 0.25)
    torch.testing.assert_close(state["gain.a"], scale * torch.tensor([1 - norm_tuning.RATE, 1 + norm_tuning.RATE, 1]))
    assert int(state["step"]) == 1 and state["divergences"][0] == 0.25


@pytest.fixture(params=CONFIGS)
def sharp(request, tokenizer, tmp_path):
    """(model folder, cache) of a model whose predictions are far from uniform."""
    model = build_model(CONFIGS[request.param], tmp_path / "model", tokenizer)
    assert run("calibrate", *calibrate_arguments(model, tmp_path)).code == 0
    return model, tmp_path / "tiny_n6_s32_with_hessian"


def test_gains_alone_change_and_predictions_come_nearer(sharp, tmp_path, monkeypatch):
    (folder, cache), seen, step = sharp, [], norm_tuning.adam_step

    def watched(state, gradients, figure):
        seen.append((gradients, figure))
        step(state, gradients, figure)

    monkeypatch.setattr(norm_tuning, "adam_step", watched)
    monkeypatch.setattr(norm_tuning, "RATE", 1e-3)  # these models diverge little
    plain, tuned = (
        hisvd.compress(folder, cache, tmp_path / name, 0.3, hisvd.CompressionSettings(update="none", refine=name))[0]
        for name in ("none", "norms")
    )
    before, after = saved_tensors(plain.path), saved_tensors(tuned.path)
    gradients, figure = seen[0]
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(gradients)
    tokens = read_cache(cache).read_tokens()
    original, model = hisvd.load(folder), hisvd.load(plain.path)
    gains = gains_of(model)
    for gain in gains.values():
        gain.requires_grad_()
    loss = divergence(model, original, tokens)
    expected = dict(zip(gains, torch.autograd.grad(loss, list(gains.values())), strict=True))
    assert figure == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in expected.items():
        stored = next(stored for stored in gradients if name.endswith(stored))  # GPT-2's lack "transformer."
        torch.testing.assert_close(gradients[stored], gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item())
    with torch.no_grad():
        final = divergence(hisvd.load(tuned.path), original, tokens)
    report = tuned.report["norm_tuning"]
    assert report["divergence_before"] == figure and len(seen) == STEPS and final < loss
    assert report["divergence_after"] == pytest.approx(final.item(), rel=1e-3)
    assert report["divergences"][:-1] == [figure for _, figure in seen]


def test_a_run_that_is_stopped_resumes_at_its_step(chain, monkeypatch):
    options = (*ONE_SHOT, "--refine", "norms")
    whole = saved_tensors(chain("llama", "0.8,0.5", "whole", *options).with_name("whole_50p"))
    step, calls = norm_tuning.adam_step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == STEPS + 4:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(norm_tuning, "adam_step", stopping)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        chain("llama", "0.8,0.5", "stopped", *options)
    calls.clear()
    out = chain("llama", "0.8,0.5", "stopped", *options).with_name("stopped_50p")
    assert len(calls) == STEPS - 3
    assert all(torch.equal(t, whole[name]) for name, t in saved_tensors(out).items())
    assert not out.with_name("stopped_50p.partial").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--export", "plain", "--width_multiple", "8"),
        ("--export", "dense"),
        ("--export", "int6", "--quality_gate_delta", "0.5"),
        ("--linear_dtype", "int8"),
    ],
)
def test_every_export_may_be_refined(chain, options):
    out = chain("llama", "0.8", "out", *ONE_SHOT, *options, "--refine", "norms")
    report = json.loads((out / "hisvd.json").read_text())
    figures = report["norm_tuning"]
    assert figures["divergence_after"] < figures["divergence_before"] and report["settings"]["refine"] == "norms"
    with torch.no_grad():
        assert torch.isfinite(hisvd.load(out)(IDS).logits).all()


def test_a_target_of_1_is_not_refined(chain, model_folders):
    out = chain("llama", "1", "out", *ONE_SHOT, "--refine", "norms")
    assert "norm_tuning" not in json.loads((out / "hisvd.json").read_text())
    original = saved_tensors(model_folders["llama"])
    assert all(torch.equal(t, original[name]) for name, t in saved_tensors(out).items())


def test_gains_that_do_not_help_are_left_out(chain, monkeypatch):
    monkeypatch.setattr(norm_tuning, "RATE", 10.0)
    out, plain = (chain("llama", "0.8", name, *ONE_SHOT, "--refine", name) for name in ("norms", "none"))
    figures = json.loads((out / "hisvd.json").read_text())["norm_tuning"]
    assert figures["divergences"][-1] > figures["divergence_before"] == figures["divergence_after"]
    assert all(torch.equal(t, saved_tensors(plain)[name]) for name, t in saved_tensors(out).items())


def test_figures_are_printed(model_folders, caches, tmp_path):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"]
    result = run("compress", *where, "--target_compression", "0.6", *ONE_SHOT, "--refine", "norms")
    figures = json.loads((tmp_path / "out" / "hisvd.json").read_text())["norm_tuning"]
    assert result.code == 0 and f"→ {figures['divergence_after']:.4f} nats per token" in result.output
