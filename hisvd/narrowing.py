"""What removing neurons leaves of an MLP's linears: fewer rows of its inputs, its output linear re-fitted."""

from typing import NamedTuple

import torch

from hisvd.cached_moments import input_mean, input_moment, output_gradient_moment
from hisvd.factor_forms import Entries
from hisvd.neurons import Refits, fitting_moment, refits, stacked
from hisvd.shape_utils import Sublayer
from hisvd.whitening_svd import SecondMoment, cholesky_root

F_ROOT = "F_root"  # the ending of the name, among a layer's statistics, of what `kept_outputs_moment` finds


class Kept(NamedTuple):
    """The neurons of an MLP that stay, seen from linears that share an input: `neurons` (k,), in order.

    `output` is the MLP's output linear, `fused` as in component.adapter.Mlp; `at_output`: the linear is that one.
    `longest` (n,) lists all neurons, those first that stay longest: all of them, so that what targets share does not
    depend on which these are.
    """

    neurons: torch.Tensor
    output: Sublayer
    fused: int
    at_output: bool
    longest: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """The outputs that stay of a linear that feeds the neurons, (fused · k,)."""
        return stacked(self.neurons, self.output.in_features, self.fused)

    @property
    def places(self) -> torch.Tensor:
        """Where `neurons` are in `longest`, (k,)."""
        return self.longest[: len(self.neurons)].argsort()


class Fit(NamedTuple):
    """The output linear on the neurons that stay: W (m, k) in float64, and its bias, if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """What it makes of x (tokens, k), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


class OutputFits(NamedTuple):
    """An MLP's output linear W (m, n) fitted to the original model's own neurons, whatever how many stay.

    `fits` are on the neurons `order`, as Kept.longest. A bias takes up the `mean` (n,) of those that do not stay; it is
    then left out of the moment that is fitted to.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    order: torch.Tensor
    fits: Refits

    def on(self, count: int) -> Fit:
        """On the first `count` neurons of the order, columns in that order."""
        fit = self.fits.at(count)
        if self.bias is None or self.mean is None:
            return Fit(fit, self.bias)
        outputs = self.weight.double() @ self.mean - fit @ self.mean[self.order[:count]]
        return Fit(fit, self.bias.double() + outputs)

    def root(self, moment: torch.Tensor) -> torch.Tensor:
        """The damped Cholesky root of `moment` E[h hᵀ] (n, n) in the order: a leading block for every count."""
        if self.mean is None:
            return self.fits.root
        return cholesky_root(fitting_moment(moment, None)[self.order][:, self.order], 0.0)


def output_fits(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kept: Kept,
    statistics: dict[str, torch.Tensor],
    moment: torch.Tensor | None = None,
) -> OutputFits:
    """The fits of W (m, n) from the `statistics` of its layer.

    `moment` is E[h hᵀ] (n, n), if it is known already.
    """
    mean = input_mean(kept.output, statistics, weight.device)
    if moment is None:
        moment = input_moment(kept.output, statistics, weight.device)
    return OutputFits(weight, bias, mean, kept.longest, refits(weight, fitting_moment(moment, mean), kept.longest))


def kept_outputs_moment(s: Sublayer, kept: Kept, statistics: dict[str, torch.Tensor]) -> SecondMoment:
    """The damped F of the outputs kept.rows of a linear `s` that feeds an MLP's neurons.

    One root, which is put among the `statistics` of the layer, serves all targets.
    """
    n, name = kept.output.in_features, f"{s.path}.{F_ROOT}"
    rows = torch.stack([kept.longest + part * n for part in range(kept.fused)], dim=1).flatten()
    if name not in statistics:
        statistics[name] = cholesky_root(output_gradient_moment(s, statistics, rows.device)[rows][:, rows], 0.0)
    count = kept.fused * len(kept.neurons)
    return SecondMoment(statistics[name][:count, :count], torch.searchsorted(kept.rows, rows[:count]))


def with_zeros(entries: Entries, sublayer: Sublayer, kept: Kept) -> Entries:
    """Plain entries with the removed neurons put back as zeros: the same function in the original shape."""
    dim, places = (1, kept.neurons) if kept.at_output else (0, kept.rows)
    weight = entries["weight"].new_zeros(sublayer.shape).index_copy_(dim, places, entries["weight"])
    full = entries | {"weight": weight}
    if "bias" in entries and not kept.at_output:
        full["bias"] = entries["bias"].new_zeros(sublayer.out_features).index_copy_(0, places, entries["bias"])
    return full
