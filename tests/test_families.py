"""Every family through the whole chain, on tiny random-weight models saved as several shards."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from conftest import (
    HEADS,
    IDS,
    SHARED,
    build_model,
    calibrate_arguments,
    expect_sentence,
    run,
    saved_tensors,
    short_text,
)
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

import hisvd
from hisvd.calibration_cache import read_cache
from hisvd.component.conv1d import linear_shape
from hisvd.component.families import adapter_for, separate_experts
from hisvd.component.low_rank import swap_linears
from hisvd.factor_forms import factor_tensors
from hisvd.neurons import stacked
from hisvd.utils.load_utils import read_pt
from hisvd.utils.model_utils import open_checkpoint
from hisvd.utils.streaming import decoder_layers

SHARED = SHARED | {"num_hidden_layers": 2}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OPT = {"vocab_size": 300, "hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TINY = {"initializer_range": 0.1}
FALCON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama3": LlamaConfig(
        **SHARED, **HEADS, **TINY, rope_parameters=ROPE | {"original_max_position_embeddings": 64}, attention_bias=True
    ),
    "qwen3": Qwen3Config(**SHARED, **HEADS, **TINY, head_dim=24, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SHARED, **HEADS, **TINY, head_dim=24, sliding_window=8),
    "gemma3_text": Gemma3TextConfig(**SHARED, **HEADS, **TINY, head_dim=24, sliding_window=8),
    "phi3": Phi3Config(**SHARED, **HEADS, **TINY, pad_token_id=0),
    # Learned positions: fewer than the tokens whose logits are computed at once.
    "opt": OPTConfig(**OPT, word_embed_proj_dim=64, init_std=0.1, max_position_embeddings=64),
    "opt-350m": OPTConfig(
        **OPT, word_embed_proj_dim=32, init_std=0.1, max_position_embeddings=128, do_layer_norm_before=False
    ),
    "mixtral": MixtralConfig(**SHARED, **HEADS, **TINY, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **SHARED, **HEADS, **TINY, **EXPERTS, shared_expert_intermediate_size=96, norm_topk_prob=True
    ),
    "qwen3_moe": Qwen3MoeConfig(**SHARED, **HEADS, **TINY, **EXPERTS, mlp_only_layers=[1]),
    "generic (stablelm)": StableLmConfig(**SHARED, **HEADS, **TINY),
    # Layers that return tuples, some with attention in parallel to the MLP, so that their linears share an input.
    "generic (falcon)": FalconConfig(**FALCON, **TINY),  # one key and value for all heads
    "generic (falcon), new": FalconConfig(**FALCON, **TINY, new_decoder_architecture=True, num_kv_heads=2),
    "generic (falcon), alibi": FalconConfig(
        **FALCON, **TINY, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "generic (bloom)": BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4, **TINY),
    "generic (mpt)": MptConfig(
        vocab_size=300, d_model=64, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64, **TINY
    ),
    "generic (gptj)": GPTJConfig(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_inner=160, rotary_dim=8, n_positions=64, **TINY
    ),
    "generic (gpt_neo)": GPTNeoConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
        **TINY,
    ),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, **TINY),
}


@pytest.fixture(scope="module")
def calibrated(tokenizer, tmp_path_factory):
    """calibrated(family) → (model folder of several shards, cache), made when first asked for."""

    @functools.cache
    def call(family):
        root = tmp_path_factory.mktemp("family")
        model = build_model(CONFIGS[family], root / "one", tokenizer)
        whole = AutoModelForCausalLM.from_pretrained(model)
        # GPT-2 is published as saved from its base model: names without "transformer."
        (whole.base_model if family == "gpt2" else whole).save_pretrained(root / "model", max_shard_size="100KB")
        tokenizer.save_pretrained(root / "model")
        assert len(list((root / "model").glob("*.safetensors"))) > 2
        assert run("calibrate", *calibrate_arguments(root / "model", root)).code == 0
        return root / "model", root / "tiny_n6_s32_with_hessian"

    return call


@pytest.fixture(scope="module", params=CONFIGS)
def chain(request, calibrated, tmp_path_factory):
    """(family, model folder of several shards, cache, folder compressed to 0.6)."""
    folder, cache = calibrated(request.param)
    out = tmp_path_factory.mktemp("compressed") / "out"
    compressed(folder, cache, out, "0.6")
    return request.param, folder, cache, out


def compressed(folder, cache, out, target, *options):
    """The report of compress.py."""
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", out]
    result = run("compress", *where, "--target_compression", target, *options)
    assert result.code == 0, result
    return json.loads((out / "hisvd.json").read_text() if out.is_dir() else read_pt(out)[0]["hisvd.json"])


def logits_of(path):
    with torch.no_grad():
        return hisvd.load(path)(IDS).logits


def test_the_familys_own_adapter_names_all_linears(chain):
    family, folder, cache, _ = chain
    model = AutoModelForCausalLM.from_pretrained(folder)
    separate_experts(model)
    adapter = adapter_for(model)
    assert adapter.family in family and bool(adapter.inputs) != family.startswith("generic")
    for index, layer in enumerate(decoder_layers(model, adapter)):
        two_dimensional = {name.removesuffix(".weight") for name, p in layer.named_parameters() if p.dim() == 2}
        routers = {name for name in two_dimensional if name.endswith((".gate", "_expert_gate"))}
        assert two_dimensional - routers == {s.path for s in read_cache(cache).sublayers_of(index)}


def test_budget_is_met_in_the_saved_file(chain):
    _, folder, cache, out = chain
    before = sum(s.size for s in read_cache(cache).sublayers)
    prefixes = tuple(
        f"{open_checkpoint(str(folder)).stored_name(s.name + '.weight')[:-6]}" for s in read_cache(cache).sublayers
    )
    after = sum(
        t.numel()
        for n, t in saved_tensors(out).items()
        if n.startswith(prefixes) and t.is_floating_point() and t.dim() == 2
    )
    assert 0.599 * before <= after <= 0.6 * before
    assert json.loads((out / "hisvd.json").read_text())["linear_numbers_after"] == after


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "mixtral", "generic (falcon)"])
def test_a_budget_of_bytes_is_met_in_the_file_and_the_model_loads(calibrated, tmp_path, family):
    folder, cache = calibrated(family)
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "out", "--update", "none"]
    assert run("compress", *where, "--target_bytes", 0.4).code == 0
    report = json.loads((tmp_path / "out" / "hisvd.json").read_text())
    names = [open_checkpoint(str(folder)).stored_name(row["name"] + ".weight")[:-6] for row in report["sublayers"]]
    stored = {n: t for n, t in saved_tensors(tmp_path / "out").items() if n.startswith(tuple(names))}
    size = sum(t.nbytes for n, t in stored.items() if not n.endswith("bias"))
    assert size == report["linear_bytes_after"] <= 0.4 * report["linear_bytes_before"]
    model = hisvd.load(tmp_path / "out")
    with torch.no_grad():
        logits, exact = model(IDS).logits, hisvd.load(folder)(IDS).logits
    assert (logits - exact).norm() < exact.norm()


def test_compressed_model_is_close_and_generates_with_cache(chain):
    _, folder, _, out = chain
    model, dense = hisvd.load(out), hisvd.load(folder)
    with torch.no_grad():
        difference = (model(IDS).logits - dense(IDS).logits).norm() / dense(IDS).logits.norm()
    assert 1e-5 < difference < 1  # rounding: 1e-7; unrelated logits: 1.4
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_perplexity_layer_by_layer_is_that_of_the_whole_model(chain, tmp_path):
    _, folder, _, out = chain
    where = ["--model_path", folder, "--model_path", out]
    options = [*where, "--datasets", short_text(), "--seqlen", 32, "--nsamples", 3]
    assert run("evaluate", *options, "--json", tmp_path / "whole.json").code == 0
    assert run("evaluate", *options, "--json", tmp_path / "a", "--offload_folder", tmp_path / "offload").code == 0
    assert not list((tmp_path / "offload").iterdir())
    for whole, streamed in zip(
        *(json.loads((tmp_path / name).read_text()) for name in ("whole.json", "a")), strict=True
    ):
        expected = whole["perplexity"].pop(short_text())
        assert streamed["perplexity"].pop(short_text()) == pytest.approx(expected, rel=1e-5)
        assert streamed == whole


@pytest.mark.parametrize("export", ["dense", "int6"])
def test_exports_load(chain, tmp_path, export):
    _, folder, cache, _ = chain
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "out"]
    options = ["--export", export, "--quality_gate_delta", "none", "--update", "none"]
    assert run("compress", *where, "--target_compression", "0.95", *options).code == 0
    model, dense = hisvd.load(tmp_path / "out"), hisvd.load(folder)
    with torch.no_grad():
        difference = (model(IDS).logits - dense(IDS).logits).norm() / dense(IDS).logits.norm()
    assert difference < (0.5 if export == "dense" else 1.5)


@pytest.mark.parametrize("form", ["pivoted", "svd"])
def test_full_rank_factors_reproduce_the_logits(chain, form):
    _, folder, cache, _ = chain
    model, checkpoint = hisvd.load(folder), open_checkpoint(str(folder))
    with torch.no_grad():
        before = model(IDS).logits
        separate_experts(model)
        for s in read_cache(cache).sublayers:
            stored = checkpoint.stored_name(f"{s.name}.weight")
            u, sigma, vh = torch.linalg.svd(checkpoint.read([stored])[stored].double(), full_matrices=False)
            has_bias = model.get_submodule(s.name).bias is not None
            swap_linears(model, {s.name: {"form": form, "rank": s.full_rank}})
            state = factor_tensors(u * sigma, vh, form, torch.float32)
            model.get_submodule(s.name).load_state_dict(state, strict=not has_bias)  # the swap kept the bias
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-3)


def narrow(chain):
    """The chain of a family whose MLPs' neurons can be removed."""
    if chain[0].startswith("generic"):
        pytest.skip("its MLPs are unknown")
    return chain


