"""--refine: its gradients against autograd through the whole model, what it changes, and its resumption."""

import json
import sys

import pytest
import torch
from conftest import HEADS, IDS, SHARED, build_model, calibrate_arguments, expect_sentence, run, saved_tensors
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPT2Config, LlamaConfig, OPTConfig

import hisvd
from hisvd import tuning, tuning_text
from hisvd.calibration_cache import CalibrationCache, read_cache
from hisvd.component.conv1d import conv1d_weights
from hisvd.component.families import adapter_for
from hisvd.layer_tensors import norm_gains
from hisvd.tuning import DECAY, Tuning, adafactor_step, divergence_gradient, rounded_at_random, zero_squares
from hisvd.tuning_text import TuningText
from hisvd.utils.save_utils import ModelWriter
from hisvd.utils.streaming import decoder_layers

ONE_SHOT = ("--update", "none")
STEPS = 3
READ_HELD_OUT = CalibrationCache.read_held_out
REFINEMENTS = ("norms", "weights")
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
def small_steps(monkeypatch):
    """Steps of two of the six sequences, small ones, judged by the text itself: nothing holds on other text here.

    Passes are in float32 on every CPU.
    """
    monkeypatch.setattr(tuning_text, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(tuning_text, "TOKENS_PER_STEP", 32)
    monkeypatch.setattr(tuning_text, "MAX_STEPS", STEPS)
    monkeypatch.setattr(tuning, "GAIN_RATE", dict.fromkeys(REFINEMENTS, 1e-3))
    monkeypatch.setattr(CalibrationCache, "read_held_out", CalibrationCache.read_tokens)


def divergence(model, original, tokens):
    """The mean KL divergence per token of the model's predictions from the original's."""
    p, q = (m(tokens).logits.log_softmax(-1) for m in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean()


def trained_parts(model, refine):
    """The gains and, with `refine` weights, the weights of the linears inside the layers of `model`, by name."""
    adapter = adapter_for(model)
    parts = {}
    for i, layer in enumerate(decoder_layers(model, adapter)):
        norms = norm_gains(layer)
        every = {name: p for name, p in layer.named_parameters() if name.removesuffix("bias") + "weight" not in norms}
        parts |= {
            f"{adapter.layers}.{i}.{name}": p for name, p in (norms | (every if refine == "weights" else {})).items()
        }
    return parts


def test_the_gradient_at_the_top_is_that_of_the_divergence():
    torch.manual_seed(0)
    head = torch.randn(7, 5)
    states, wanted = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5)
    p, q = ((x @ head.T).log_softmax(-1) for x in (wanted, states))
    expected = (p.exp() * (p - q)).sum(-1)
    divergences, gradient = divergence_gradient(lambda x: x @ head.T, states.detach(), wanted, at_once=4)
    torch.testing.assert_close(divergences, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), states)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_gradients_are_divided_by_their_usual_size(shape):
    # Squares that are an outer product, as those of a matrix of rank 1 are, are known exactly from their means.
    torch.manual_seed(0)
    usual = torch.rand(4, 1) * torch.rand(1, 3) if len(shape) == 2 else torch.rand(5)
    value, squares, moved = torch.zeros(shape), zero_squares(torch.zeros(shape)), torch.zeros(shape)
    for step in range(6):
        signs = torch.randn(shape).sign()
        adafactor_step(value, signs * usual, squares, step, torch.tensor(1e-2))
        moved -= 1e-2 * signs
        torch.testing.assert_close(value, moved)


