"""Mixtures of experts: separate linears compute the same, moments are those of the tokens routed to each."""

import json

import pytest
import torch
from conftest import HEADS, IDS, SHARED, build_model, calibrate_arguments, run
from safetensors.torch import load_file, save_file
from test_calibration import calibration_tokens, gradient_moments_of, gradient_moments_stored
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

import hisvd
from hisvd.cached_moments import input_moment
from hisvd.calibration_cache import read_cache
from hisvd.component.families import separate_experts
from hisvd.component.hf_quantizer import HiSVDConfig, HiSVDQuantizer
from hisvd.rare_experts import pool_rare

QWEN = Qwen3MoeConfig(
    **SHARED,
    **HEADS,
    initializer_range=0.1,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=40,
    mlp_only_layers=[3],
)
MIXTRAL = MixtralConfig(**SHARED, **HEADS, initializer_range=0.1, num_local_experts=3, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def starved(tokenizer, tmp_path_factory):
    """(model folder, cache, stderr of calibrate.py): no token ever reaches expert 4 of layer 0."""
    root = tmp_path_factory.mktemp("experts")
    folder = build_model(QWEN, root / "model", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[:] = torch.tensor([2.0, 1, -1, -2, 0])[:, None] * router[:1]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = run("calibrate", *calibrate_arguments(folder, root))
    assert result.code == 0, result
    return folder, root / "tiny_n6_s32_with_hessian", result.error


@pytest.mark.parametrize("config", [QWEN, MIXTRAL], ids=["qwen3_moe", "mixtral"])
def test_separate_experts_compute_the_same(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        before = model(IDS).logits
        separate_experts(model)
        torch.testing.assert_close(model(IDS).logits, before)


@pytest.mark.parametrize("config", [MIXTRAL, LlamaConfig(**SHARED, **HEADS)], ids=["mixtral", "llama"])
def test_no_tensor_is_merged_into_separate_experts(config):
    model, quantizer = AutoModelForCausalLM.from_config(config), HiSVDQuantizer(HiSVDConfig({}))
    rename, *_ = all_conversions = [object(), *get_model_conversion_mapping(model)]
    quantizer._process_model_before_weight_loading(model)
    kept = quantizer.update_weight_conversions(all_conversions)  # transformers 5.8 to 5.20
    assert quantizer.update_weight_conversions(all_conversions, model) == kept  # 5.21 and later
    assert rename in kept
    merges = [c for c in all_conversions if isinstance(c, WeightConverter)]
    if config.model_type == "mixtral":
        assert merges and not any(isinstance(c, WeightConverter) for c in kept)
    else:
        assert kept == all_conversions


def input_moments_of(model, tokens):
    """Sums of x xᵀ and counts of tokens for every expert's linear that tokens reach."""
    sums, counts = {}, {}
    for name, module in model.named_modules():
        if ".experts." in name and isinstance(module, torch.nn.Linear):

            def hook(_, args, name=name):
                sums[name] = sums.get(name, 0) + args[0].double().T @ args[0].double()
                counts[name] = counts.get(name, 0) + len(args[0])

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(tokens)
    return sums, counts


def test_moments_are_those_of_the_tokens_routed_to_each_expert(starved):
    folder, cache_path, error = starved
    cache, model = read_cache(cache_path), AutoModelForCausalLM.from_pretrained(folder).eval()
    separate_experts(model)
    sums, counts = input_moments_of(model, calibration_tokens(folder))
    rare = []
    for s in cache.sublayers:
        if ".experts." not in s.name:
            continue
        statistics = cache.read_layer(s.layer)
        h = input_moment(s, statistics, torch.device("cpu"))
        kind = [n for n in sums if n.startswith(f"model.layers.{s.layer}.") and n.endswith(s.path.rpartition(".")[2])]
        if counts.get(s.name, 0) < s.in_features:
            rare.append(s.input_group)
            expected = sum(sums[n] for n in kind) / sum(counts[n] for n in kind)
        else:
            expected = sums[s.name] / counts[s.name]
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert "experts.4.in" in rare and "model.layers.0.mlp.experts.4.up_proj" not in counts
    assert "model.layers.0: too few tokens reach" in error and "experts.4.in" in error and "experts.4.mid" in error


def test_gradient_moments_weigh_experts_by_their_tokens(starved):
    folder, cache_path, _ = starved
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    separate_experts(model)
    expected = gradient_moments_of(model, calibration_tokens(folder))
    cache = read_cache(cache_path)
    counts = input_moments_of(model, calibration_tokens(folder))[1]
    reached = {s.name: counts.get(s.name, 0) if ".experts." in s.name else 192 for s in cache.sublayers}
    whole = [s for s in cache.sublayers if reached[s.name] >= s.out_features]
    assert sum(".experts." in s.name for s in whole) > 20
    for s in whole:
        stored = gradient_moments_stored(cache, s)
        torch.testing.assert_close(stored, expected[s.name], rtol=1e-5, atol=1e-5 * expected[s.name].abs().max().item())
    starved_one = next(s for s in cache.sublayers if s.name == "model.layers.0.mlp.experts.4.up_proj")
    others = sum(f for n, f in expected.items() if n.startswith("model.layers.0.mlp.exp") and n.endswith("up_proj"))
    kept = gradient_moments_stored(cache, starved_one)
    assert kept.trace() > 0
    torch.testing.assert_close(kept / kept.trace(), others / others.trace(), rtol=1e-4, atol=1e-6)


def test_pooled_moments_keep_the_experts_weight():
    torch.manual_seed(0)
    rows = {f"experts.{e}.in": torch.randn(count, 4).double() for e, count in enumerate((10, 3, 0))}
    sums = {name: x.T @ x for name, x in rows.items()} | {"attn_in": torch.eye(4).double()}
    tokens = {name: len(x) for name, x in rows.items()} | {"attn_in": 1}
    pooled = sum(sums[name] for name in rows) / 13
    own = sums["experts.0.in"].clone()
    assert pool_rare(sums, tokens) == ["experts.1.in", "experts.2.in"]
    torch.testing.assert_close(sums["experts.0.in"], own)
    torch.testing.assert_close(sums["experts.1.in"], 3 * pooled)
    torch.testing.assert_close(sums["experts.2.in"], pooled)
    torch.testing.assert_close(sums["attn_in"], torch.eye(4).double())
    assert tokens == {"experts.0.in": 10, "experts.1.in": 3, "experts.2.in": 1, "attn_in": 1}


def test_a_starved_expert_is_compressed_and_the_model_saves_again(starved, tmp_path):
    folder, cache, _ = starved
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "out"]
    result = run("compress", *where, "--target_compression", "0.6")
    assert result.code == 0, result
    assert "–" in result.output  # a column holds the smallest and the largest rank of all experts
    model = hisvd.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, hisvd.load(tmp_path / "again")(IDS).logits)


def test_a_mixture_of_another_family_is_named(tokenizer, tmp_path):
    config = OlmoeConfig(**SHARED, **HEADS, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    folder = build_model(config, tmp_path / "model", tokenizer)
    result = run("calibrate", *calibrate_arguments(folder, tmp_path))
    assert result.code == 2 and "olmoe" in result.error and "mixtral" in result.error


WIDE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "initializer_range": 0.1}
LAYERS = {**SHARED, **HEADS, "num_hidden_layers": 2}
EQUAL_WIDTHS = {
    "experts alone": (Qwen3MoeConfig(**LAYERS, **WIDE), {"moe_intermediate_size"}),
    "a layer without": (
        Qwen3MoeConfig(**LAYERS | WIDE | {"intermediate_size": 48}, mlp_only_layers=[1]),
        {"moe_intermediate_size", "intermediate_size"},
    ),
    "a shared expert": (
        Qwen2MoeConfig(**LAYERS, **WIDE, shared_expert_intermediate_size=48),
        {"moe_intermediate_size", "shared_expert_intermediate_size"},
    ),
}


@pytest.mark.parametrize("case", EQUAL_WIDTHS)
def test_a_stock_checkpoint_names_the_width_of_every_mlp(tokenizer, tmp_path, case):
    config, changed = EQUAL_WIDTHS[case]
    folder = build_model(config, tmp_path / "model", tokenizer)
    assert run("calibrate", *calibrate_arguments(folder, tmp_path)).code == 0
    where = ["--model_path", folder, "--calib_cache", tmp_path / "tiny_n6_s32_with_hessian"]
    options = ["--target_compression", "0.7", "--export", "plain", "--width_multiple", 8, "--update", "none"]
    result = run("compress", *where, *options, "--save_model", tmp_path / "out")
    assert result.code == 0, result
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert {key for key in before if before[key] != after[key]} == changed and before.keys() == after.keys()
    assert {after[key] for key in changed} == {24}
    hisvd.load(tmp_path / "out")  # refuses what does not fit
