"""What removing neurons leaves of an MLP's linears: fewer rows of its inputs, its output linear re-fitted."""

from typing import NamedTuple

import torch

from hisvd.cached_moments import input_mean, input_moment
from hisvd.factor_forms import Entries
from hisvd.neurons import fitting_moment, refitted, stacked
from hisvd.shape_utils import Sublayer


class Kept(NamedTuple):
    """The neurons of an MLP that stay, seen from linears that share an input: `neurons` (k,), in order.

    `output` is the MLP's output linear, `fused` as in component.adapter.Mlp; `at_output`: the linear is that one.
    """

    neurons: torch.Tensor
    output: Sublayer
    fused: int
    at_output: bool

    @property
    def rows(self) -> torch.Tensor:
        """The outputs that stay of a linear that feeds the neurons, (fused · k,)."""
        return stacked(self.neurons, self.output.in_features, self.fused)


class Fit(NamedTuple):
    """The output linear on the neurons that stay: W (m, k) in float64, and its bias, if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """What it makes of x (tokens, k), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


def refitted_output(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: Kept, statistics: dict[str, torch.Tensor]
) -> Fit:
    """The fit of W (m, n) to the original model's own neurons, from its `statistics`; a bias takes up their means."""
    mean = input_mean(kept.output, statistics, weight.device)
    moment = fitting_moment(input_moment(kept.output, statistics, weight.device), mean)
    fit = refitted(weight, moment, kept.neurons)
    if bias is None or mean is None:
        return Fit(fit, bias)
    return Fit(fit, bias.double() + weight.double() @ mean - fit @ mean[kept.neurons])


def with_zeros(entries: Entries, sublayer: Sublayer, kept: Kept) -> Entries:
    """Plain entries with the removed neurons put back as zeros: the same function in the original shape."""
    dim, places = (1, kept.neurons) if kept.at_output else (0, kept.rows)
    weight = entries["weight"].new_zeros(sublayer.shape).index_copy_(dim, places, entries["weight"])
    full = entries | {"weight": weight}
    if "bias" in entries and not kept.at_output:
        full["bias"] = entries["bias"].new_zeros(sublayer.out_features).index_copy_(0, places, entries["bias"])
    return full
