"""The forward half of calibration: second moments of what the linears of a decoder layer receive."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from hisvd.component.adapter import Adapter
from hisvd.errors import HiSVDError
from hisvd.rare_experts import pool_rare
from hisvd.utils import distributed
from hisvd.whitening_svd import gram


class InputMoments:
    """Σ x xᵀ over tokens for every distinct input tensor of a layer's linears.

    Hooks record the tensor each linear receives; linears that receive the same tensor (by identity) share one
    moment, summed in float32 within a batch and float64 across batches. `groups` names them by the adapter, else by
    their first member. `sums` holds Σ x of what the output linear of an MLP receives, if it has a bias.
    """

    def __init__(self, layer: nn.Module, layer_name: str, adapter: Adapter) -> None:
        self.layer_name, self.adapter = layer_name, adapter
        self.groups = {name: list(paths) for name, paths in adapter.groups(layer).items()}
        self.moments: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        for name, paths in self.groups.items():
            self._start(name, layer.get_parameter(f"{paths[0]}.weight"))
        biased = {mlp.output for mlp in adapter.mlps_of(layer) if layer.get_submodule(mlp.output).bias is not None}
        with_sums = [name for name, paths in self.groups.items() if biased & set(paths)]
        self.sums = {name: self.moments[name].new_zeros(len(self.moments[name])) for name in with_sums}
        self._seen: list[tuple[str, torch.Tensor]] = []
        for path in adapter.sublayer_paths(layer):
            layer.get_submodule(path).register_forward_pre_hook(self._recorder(path))

    def _start(self, group: str, like: torch.Tensor) -> None:
        self.moments[group] = like.new_zeros(like.shape[-1], like.shape[-1], dtype=torch.float64)
        self.tokens[group] = 0

    def _recorder(self, path: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            self._seen.append((path, args[0].detach()))

        return hook

    def add_batch(self) -> None:
        """Add what the hooks recorded during one forward pass.

        Raises:
            HiSVDError: the layer does not share inputs as the adapter says.
        """
        observed: list[tuple[list[str], torch.Tensor]] = []
        for path, x in self._seen:
            same = next((paths for paths, y in observed if y.data_ptr() == x.data_ptr() and y.shape == x.shape), None)
            if same is None:
                observed.append(([path], x))
            else:
                same.append(path)
        self._seen.clear()
        for paths, x in observed:
            group = self._name(paths)
            if group not in self.moments:
                self._start(group, x)
            rows = x.reshape(-1, x.shape[-1])
            self.moments[group] += gram(rows)
            self.tokens[group] += rows.shape[0]
            if group in self.sums:
                self.sums[group] += rows.sum(0, dtype=torch.float32)

    def _name(self, paths: list[str]) -> str:
        name = next((n for n, members in self.groups.items() if sorted(members) == sorted(paths)), None)
        if name is None and self.adapter.inputs:
            raise HiSVDError(
                f"In {self.layer_name} the linears that share an input are {paths}, unlike in the "
                f"'{self.adapter.family}' adapter; this version of transformers has changed the family."
            )
        if name is None:
            name = paths[0]
            self.groups[name] = paths
        return name

    def finish(self) -> None:
        """Sum the moments and token counts over all processes, and pool those of rare experts.

        Raises:
            HiSVDError: a linear that every token should reach was not called.
        """
        self.moments = {group: distributed.total(moment) for group, moment in self.moments.items()}
        self.sums = {group: distributed.total(total) for group, total in self.sums.items()}
        self.tokens = {group: int(distributed.total(torch.tensor(count))) for group, count in self.tokens.items()}
        rare = pool_rare(self.moments, self.tokens)
        if rare and distributed.is_first():
            names = ", ".join(rare)
            logging.getLogger("hisvd").warning(
                "%s: too few tokens reach %s; the moments of all experts are used instead.", self.layer_name, names
            )
        for group, count in self.tokens.items():
            if not count:
                raise HiSVDError(
                    f"In {self.layer_name} nothing calls {self.groups[group]}, unlike in the "
                    f"'{self.adapter.family}' adapter; this version of transformers has changed the family."
                )
