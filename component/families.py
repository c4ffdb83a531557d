"""From a model to its adapter, by `config.model_type`."""

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
from hisvd.component.svd_generic import generic_adapter

ADAPTERS = {
    "llama": svd_llama.ADAPTER,
    "mistral": svd_mistral.ADAPTER,
    "mixtral": svd_mixtral.ADAPTER,
    "qwen2": svd_qwen.QWEN2,
    "qwen3": svd_qwen.QWEN3,
    "qwen2_moe": svd_qwen_moe.QWEN2_MOE,
    "qwen3_moe": svd_qwen_moe.QWEN3_MOE,
    "gemma2": svd_gemma.GEMMA2,
    "gemma3_text": svd_gemma.GEMMA3,
    "phi3": svd_phi.ADAPTER,
    "opt": svd_opt.ADAPTER,
    "gpt2": svd_gpt2.ADAPTER,
}


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The family's adapter, or the generic one for a family that has none."""
    if model.config.model_type == "opt" and not model.config.do_layer_norm_before:
        return svd_opt.POST_NORM
    known = ADAPTERS.get(model.config.model_type)
    return known or generic_adapter(model, model.config.get_text_config().num_hidden_layers)