@pytest.mark.parametrize("chain", ["generic (stablelm)"], indirect=True)
def test_a_generic_family_has_low_rank_alone(chain, tmp_path):
    _, folder, cache, out = chain
    assert json.loads((out / "hisvd.json").read_text())["settings"]["moves"] == "low_rank"
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "out"]
    for options in (["--moves", "both"], ["--moves", "neurons"], ["--export", "plain"]):
        result = run("compress", *where, "--target_compression", "0.6", *options)
        expect_sentence(result, " ".join(options), "no adapter", "--moves low_rank")


def test_both_moves_take_part(chain):
    *_, out = narrow(chain)
    rows = json.loads((out / "hisvd.json").read_text())["sublayers"]
    assert any("stored_shape" in row for row in rows) and any(row["form"] != "dense" for row in rows)


def test_neurons_alone(chain, tmp_path):
    _, folder, cache, _ = narrow(chain)
    report = compressed(folder, cache, tmp_path / "out", "0.7", "--moves", "neurons")
    before, after = report["linear_numbers_before"], report["linear_numbers_after"]
    assert {row["form"] for row in report["sublayers"]} == {"dense"}
    # What is left holds no neuron more, wherever there is one to give back.
    price = max(sum(row["shape"]) for row in report["sublayers"]) * 3
    assert 0.7 * before - price <= after <= 0.7 * before + 1e-6
    names = {s.name for s in read_cache(cache).sublayers}
    stored = open_checkpoint(str(folder))
    weights = {stored.stored_name(f"{name}.weight") for name in names}
    assert sum(t.numel() for n, t in saved_tensors(tmp_path / "out").items() if n in weights) == after
    close(tmp_path / "out", folder)


