"""Factored modules and the swap, on models of several families."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hisvd.component.families import adapter_for
from hisvd.component.low_rank import MODULE_OF_FORM, dense_weight, factor_tensors, swap_linears
from hisvd.utils.streaming import decoder_layers


@pytest.mark.parametrize("form", ["pivoted", "svd"])
@pytest.mark.parametrize("bias", [True, False])
def test_module_computes_the_product_of_its_factors(form, bias):
    torch.manual_seed(0)
    left, right = torch.randn(12, 4), torch.randn(4, 10)
    module = MODULE_OF_FORM[form](10, 12, 4, bias)
    state = factor_tensors(left, right, form, torch.float32) | ({"bias": torch.randn(12)} if bias else {})
    module.load_state_dict(state)
    torch.testing.assert_close(dense_weight(state, 10).float(), left @ right, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 10)
    expected = torch.nn.functional.linear(x, left @ right, state.get("bias"))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("form", ["pivoted", "svd"])
def test_full_rank_factors_reproduce_the_logits(model_folders, family, form):
    model = AutoModelForCausalLM.from_pretrained(model_folders[family]).eval()
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        before = model(ids).logits
        adapter = adapter_for(model)
        for index, layer in enumerate(decoder_layers(model, adapter)):
            for path in adapter.sublayer_paths(layer):
                linear = layer.get_submodule(path)
                u, s, vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
                name = f"{adapter.layers}.{index}.{path}"
                swap_linears(model, {name: {"form": form, "rank": len(s)}})
                state = factor_tensors(u * s, vh, form, torch.float32)
                model.get_submodule(name).load_state_dict(state, strict=linear.bias is None)  # the swap kept the bias
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_swap_names_a_module_that_is_not_there(model_folders):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    with pytest.raises(KeyError, match=r"layers\.9\.nothing"):
        swap_linears(model, {"model.layers.9.nothing": {"form": "svd", "rank": 1}})


def test_families_and_the_generic_fallback(model_folders):
    families = {}
    for name, folder in model_folders.items():
        adapter = adapter_for(AutoModelForCausalLM.from_pretrained(folder))
        families[name] = (adapter.family, adapter.layers)
    assert families == {
        "llama": ("llama", "model.layers"),
        "mistral": ("mistral", "model.layers"),
        "qwen2": ("qwen2", "model.layers"),
    }