def test_running_means_forget():
    value, squares = torch.zeros(1), zero_squares(torch.zeros(1))
    for step, gradient in enumerate([2.0, 1.0]):
        adafactor_step(value, torch.tensor([gradient]), squares, step, torch.tensor(1.0))
    second = (DECAY * 4 + 1) / (1 + DECAY)  # weights that sum to 1
    assert value.item() == pytest.approx(-1 - 1 / second**0.5)


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_what_has_no_gradient_stays(shape):
    value, zeros = torch.ones(shape), torch.zeros(shape)
    adafactor_step(value, zeros, zero_squares(zeros), 0, torch.tensor(1.0))
    assert torch.equal(value, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_goes_to_a_neighbour_and_is_right_on_average(dtype):
    torch.manual_seed(0)
    values, generator = torch.randn(50) * 10.0 ** torch.randint(-3, 3, (50,)), torch.Generator().manual_seed(0)
    found = torch.stack([rounded_at_random(values, dtype, generator).double() for _ in range(4000)])
    nearest, gap = values.to(dtype).double(), values.abs().double() * torch.finfo(dtype).eps
    assert ((found - values).abs() <= gap).all() and (found != nearest).any()
    assert ((found.mean(0) - values).abs() < 0.05 * gap).all()
    exact = torch.cat([values, torch.zeros(3)]).to(dtype)
    assert torch.equal(rounded_at_random(exact.float(), dtype, generator), exact)
    assert torch.equal(rounded_at_random(values, torch.float32, generator), values)


@pytest.fixture(params=CONFIGS)
def sharp(request, tokenizer, tmp_path):
    """(model folder, cache) of a model whose predictions are far from uniform."""
    model = build_model(CONFIGS[request.param], tmp_path / "model", tokenizer)
    assert run("calibrate", *calibrate_arguments(model, tmp_path)).code == 0
    return model, tmp_path / "tiny_n6_s32_with_hessian"


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_what_is_named_changes_and_predictions_come_nearer(sharp, tmp_path, monkeypatch, refine):
    (folder, cache), seen, change, read = sharp, {}, Tuning._change, []

    def watched(self, index, shard, state, gradients, gains):
        seen.setdefault(self.done, {}).update({name: g.clone() for name, g in gradients.items()})
        change(self, index, shard, state, gradients, gains)
        read[:] = self.text.texts["tokens"]

    monkeypatch.setattr(Tuning, "_change", watched)
    plain, tuned = (
        hisvd.compress(folder, cache, tmp_path / name, 0.3, hisvd.CompressionSettings(update="none", refine=name))[0]
        for name in ("none", refine)
    )
    before, after = saved_tensors(plain.path), saved_tensors(tuned.path)
    gradients = seen[0]
    assert before.keys() == after.keys() and seen.keys() == set(range(STEPS))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(gradients)
    tokens, steps = read_cache(cache).read_tokens(), torch.stack(read)
    assert sorted(tokens.tolist()) == sorted(steps.tolist()) and not torch.equal(tokens, steps)
    original, model = hisvd.load(folder), hisvd.load(plain.path)
    parts = trained_parts(model, refine)
    for part in parts.values():
        part.requires_grad_()
    expected = dict(
        zip(parts, torch.autograd.grad(divergence(model, original, steps[:2]), list(parts.values())), strict=True)
    )
    turned = conv1d_weights(model)
    assert len(expected) == len(gradients)
    for name, gradient in expected.items():
        stored = next(stored for stored in gradients if name.endswith(stored))  # GPT-2's lack "transformer."
        wanted = gradient.T if name in turned else gradient
        found = gradients[stored]
        if not torch.equal(parts[name].T if name in turned else parts[name], before[stored]):  # rows in another order
            found, wanted = found.flatten().sort().values, wanted.flatten().sort().values
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item() + 1e-9)
    report = tuned.report["tuning"]
    with torch.no_grad():
        figures = [divergence(hisvd.load(m.path), original, tokens).item() for m in (plain, tuned)]
        first = divergence(model, original, steps[:2])
    assert [report["divergence_before"], report["divergence_after"]] == pytest.approx(figures, rel=1e-3)
    assert figures[1] < figures[0] and len(report["divergences"]) == STEPS
    assert report["divergences"][0] == pytest.approx(first.item(), rel=1e-4)


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_a_run_that_is_stopped_resumes_at_its_step(chain, monkeypatch, refine):
    options = (*ONE_SHOT, "--refine", refine)
    whole = saved_tensors(chain("llama", "0.8,0.5", "whole", *options).with_name("whole_50p"))
    change, calls = Tuning._change, []

    def stopping(self, index, *arguments):
        change(self, index, *arguments)  # stopped when some layers are changed and others are not
        calls.append((self.target, self.done))
        if calls[-1] == (0.5, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(Tuning, "_change", stopping)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        chain("llama", "0.8,0.5", "stopped", *options)
    monkeypatch.setattr(Tuning, "_change", lambda self, *arguments: calls.append(self.done) or change(self, *arguments))
    calls.clear()
    out = chain("llama", "0.8,0.5", "stopped", *options).with_name("stopped_50p")
    assert list(dict.fromkeys(calls)) == list(range(1, STEPS))
    assert all(torch.equal(t, whole[name]) for name, t in saved_tensors(out).items())
    assert not out.with_name("stopped_50p.partial").exists()


@pytest.mark.parametrize(
    ("refine", "options"),
    [
        ("norms", ("--export", "dense")),
        ("norms", ("--linear_dtype", "int8")),
        *((refine, ("--export", "plain", "--width_multiple", "8")) for refine in REFINEMENTS),
        *((refine, ("--export", "int6", "--quality_gate_delta", "0.5")) for refine in REFINEMENTS),
    ],
)
def test_every_export_may_be_refined(chain, monkeypatch, refine, options):
    monkeypatch.setattr(tuning, "GAIN_RATE", dict.fromkeys(REFINEMENTS, 0.5))  # there is next to nothing to gain
    out = chain("llama", "0.8", "out", *ONE_SHOT, *options, "--refine", refine)
    report = json.loads((out / "hisvd.json").read_text())
    figures = report["tuning"]
    assert figures["divergence_after"] < figures["divergence_before"] and report["settings"]["refine"] == refine
    with torch.no_grad():
        assert torch.isfinite(hisvd.load(out)(IDS).logits).all()


def test_the_original_reads_the_text_once_for_all_targets(chain, monkeypatch):
    read, names = TuningText._read_by_original, []
    monkeypatch.setattr(
        TuningText, "_read_by_original", lambda self, name, tokens: names.append(name) or read(self, name, tokens)
    )
    chain("llama", "0.8,0.5", "out", *ONE_SHOT, "--refine", "weights")
    assert names == ["tokens", "held_out"]


def test_weights_that_are_no_longer_plain_are_not_trained():
    for options in ({"linear_dtype": "int8"}, {"budget": "bytes"}, {"export": "dense"}):
        with pytest.raises(hisvd.HiSVDError, match="use --refine norms"):
            hisvd.CompressionSettings(refine="weights", **options)
    with pytest.raises(hisvd.HiSVDError, match="use --refine norms"):
        hisvd.CompressionSettings(refine="weights", export="int6", quality_gate_delta=None)


def test_figures_are_those_of_the_rounded_weights(chain, caches, model_folders):
    out = chain("llama", "0.4", "out", *ONE_SHOT, "--linear_dtype", "bf16", "--refine", "weights")
    assert {t.dtype for t in saved_tensors(out).values()} >= {torch.bfloat16, torch.float32}
    tokens, figures = read_cache(caches["llama"]).read_tokens(), json.loads((out / "hisvd.json").read_text())["tuning"]
    with torch.no_grad():
        after = divergence(hisvd.load(out).float(), hisvd.load(model_folders["llama"]), tokens).item()
    assert figures["kept"] and figures["divergence_after"] == pytest.approx(after, rel=1e-2)


@pytest.mark.parametrize("sharp", ["llama"], indirect=True)
def test_passes_are_in_bfloat16_where_that_is_fast(sharp, tmp_path, monkeypatch):
    (folder, cache), run_layer, seen = sharp, tuning.run_layer, set()
    monkeypatch.setattr(tuning_text, "multiplies_bfloat16", lambda device: True)
    assert tuning_text.pass_dtype(torch.float16, torch.device("cpu")) == torch.float16

    def watched(layer, hidden, arguments):
        seen.update({hidden.dtype, *(p.dtype for p in layer.parameters())})
        return run_layer(layer, hidden, arguments)

    monkeypatch.setattr(tuning, "run_layer", watched)
    settings = hisvd.CompressionSettings(update="none", refine="weights")
    (tuned,) = hisvd.compress(folder, cache, tmp_path / "out", 0.3, settings)
    assert seen == {torch.bfloat16} and {t.dtype for t in saved_tensors(tuned.path).values()} >= {torch.float32}
    with torch.no_grad():
        after = divergence(hisvd.load(tuned.path), hisvd.load(folder), read_cache(cache).read_tokens()).item()
    figures = tuned.report["tuning"]
    assert figures["kept"] and figures["divergence_after"] == pytest.approx(after, rel=5e-2)


def test_a_run_that_is_killed_among_its_codes_resumes(chain, monkeypatch):
    options = (*ONE_SHOT, "--export", "int6", "--quality_gate_delta", "0.5", "--refine", "weights")
    complete = ModelWriter.complete
    monkeypatch.setattr(ModelWriter, "complete", lambda *arguments: sys.exit(1))
    with pytest.raises(AssertionError):
        chain("llama", "0.8", "out", *options)
    monkeypatch.setattr(ModelWriter, "complete", complete)
    report = json.loads((chain("llama", "0.8", "out", *options) / "hisvd.json").read_text())
    assert report["tuning"]["kept"] and report["quality_gate"]


def damage_figures(work):
    (work / "tuning.json").write_text('{"steps": 3, "divergences": 3, "written": false}')
    return "tuning.json"


def damage_length(work):
    path = work / "tuned_1_0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return path.name


def damage_names(work):
    save_file({"value.foreign": torch.ones(3)}, work / "tuned_1_2.safetensors")
    return "tuned_1_2.safetensors"


def damage_shape(work):
    path = work / "tuned_1_1.safetensors"
    state = load_file(path)
    state[next(iter(state))] = torch.ones(3)
    save_file(state, path)
    return path.name


@pytest.mark.parametrize("damage", [damage_figures, damage_length, damage_names, damage_shape])
def test_damaged_working_files_are_named(model_folders, caches, tmp_path, monkeypatch, damage):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"]
    arguments = [*where, "--target_compression", "0.5", *ONE_SHOT, "--refine", "weights"]
    change = Tuning._change
    monkeypatch.setattr(Tuning, "_change", lambda self, *a: sys.exit(1) if self.done else change(self, *a))
    assert run("compress", *arguments).code == 1
    monkeypatch.setattr(Tuning, "_change", change)
    name = damage(tmp_path / "out.partial" / "work")
    expect_sentence(run("compress", *arguments), name)


def test_a_target_of_1_is_not_refined(chain, model_folders):
    out = chain("llama", "1", "out", *ONE_SHOT, "--refine", "norms")
    assert "tuning" not in json.loads((out / "hisvd.json").read_text())
    original = saved_tensors(model_folders["llama"])
    assert all(torch.equal(t, original[name]) for name, t in saved_tensors(out).items())


def test_what_does_not_help_on_held_out_text_is_left_out(chain, caches, model_folders, monkeypatch):
    monkeypatch.setattr(CalibrationCache, "read_held_out", READ_HELD_OUT)
    monkeypatch.setattr(tuning, "GAIN_RATE", {"norms": 10.0})
    out, plain = (chain("llama", "0.4", name, *ONE_SHOT, "--refine", name) for name in ("norms", "none"))
    figures = json.loads((out / "hisvd.json").read_text())["tuning"]
    held_out = read_cache(caches["llama"]).read_held_out()
    with torch.no_grad():
        before = divergence(hisvd.load(plain), hisvd.load(model_folders["llama"]), held_out).item()
    assert figures["divergence_before"] == pytest.approx(before, rel=1e-2)
    assert figures["divergence_after"] > figures["divergence_before"] and not figures["kept"]
    assert all(torch.equal(t, saved_tensors(plain)[name]) for name, t in saved_tensors(out).items())


def test_figures_are_printed(model_folders, caches, tmp_path):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"]
    result = run("compress", *where, "--target_compression", "0.6", *ONE_SHOT, "--refine", "norms")
    figures = json.loads((tmp_path / "out" / "hisvd.json").read_text())["tuning"]
    assert result.code == 0 and f"→ {figures['divergence_after']:.4f} nats per token" in result.output