def test_what_stays_of_an_mlp_are_rows_of_the_original(chain, tmp_path):
    """Those that the cache says, biases too; the output linear is fitted anew, and its bias takes up the means."""
    _, folder, path, _ = narrow(chain)
    compressed(folder, path, tmp_path / "out", "0.7", "--moves", "neurons", "--update", "none")
    small, whole, cache = hisvd.load(tmp_path / "out"), hisvd.load(folder), read_cache(path)
    separate_experts(whole)
    separate_experts(small)
    layers = zip(*(decoder_layers(model, adapter_for(model)) for model in (small, whole)), strict=True)
    narrower = 0
    for index, (new, old) in enumerate(layers):
        for mlp in cache.mlps_of(index):
            order = cache.read_layer(index)[f"{mlp.output}.removal_order"].long()
            new_output, old_output = (layer.get_submodule(mlp.output) for layer in (new, old))
            width = linear_shape(new_output)[1]
            rows = stacked(order[len(order) - width :].sort().values, len(order), mlp.fused)
            narrower += width < len(order)
            for linear in mlp.inputs:
                new_input, old_input = (layer.get_submodule(linear) for layer in (new, old))
                weights = [m.weight if isinstance(m, torch.nn.Linear) else m.weight.T for m in (new_input, old_input)]
                assert torch.equal(weights[0], weights[1][rows])
                assert old_input.bias is None or torch.equal(new_input.bias, old_input.bias[rows])
            if old_output.bias is not None:
                assert torch.equal(new_output.bias, old_output.bias) == (width == len(order))
    assert narrower


def close(path, original):
    """The logits of the model at `path` are those of from_pretrained, and not far from the original's."""
    logits, expected = logits_of(path), logits_of(original)
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(path)(IDS).logits, logits)
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 1.2


@pytest.mark.parametrize("moves", ["both", "neurons"])
def test_a_target_of_1_changes_nothing(chain, tmp_path, moves):
    _, folder, cache, _ = narrow(chain)
    compressed(folder, cache, tmp_path / "out", "1", "--moves", moves)
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(folder))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_pt_file_and_dense_weights_are_the_same_model(chain, tmp_path):
    _, folder, cache, out = narrow(chain)
    expected = logits_of(out)
    compressed(folder, cache, tmp_path / "out.pt", "0.6")
    own, stored = saved_tensors(out), saved_tensors(tmp_path / "out.pt")
    assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in own)
    torch.testing.assert_close(logits_of(tmp_path / "out.pt"), expected)
    compressed(folder, cache, tmp_path / "dense", "0.6", "--export", "dense")
    config, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "dense", folder))
    assert config == original
    difference = (logits_of(tmp_path / "dense") - expected).norm() / expected.norm()
    assert difference < 1e-4


