"""From a model to its adapter, by `config.model_type`."""

from transformers import PreTrainedModel

from hisvd.component import svd_llama, svd_mistral
from hisvd.component.adapter import Adapter
from hisvd.component.svd_generic import generic_adapter

ADAPTERS = {
    "llama": svd_llama.ADAPTER,
    "mistral": svd_mistral.ADAPTER,
}


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The family's adapter, or the generic one for a family that has none."""
    known = ADAPTERS.get(model.config.model_type)
    return known or generic_adapter(model, model.config.get_text_config().num_hidden_layers)
