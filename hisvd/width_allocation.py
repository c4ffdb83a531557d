"""The loss-aware allocation of both moves: the width of every MLP and the rank of every linear, within one budget.

For a multiplier λ every MLP takes the width k, and its linears the ranks, that minimise

    removal(k) + Σ over its linears of min over r (tail(r; k) + λ · size(r; k)),

every other linear the rank that minimises tail + λ · size; λ is bisected. Sizes are parameters or bytes. Tails between
the widths whose spectra are known are interpolated linearly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from hisvd.factor_forms import Shape
from hisvd.rank_allocation import (
    Allowed,
    RankCurve,
    budget_of,
    fill,
    raised_rank,
    rank_curve,
    refuse_below,
    sizes_by_rank,
    spent_by,
    tails_of,
    with_rounding,
)
from hisvd.shape_utils import Storage, Sublayer

WIDTH_STEP = 16  # neurons between the widths that are tried, where an MLP has so many
BISECTIONS = 100


class Solution(NamedTuple):
    """The width of every MLP, the rank of every sublayer, and what they store."""

    widths: list[int]
    ranks: list[int]
    stored: float


class Options(NamedTuple):
    """Of an MLP at several widths: what removal adds (w,), tails and sizes by rank (w, members, ranks)."""

    widths: tuple[int, ...]
    removal: torch.Tensor
    tails: torch.Tensor
    sizes: torch.Tensor


@dataclass(frozen=True)
class MlpCurves:
    """What an MLP of n hidden neurons loses by width and rank.

    `members` are the places of its linears among all sublayers and `shapes` their shapes, the output linear last;
    `fused` is as in component.adapter.Mlp. `removal` (n + 1,) is the loss after removing 0 … n neurons. `spectra` holds
    for each member the two-sided singular values (len(widths), min(m, n)) at `widths`, ascending, the last being n.
    `storages` are theirs. With `ranked` they may be factored, to the ranks that are `allowed`; else they stay in one
    piece. Widths that are not full are multiples of what ranks are. `noises` are the members', see
    rank_allocation.with_rounding.
    """

    members: tuple[int, ...]
    shapes: tuple[Shape, ...]
    fused: int
    removal: torch.Tensor
    widths: tuple[int, ...]
    spectra: tuple[torch.Tensor, ...]
    storages: tuple[Storage, ...]
    ranked: bool = True
    allowed: Allowed = Allowed()
    noises: tuple[float, ...] = ()
    _known: dict[tuple[int, ...], Options] = field(default_factory=dict, repr=False)

    @property
    def neurons(self) -> int:
        """The number of hidden neurons, n."""
        return self.widths[-1]

    def next_width(self, width: float) -> int:
        """The smallest width that may be chosen and is not below `width`."""
        return min(self.neurons, math.ceil(width / self.allowed.multiple) * self.allowed.multiple)

    @cached_property
    def coarse(self) -> tuple[int, ...]:
        """Widths that may be chosen, about as far apart as `widths`."""
        return tuple(sorted({self.next_width(width) for width in self.widths}))

    @cached_property
    def tails(self) -> list[torch.Tensor]:
        """The members' tails (len(widths), min(m, n)) at `widths`."""
        return [tails_of(values) for values in self.spectra]

    @cached_property
    def energies(self) -> list[torch.Tensor]:
        """The members' Σ σ_i² (len(widths),) at `widths`."""
        return [values.double().square().sum(-1) for values in self.spectra]

    def shapes_at(self, width: int) -> list[Shape]:
        """The members' shapes with so many neurons."""
        return [*((self.fused * width, columns) for _, columns in self.shapes[:-1]), (self.shapes[-1][0], width)]

    def curves_at(self, width: int) -> list[RankCurve]:
        """The members' choices of rank at any width; a linear in one piece has its full rank alone."""
        upper = next(i for i, w in enumerate(self.widths) if w >= width)
        lower = max(0, upper - (self.widths[upper] > width))
        part = (width - self.widths[lower]) / (self.widths[upper] - self.widths[lower]) if upper > lower else 0.0
        curves = []
        for k, (shape, storage) in enumerate(zip(self.shapes_at(width), self.storages, strict=True)):
            tails = torch.lerp(self.tails[k][lower], self.tails[k][upper], part)[: min(shape)].clone()
            tails[-1] = 0
            if self.noises:
                energy = torch.lerp(self.energies[k][lower], self.energies[k][upper], part)
                tails = with_rounding(tails, energy, storage, self.noises[k])
            sizes = sizes_by_rank(shape, storage, self.allowed if self.ranked else Allowed(min(shape)))
            curves.append(RankCurve(tails, sizes))
        return curves

    def ranks_at(self, width: int, before: int, ranks: Sequence[int], part: float = 0.0) -> list[int]:
        """The members' `ranks` at the width `before` for a larger one: full ones stay full, others rise by `part`.

        `part` is a fraction of what a rank lacks.
        """
        sides = zip(ranks, map(min, self.shapes_at(before)), self.curves_at(width), strict=True)
        return [len(c.tails) if rank == old else raised_rank(rank, c, part) for rank, old, c in sides]

    def loss(self, width: int) -> float:
        """What removing neurons down to `width` adds, twice as tails are twice the loss."""
        return 2 * float(self.removal[self.neurons - width])

    def options(self, widths: tuple[int, ...]) -> Options:
        """The choices at several widths, those of other ranks than a width has being infinite."""
        if widths not in self._known:
            ranks = max(min(shape) for shape in self.shapes)
            curves = [self.curves_at(width) for width in widths]

            def padded(part: int) -> torch.Tensor:
                pad = torch.nn.functional.pad
                rows = [[pad(c[part], (0, ranks - len(c[part])), value=torch.inf) for c in row] for row in curves]
                return torch.stack([torch.stack(row) for row in rows])

            removal = torch.tensor([self.loss(width) for width in widths]).double()
            self._known[widths] = Options(widths, removal, padded(0), padded(1))
        return self._known[widths]

    def best_at(self, multiplier: float) -> tuple[int, list[int], float]:
        """The width, the members' ranks and what they store, of the least loss + multiplier · size."""
        place = _least(self.options(self.coarse), multiplier)[0]
        first, last = self.coarse[max(0, place - 1)], self.coarse[min(place + 1, len(self.coarse) - 1)]
        step = max(1, min(WIDTH_STEP, self.neurons // WIDTH_STEP))
        step = math.ceil(step / self.allowed.multiple) * self.allowed.multiple
        fine = self.options(tuple(sorted({*range(first, last, step), self.coarse[place], last})))
        place, ranks = _least(fine, multiplier)
        stored = fine.sizes[place].gather(1, torch.tensor(ranks)[:, None] - 1).sum()
        return fine.widths[place], ranks, float(stored)


def _least(options: Options, multiplier: float) -> tuple[int, list[int]]:
    """The place of the best width, and the ranks there."""
    values, ranks = (options.tails + multiplier * options.sizes).min(-1)
    place = int((values.sum(-1) + options.removal).argmin())
    return place, [rank + 1 for rank in ranks[place].tolist()]


def least_parameters(curves: Sequence[RankCurve | None], mlps: Sequence[MlpCurves]) -> float:
    """What the narrowest MLPs that are tried, and the lowest ranks that linears may have, store."""
    narrowest = [curve for mlp in mlps for curve in mlp.curves_at(mlp.coarse[0])]
    return sum(float(c.sizes.min()) for c in (*curves, *narrowest) if c is not None)


def loss_widths_and_ranks(
    curves: Sequence[RankCurve | None], mlps: Sequence[MlpCurves], budget: float
) -> tuple[list[int], list[int]]:
    """(width of every MLP, rank of every sublayer) that minimise the loss within the `budget` of what is stored.

    `curves` holds the choices of the sublayers, None for members of MLPs. The budget holds at least `least_parameters`;
    where it holds all that lowers the loss, the rest of it is spread evenly.
    """

    def at(multiplier: float) -> Solution:
        """The solution for a multiplier."""
        ranks = [0 if c is None else int((c.tails + multiplier * c.sizes).argmin()) + 1 for c in curves]
        stored = sum(float(c.sizes[r - 1]) for c, r in zip(curves, ranks, strict=True) if c is not None)
        widths = []
        for mlp in mlps:
            width, own, size = mlp.best_at(multiplier)
            widths.append(width)
            stored += size
            for member, rank in zip(mlp.members, own, strict=True):
                ranks[member] = rank
        return Solution(widths, ranks, stored)

    low, high = bracket(lambda multiplier: at(multiplier).stored <= budget)
    widths, ranks, stored = at(high)
    if low == 0:
        widths, ranks, stored = _spread(budget, Solution(widths, ranks, stored), curves, mlps)
    found = {k: curve for k, curve in enumerate(curves) if curve is not None}
    for mlp, width in zip(mlps, widths, strict=True):
        for member, curve in zip(mlp.members, mlp.curves_at(width), strict=True):
            found[member] = curve
    left = fill(budget - stored, ranks, [found[k] for k in range(len(ranks))])
    _widen(left, widths, ranks, mlps)
    return widths, ranks


def bracket(fits: Callable[[float], bool]) -> tuple[float, float]:
    """The multipliers next to each other of which the larger `fits` and the smaller does not (0: all do)."""
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, high * 2
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 1e3
        if middle < 1e-30:  # however little a loss counts, the budget holds all that lowers it
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
        if low and high / low < 1 + 1e-12:
            break
    return low, high


def loss_ranks(
    singular_values: Sequence[torch.Tensor],
    sublayers: Sequence[Sublayer],
    target: float,
    form: str,
    allowed: Allowed = Allowed(),
) -> list[int]:
    """The `allowed` ranks that minimise Σ tail_k(r_k), tail_k(r) = Σ_{i>r} σ_i², within the budget.

    `singular_values` holds those of the whitened weights, largest first; with two-sided whitening half the sum
    estimates the loss added.

    Raises:
        HiSVDError: the budget does not even hold the lowest ranks everywhere.
    """
    curves = [rank_curve(v, s.shape, Storage(form), allowed) for v, s in zip(singular_values, sublayers, strict=True)]
    refuse_below(least_parameters(curves, ()), sublayers, target, "this model: the lowest rank everywhere")
    return loss_widths_and_ranks(curves, (), budget_of(sublayers, target))[1]


def _spread(
    budget: float, solution: Solution, curves: Sequence[RankCurve | None], mlps: Sequence[MlpCurves]
) -> Solution:
    """Raise all widths and ranks by one fraction of what they lack, the largest that `budget` holds."""
    widths, ranks, _ = solution

    def raised(part: float) -> Solution:
        wider = [
            min(mlp.neurons, width + int(part * (mlp.neurons - width) / mlp.allowed.multiple) * mlp.allowed.multiple)
            for width, mlp in zip(widths, mlps, strict=True)
        ]
        higher = [0 if c is None else raised_rank(rank, c, part) for rank, c in zip(ranks, curves, strict=True)]
        stored = spent_by([r for r in higher if r], [c for c in curves if c is not None])
        for mlp, old, new in zip(mlps, widths, wider, strict=True):
            own = mlp.ranks_at(new, old, [ranks[member] for member in mlp.members], part)
            stored += spent_by(own, mlp.curves_at(new))
            for member, rank in zip(mlp.members, own, strict=True):
                higher[member] = rank
        return Solution(wider, higher, stored)

    if raised(1).stored <= budget:
        return raised(1)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if raised(middle).stored <= budget else (low, middle)
    return raised(low)


def _widen(left: float, widths: list[int], ranks: list[int], mlps: Sequence[MlpCurves]) -> None:
    """Give MLPs neurons back, in place, the fewest at a time, where that lowers the loss most per parameter."""
    while True:
        gains = []
        for k, (mlp, width) in enumerate(zip(mlps, widths, strict=True)):
            if width < mlp.neurons:
                own = [ranks[member] for member in mlp.members]
                larger = mlp.next_width(width + 1)
                wider = mlp.ranks_at(larger, width, own)
                before, after = mlp.curves_at(width), mlp.curves_at(larger)
                price = spent_by(wider, after) - spent_by(own, before)
                if 0 < price <= left:
                    gain = mlp.loss(width) - mlp.loss(larger)
                    gain += sum(float(c.tails[r - 1]) for c, r in zip(before, own, strict=True))
                    gain -= sum(float(c.tails[r - 1]) for c, r in zip(after, wider, strict=True))
                    if gain >= 0:  # the ranks of a wider MLP leave a longer tail
                        gains.append((gain / price, k, price, larger, wider))
        if not gains:
            return
        _, k, price, larger, wider = max(gains)
        left -= price
        widths[k] = larger
        for member, rank in zip(mlps[k].members, wider, strict=True):
            ranks[member] = rank
