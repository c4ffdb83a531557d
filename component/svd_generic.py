"""The fallback for a family without an adapter: every nn.Linear inside the decoder layers."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hisvd.component.adapter import Adapter
from hisvd.component.coded_linears import CODED_LINEARS
from hisvd.errors import HiSVDError

LINEARS = (nn.Linear, Conv1D, *CODED_LINEARS)  # factored modules contain one of them too


def generic_adapter(model: PreTrainedModel, num_layers: int, mixtures: Sequence[str]) -> Adapter:
    """An adapter for `model` (a causal language model, possibly on the meta device).

    The decoder layers are the first nn.ModuleList of `num_layers` members that holds nn.Linear modules, in the part of
    the model that reads text; which linears share an input is found later, from the tensors they receive. `mixtures`
    lists the families with experts that have an adapter, for the error message.

    Raises:
        HiSVDError: the model has no such list, or fuses the weights of experts.
    """
    fused = next((name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name), None)
    if fused:
        raise HiSVDError(
            f"The experts of the model type '{model.config.model_type}' ({fused}) are not supported; the mixtures of "
            f"experts that HiSVD compresses are {', '.join(mixtures)}."
        )
    decoder = model.get_decoder()
    inside = next(path for path, module in model.named_modules() if module is decoder)
    for path, module in decoder.named_modules(prefix=inside):
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            layers = list(module)
            if all(any(isinstance(child, LINEARS) for child in layer.modules()) for layer in layers):
                return Adapter(family=f"generic ({model.config.model_type})", layers=path, inputs={})
    raise HiSVDError(
        f"No list of {num_layers} decoder layers with nn.Linear modules was found in the model type "
        f"'{model.config.model_type}', so HiSVD cannot compress it; use a decoder-only model built from nn.Linear."
    )
