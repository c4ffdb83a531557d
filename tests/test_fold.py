"""Folding row orders into MLPs: the model computes the same, with fewer permutations."""

import pytest
import torch
from conftest import HEADS, SHARED, logits_of
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, Phi3Config

import hisvd
from hisvd.component.families import adapter_for, separate_experts
from hisvd.component.fold import fold_permutations
from hisvd.component.low_rank import PivotedLinear, swap_linears
from hisvd.utils.streaming import decoder_layers

CONFIGS = {
    "llama": LlamaConfig(**SHARED, **HEADS, mlp_bias=True),
    "opt": OPTConfig(vocab_size=300, hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4),
    "mixtral": MixtralConfig(**SHARED, **HEADS, num_local_experts=4),
    "phi3": Phi3Config(**SHARED, **HEADS, pad_token_id=0),
}


def factored(family, forms):
    """A random-weight model whose MLPs' linears have these forms in turn (None: plain)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    separate_experts(model)
    adapter, table = adapter_for(model), {}
    for index, layer in enumerate(decoder_layers(model, adapter)):
        for mlp in adapter.mlps_of(layer):
            for path, form in zip((*mlp.inputs, mlp.output), forms, strict=False):
                if form:
                    table[f"{adapter.layers}.{index}.{path}"] = {"form": form, "rank": 16}
    swap_linears(model, table)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("permutation"):
            tensor.copy_(torch.randperm(len(tensor)))
        elif tensor.is_floating_point() and "inv_freq" not in name and "norm" not in name:
            torch.nn.init.normal_(tensor, std=0.1)
    return model


FORMS = [
    ("pivoted", "pivoted", "pivoted"),
    (None, "pivoted", None),
    ("svd", "pivoted", "svd"),
    ("svd", None, "pivoted"),
]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("forms", FORMS)
def test_the_function_stays(family, forms):
    model = factored(family, forms)
    expected = logits_of(model)
    fold_permutations(model)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    layer = decoder_layers(model, adapter_for(model))[0]
    for mlp in adapter_for(model).mlps_of(layer):
        inputs = [layer.get_submodule(path) for path in mlp.inputs]
        pivoted = [module for module in inputs if isinstance(module, PivotedLinear)]
        assert sum(module.in_order for module in pivoted) == (len(pivoted) > 0 and mlp.fused == 1)
        for module in pivoted:
            assert module.in_order == torch.equal(module.permutation, torch.arange(len(module.permutation)).int())


def test_a_loaded_model_is_folded_and_saves_what_it_computes(chain, tmp_path):
    model = hisvd.load(chain("llama", "0.6", "out", "--update", "none", "--moves", "low_rank"))
    assert any(isinstance(module, PivotedLinear) and module.in_order for module in model.modules())
    model.save_pretrained(tmp_path / "again")
    again = hisvd.load(tmp_path / "again")
    torch.testing.assert_close(logits_of(again), logits_of(model))


def test_another_state_dict_brings_its_own_order():
    model, other = (factored("llama", ("pivoted",) * 3) for _ in range(2))
    expected = logits_of(other)
    fold_permutations(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits_of(model), expected)
