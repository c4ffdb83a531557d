"""The tensors of one decoder layer, by their names in the files and in the layer's modules."""

import torch
from torch import nn

from hisvd.component.low_rank import swap_linears
from hisvd.factor_forms import Entries, Shape, modules_of
from hisvd.shape_utils import Sublayer
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.streaming import StreamedModel


def layer_tensor_names(checkpoint: Checkpoint, first: Sublayer) -> set[str]:
    """Names of all checkpoint tensors of the decoder layer that `first` belongs to."""
    prefix = first.name.removesuffix(first.path)
    return {stored for name, stored in checkpoint.stored_names.items() if name.startswith(prefix)}


def stored_prefix(checkpoint: Checkpoint, sublayer: Sublayer) -> str:
    """The prefix of the names of a sublayer's tensors in the files."""
    return checkpoint.stored_name(f"{sublayer.name}.weight").removesuffix("weight")


def entries_of(checkpoint: Checkpoint, sublayer: Sublayer, tensors: dict[str, torch.Tensor]) -> Entries:
    """The state dict entries of a sublayer among the tensors of its layer."""
    prefix = stored_prefix(checkpoint, sublayer)
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def replace_entries(
    checkpoint: Checkpoint, sublayer: Sublayer, tensors: dict[str, torch.Tensor], entries: Entries
) -> None:
    """Put `entries` (moved to the CPU) in the place of the sublayer's entries in `tensors`.

    A bias stays where `entries` has none.
    """
    prefix = stored_prefix(checkpoint, sublayer)
    for name in entries_of(checkpoint, sublayer, tensors).keys() - {"bias"}:
        del tensors[prefix + name]
    tensors |= {prefix + name: tensor.to("cpu") for name, tensor in entries.items()}


def place_entries(layer: nn.Module, sublayer: Sublayer, shape: Shape, entries: Entries) -> None:
    """Make a linear of `layer` the one of weight `shape` that `entries` describe, in the layer's compute dtype."""
    swap_linears(layer, modules_of(sublayer.path, entries, sublayer.shape, shape))
    layer.get_submodule(sublayer.path).load_state_dict(entries, strict=False)


def norm_gains(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The gains of the norms inside a decoder layer, by name."""
    norms = ((name, m) for name, m in layer.named_modules() if type(m).__name__.endswith("Norm"))
    return {f"{name}.weight": m.weight for name, m in norms if isinstance(getattr(m, "weight", None), nn.Parameter)}


def compressed_layer(
    streamed: StreamedModel, index: int, shapes: dict[Sublayer, Shape], tensors: dict[str, torch.Tensor]
) -> nn.Module:
    """Decoder layer `index` made of `tensors`, its tensors in a compressed model's files.

    `shapes` holds the shapes of the linears' weights there.
    """
    checkpoint, layer, prefix = streamed.checkpoint, streamed.empty_layer(index), streamed.layer_name(index)
    weights = dict[str, torch.Tensor]()
    for s, shape in shapes.items():
        entries = entries_of(checkpoint, s, tensors)
        swap_linears(layer, modules_of(s.path, entries, s.shape, shape))
        weights |= {f"{s.path}.{key}": tensor for key, tensor in entries.items()}
    stored = {name: checkpoint.stored_name(f"{prefix}.{name}") for name in layer.state_dict() if name not in weights}
    return streamed.filled(layer, index, weights | {k: tensors[v] for k, v in stored.items() if v in tensors})
