"""What HiSVD must know about a model family: where its linear sublayers are and which share an input."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hisvd.component.experts import SeparateExperts

Groups = dict[str, tuple[str, ...]]  # name of a shared input → paths, inside a decoder layer, of what reads it


@dataclass(frozen=True)
class Mlp:
    """An MLP by the paths of its linears: y = output(h), h elementwise from the outputs of `inputs`.

    Hidden neuron j is column j of `output` and row j of every one of `inputs`; where one linear stands for `fused`
    stacked ones (gate over up), it is the rows j, j + n and so on of it, n being the number of hidden neurons.
    """

    inputs: tuple[str, ...]
    output: str
    fused: int = 1


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in some or all layers of a family; each expert is y = down(act(gate x) * up x).

    `linears` are the names of gate, up and down in the family's checkpoints. `inputs` is as in Adapter, a star standing
    for each expert's index; in layers with experts it replaces the adapter's inputs named in `instead_of`, and `mlps`,
    written in the same way, replaces the adapter's.
    """

    linears: tuple[str, str, str]
    inputs: Groups
    mlps: tuple[Mlp, ...]
    instead_of: tuple[str, ...] = ("mlp_in", "mlp_mid")


@dataclass(frozen=True)
class Adapter:
    """A family as data.

    `layers` is the path of the decoder layers in the causal language model. `inputs` maps the name of each
    shared input to the sublayers that read it (paths inside a decoder layer), in the order of the forward pass.
    An empty `inputs` means: every nn.Linear inside the decoder layers, grouped by the tensor they receive.
    `mlps` are the MLPs whose hidden neurons can be removed, and `width_keys` the entries of config.json that say how
    many there are.
    `stream` names the sublayers whose outputs are added to the residual stream unchanged, in order.
    `variants` maps (entry of config.json, value) to the adapter that describes such models of the family instead.
    `needs_bos` is set where text that does not start with BOS breaks the model: every window then starts with it.
    `gain_offset` is what norms add to their weights: they multiply by weight + gain_offset.
    """

    family: str
    layers: str
    inputs: Groups
    mlps: tuple[Mlp, ...] = ()
    width_keys: tuple[str, ...] = ("intermediate_size",)
    stream: tuple[str, ...] = ()
    experts: Experts | None = None
    variants: Mapping[tuple[str, object], "Adapter"] = field(default_factory=dict)
    needs_bos: bool = False
    gain_offset: float = 0.0

    def groups(self, layer: nn.Module) -> Groups:
        """The sublayers of `layer` by the input they share; empty if that is to be found out."""
        separate = _experts_of(layer)
        if separate is None or self.experts is None:
            return self.inputs
        groups = {name: paths for name, paths in self.inputs.items() if name not in self.experts.instead_of}
        for name, paths in self.experts.inputs.items():
            for index in map(str, range(separate.num_experts)) if "*" in name else ("",):
                groups[name.replace("*", index)] = tuple(path.replace("*", index) for path in paths)
        return groups

    def mlps_of(self, layer: nn.Module) -> list[Mlp]:
        """The MLPs of `layer`, one per expert where there are experts."""
        separate = _experts_of(layer)
        if separate is None or self.experts is None:
            return list(self.mlps)
        return [
            Mlp(tuple(path.replace("*", index) for path in mlp.inputs), mlp.output.replace("*", index), mlp.fused)
            for mlp in self.experts.mlps
            for index in (map(str, range(separate.num_experts)) if "*" in mlp.output else ("",))
        ]

    def sublayer_paths(self, layer: nn.Module) -> list[str]:
        """Paths of the linear sublayers inside `layer`, in the order of the forward pass."""
        if self.inputs:
            return [path for paths in self.groups(layer).values() for path in paths]
        return [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _experts_of(layer: nn.Module) -> SeparateExperts | None:
    return next((m for m in layer.modules() if isinstance(m, SeparateExperts)), None)