# Fused linears, biases and Conv1D, experts.
@pytest.mark.parametrize(
    ("chain", "delta"), [("phi3", "none"), ("gpt2", "0.5"), ("qwen2_moe", "none")], indirect=["chain"]
)
def test_int6_of_a_narrow_model(chain, tmp_path, delta):
    _, folder, cache, _ = chain
    update = "sequential" if delta == "none" else "none"
    options = ["--export", "int6", "--quality_gate_delta", delta, "--update", update]
    report = compressed(folder, cache, tmp_path / "out", "0.8", *options)
    assert report["int6"]["weights"] > 0 and report["settings"]["moves"] == "both"
    model = hisvd.load(tmp_path / "out")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits
        )
    settings = hisvd.EvaluationSettings(seqlen=32, nsamples=2)
    by_layer = hisvd.EvaluationSettings(seqlen=32, nsamples=2, offload_folder=tmp_path / "offload")
    whole, streamed = (hisvd.evaluate(tmp_path / "out", ["python-docs"], s)["perplexity"] for s in (settings, by_layer))
    assert streamed["python-docs"]["nll"] == pytest.approx(whole["python-docs"]["nll"], rel=1e-5)


MIXED_WIDTHS = ("qwen2_moe", "qwen3_moe")  # a shared expert, or a layer without experts
WIDTH_KEYS = {"gpt2": "n_inner", "opt": "ffn_dim", "opt-350m": "ffn_dim"}


def test_a_stock_checkpoint(chain, tmp_path):
    family, folder, cache, _ = narrow(chain)
    options = ["--export", "plain", "--width_multiple", "8"]
    if family in MIXED_WIDTHS:
        where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "out"]
        expect_sentence(run("compress", *where, "--target_compression", "0.7", *options), "--export plain", "different")
        return
    report = compressed(folder, cache, tmp_path / "out", "0.7", *options)
    assert 0.6 < report["linear_kept"] <= 0.7
    config, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", folder))
    key = WIDTH_KEYS.get(family, "intermediate_size")
    assert config.pop(key) % 8 == 0
    original.pop(key)
    assert config == original and (tmp_path / "out" / "hisvd.json").exists()
    close(tmp_path / "out", folder)


LOADED_WITHOUT_HISVD = """
import sys
sys.modules["hisvd"] = None
import torch
from transformers import AutoModelForCausalLM
logits = []
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    ids = torch.arange(40).view(2, 20)
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (2, 24)
    with torch.no_grad():
        logits.append(model.eval()(ids).logits)
torch.save(logits, sys.argv[1])
"""


def test_stock_checkpoints_need_no_hisvd(calibrated, tmp_path):
    families = [f for f in CONFIGS if not f.startswith("generic") and f not in MIXED_WIDTHS]
    for family in families:
        options = ["--export", "plain", "--width_multiple", "8", "--update", "none"]
        compressed(*calibrated(family), tmp_path / family, "0.7", *options)
    folders = [str(tmp_path / family) for family in families]
    command = [sys.executable, "-c", LOADED_WITHOUT_HISVD, str(tmp_path / "logits"), *folders]
    subprocess.run(command, check=True, cwd=tmp_path)
    for folder, logits in zip(folders, torch.load(tmp_path / "logits"), strict=True):
        torch.testing.assert_close(logits, logits_of(folder))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", ("--moves", "both")),  # with biases, which take up the means of neurons
        ("phi3", ("--moves", "both")),  # with a linear that stands for two
        ("phi3", ("--moves", "low_rank", "--factors", "svd")),
    ],
)
def test_several_targets_in_one_run_give_the_files_of_a_run_for_each(calibrated, tmp_path, family, options):
    """In 16 bits, to which the factors of all targets are rounded together."""
    folder, cache = calibrated(family)
    options = [*options, "--update", "none", "--linear_dtype", "bf16"]
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "several"]
    assert run("compress", *where, "--target_compression", "0.8,0.5", *options).code == 0
    for target, name in (("0.8", "several_80p"), ("0.5", "several_50p")):
        compressed(folder, cache, tmp_path / target, target, *options)
        alone, together = saved_tensors(tmp_path / target), saved_tensors(tmp_path / name)
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[key], together[key]) for key in alone)
