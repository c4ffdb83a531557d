"""From a model to its adapter, by `config.model_type`. A new family is an adapter and its entry in ADAPTERS."""

from torch import nn
from transformers import PreTrainedModel

from hisvd.component import (
    svd_gemma,
    svd_gpt2,
    svd_llama,
    svd_mistral,
    svd_mixtral,
    svd_opt,
    svd_phi,
    svd_qwen,
    svd_qwen_moe,
)
from hisvd.component.adapter import Adapter
from hisvd.component.experts import SeparateExperts
from hisvd.component.svd_generic import generic_adapter

ADAPTERS: dict[str, Adapter] = {
    "llama": svd_llama.ADAPTER,
    "mistral": svd_mistral.ADAPTER,
    "mixtral": svd_mixtral.ADAPTER,
    "qwen2": svd_qwen.QWEN2,
    "qwen3": svd_qwen.QWEN3,
    "qwen2_moe": svd_qwen_moe.QWEN2_MOE,
    "qwen3_moe": svd_qwen_moe.QWEN3_MOE,
    "gemma2": svd_gemma.GEMMA2,
    "gemma3_text": svd_gemma.GEMMA3,
    "gemma3": svd_gemma.GEMMA3_WITH_VISION,
    "phi3": svd_phi.ADAPTER,
    "opt": svd_opt.ADAPTER,
    "gpt2": svd_gpt2.ADAPTER,
}


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The family's adapter, or the generic one for a family that has none.

    Raises:
        HiSVDError: a family that cannot be compressed.
    """
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is None:
        mixtures = [family for family, known in ADAPTERS.items() if known.experts]
        return generic_adapter(model, model.config.get_text_config().num_hidden_layers, mixtures)
    fitting = (a for (key, value), a in adapter.variants.items() if getattr(model.config, key) == value)
    return next(fitting, adapter)


def separate_experts(model: PreTrainedModel) -> None:
    """Replace every fused experts module of `model` by SeparateExperts if its family's adapter describes them."""
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is None or adapter.experts is None:
        return
    fused = [n for n, m in model.named_modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter)]
    for path in fused:
        model.set_submodule(path, SeparateExperts(model.get_submodule(path), adapter.experts.linears))
