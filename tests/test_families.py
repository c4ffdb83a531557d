"""Every family through the whole chain, on tiny random-weight models saved as several shards."""

import json

import pytest
import torch
from conftest import HEADS, IDS, SHARED, build_model, calibrate_arguments, run, saved_tensors
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
from hisvd.component.families import adapter_for, separate_experts
from hisvd.component.low_rank import swap_linears
from hisvd.factor_forms import factor_tensors
from hisvd.utils.model_utils import open_checkpoint
from hisvd.utils.streaming import decoder_layers

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
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4, n_positions=64, **TINY),
}


@pytest.fixture(scope="module", params=CONFIGS)
def chain(request, tokenizer, tmp_path_factory):
    """(family, model folder of several shards, cache, folder compressed to 0.6)."""
    root = tmp_path_factory.mktemp("family")
    model = build_model(CONFIGS[request.param], root / "one", tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(model)
    # GPT-2 is published as saved from its base model: names without "transformer."
    (whole.base_model if request.param == "gpt2" else whole).save_pretrained(root / "model", max_shard_size="100KB")
    tokenizer.save_pretrained(root / "model")
    assert len(list((root / "model").glob("*.safetensors"))) > 2
    assert run("calibrate", *calibrate_arguments(root / "model", root)).code == 0
    cache = root / "tiny_n6_s32_with_hessian"
    where = ["--model_path", root / "model", "--calib_cache", cache, "--save_model", root / "out"]
    result = run("compress", *where, "--target_compression", "0.6")
    assert result.code == 0, result
    return request.param, root / "model", cache, root / "out"


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


def test_compressed_model_is_close_and_generates_with_cache(chain):
    _, folder, _, out = chain
    model, dense = hisvd.load(out), hisvd.load(folder)
    with torch.no_grad():
        difference = (model(IDS).logits - dense(IDS).logits).norm() / dense(IDS).logits.norm()
    assert 1e-4 < difference < 1  # unrelated logits: 1.4
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_perplexity_layer_by_layer_is_that_of_the_whole_model(chain, tmp_path):
    _, folder, _, out = chain
    options = [
        "--model_path",
        folder,
        "--model_path",
        out,
        "--datasets",
        "python-docs",
        "--seqlen",
        32,
        "--nsamples",
        3,
    ]
    assert run("evaluate", *options, "--json", tmp_path / "whole.json").code == 0
    assert run("evaluate", *options, "--json", tmp_path / "a", "--offload_folder", tmp_path / "offload").code == 0
    assert not list((tmp_path / "offload").iterdir())
    for whole, streamed in zip(
        *(json.loads((tmp_path / name).read_text()) for name in ("whole.json", "a")), strict=True
    ):
        expected = whole["perplexity"].pop("python-docs")
        assert streamed["perplexity"].pop("python-docs") == pytest.approx(expected, rel=1e-5)
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
