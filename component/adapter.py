"""What HiSVD must know about a model family: where its linear sublayers are and which share an input."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Adapter:
    """A family as data.

    `layers` is the path of the decoder layers in the causal language model. `inputs` maps the name of each
    shared input to the sublayers that read it (paths inside a decoder layer), in the order of the forward.
    An empty `inputs` means: every nn.Linear inside the decoder layers, grouped by the tensor they receive.
    `stream` names the sublayers whose outputs are added to the residual stream as they are, in order.
    """

    family: str
    layers: str
    inputs: dict[str, tuple[str, ...]]
    stream: tuple[str, ...] = ()

    def sublayer_paths(self, layer: nn.Module) -> list[str]:
        """Paths of the linear sublayers inside `layer`, in the order of the forward."""
        if self.inputs:
            return [path for paths in self.inputs.values() for path in paths]
        return [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
