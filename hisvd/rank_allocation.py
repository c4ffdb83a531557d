"""Stage 1 and the loss-aware allocation: ranks for all sublayers that use up the budget.

A share is a count of stored parameters (float) for one sublayer; shares become ranks only at the end.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from hisvd.errors import TargetTooSmallError
from hisvd.factor_forms import FORMS, Shape
from hisvd.shape_utils import Storage, Sublayer, largest_rank, next_rank, stored_parameters

SMALLEST_SHARE = 1e-12  # of a sublayer's size: one that asks for nothing gets what others cannot use


def budget_of(sublayers: Sequence[Sublayer], target: float, per_weight: int = 1) -> int:
    """What may be stored in all: floor(target · Σ mn) parameters, or bytes, `per_weight` of which are 1."""
    return math.floor(target * per_weight * sum(s.size for s in sublayers) + 1e-6)


def uniform_shares(sublayers: Sequence[Sublayer], target: float) -> list[float]:
    """The same fraction `target` of every sublayer."""
    return [target * s.size for s in sublayers]


def stage1_shares(
    sublayers: Sequence[Sublayer], ranks: Sequence[float], target: float, alpha: float, form: str
) -> list[float]:
    """Rank-density-aware shares, projected onto the budget.

    `ranks` holds R(W) ≥ 1 of each sublayer. Density d = ln R / ln min(m, n); weight (d / mean d)^alpha;
    share = target · mn · weight. alpha = 0 is the uniform allocation.
    """
    densities = [math.log(r) / math.log(max(s.full_rank, 2)) for r, s in zip(ranks, sublayers, strict=True)]
    mean = sum(densities) / len(densities)
    if mean == 0:  # every sublayer has rank 1: nothing tells them apart
        return project_shares(uniform_shares(sublayers, target), sublayers, target, form)
    shares = [target * s.size * (d / mean) ** alpha for s, d in zip(sublayers, densities, strict=True)]
    return project_shares(shares, sublayers, target, form)


def project_shares(shares: Sequence[float], sublayers: Sequence[Sublayer], target: float, form: str) -> list[float]:
    """Clip every share to [parameters of rank 1, mn] and rescale the others until the sum is the budget.

    The clipped sum grows with the common scale, so the scale is found by bisection.

    Raises:
        HiSVDError: the budget does not even hold rank 1 everywhere.
    """
    budget = budget_of(sublayers, target)
    floors = _rank_one_parameters(sublayers, target, form)
    shares = [max(share, SMALLEST_SHARE * s.size) for share, s in zip(shares, sublayers, strict=True)]

    def clipped(scale: float) -> list[float]:
        return [
            min(max(scale * share, floor), s.size) for share, floor, s in zip(shares, floors, sublayers, strict=True)
        ]

    low, high = 0.0, 1.0
    while sum(clipped(high)) < budget and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) <= budget else (low, middle)
    return clipped(low if sum(clipped(high)) > budget else high)


def _rank_one_parameters(sublayers: Sequence[Sublayer], target: float, form: str) -> list[int]:
    """The parameters of rank 1 of every sublayer, which must fit the budget."""
    floors = [stored_parameters(1, s.shape, form) for s in sublayers]
    refuse_below(sum(floors), sublayers, target, "this model: rank 1 everywhere")
    return floors


def refuse_below(least: float, sublayers: Sequence[Sublayer], target: float, what: str, per_weight: int = 1) -> None:
    """Check that the budget holds `least`; `what` names the chosen way and what is the least it can leave.

    Raises:
        TargetTooSmallError: it does not.
    """
    if least > budget_of(sublayers, target, per_weight):
        smallest = least / per_weight / sum(s.size for s in sublayers)
        raise TargetTooSmallError(
            f"Target {target:g} is too small for {what} already stores {smallest:.4f} of the linear weights, so choose "
            f"a target of at least {math.ceil(smallest * 1e4) / 1e4:g}."
        )


def ranks_from_shares(shares: Sequence[float], sublayers: Sequence[Sublayer], target: float, form: str) -> list[int]:
    """Ranks whose stored parameters sum to at most the budget, with no room left for one more rank.

    Every share is rounded down to a rank; what is left goes one rank at a time to the sublayer that is
    furthest below its share.
    """
    ranks = [largest_rank(share + 1e-6, s.shape, form) for share, s in zip(shares, sublayers, strict=True)]
    left = budget_of(sublayers, target) - sum(
        stored_parameters(r, s.shape, form) for r, s in zip(ranks, sublayers, strict=True)
    )
    while True:
        unmet = [
            share - stored_parameters(r, s.shape, form) for share, r, s in zip(shares, ranks, sublayers, strict=True)
        ]
        spent = 0
        for k in sorted(range(len(ranks)), key=lambda k: -unmet[k]):
            shape = sublayers[k].shape
            larger = next_rank(ranks[k], shape, form)
            price = stored_parameters(larger, shape, form) - stored_parameters(ranks[k], shape, form)
            if 0 < price <= left - spent:
                ranks[k] = larger
                spent += price
        if spent == 0:
            return ranks
        left -= spent


class RankCurve(NamedTuple):
    """A linear's choices: by rank 1 … min(m, n), twice the loss and what is stored, in float64.

    Twice the loss is the tail Σ_{i>r} σ_i², and in integers what rounding adds; sizes are parameters or bytes.
    """

    tails: torch.Tensor
    sizes: torch.Tensor


class Allowed(NamedTuple):
    """The ranks that may be chosen: the full one, and multiples of `multiple` that save so large a share."""

    multiple: int = 1
    saving: float = 0.0


def rank_curve(
    singular_values: torch.Tensor, shape: Shape, storage: Storage, allowed: Allowed, noise: float = 0.0
) -> RankCurve:
    """The choices of a linear (m, n) with these singular values, largest first; `noise` is as in `with_rounding`."""
    tails = tails_of(singular_values)
    energy = singular_values.double().square().sum()
    return RankCurve(with_rounding(tails, energy, storage, noise), sizes_by_rank(shape, storage, allowed))


def with_rounding(tails: torch.Tensor, energy: torch.Tensor, storage: Storage, noise: float) -> torch.Tensor:
    """The tails (n,) of a weight of `energy` Σ σ_i² with the energy of rounding errors, in every form.

    `noise` is that energy in the plain weight, as a fraction of Σ σ_i². Factors have it in what they keep.
    """
    if not noise:
        return tails
    rounded = tails + noise * FORMS[storage.form].noise * (energy - tails)
    rounded[-1] = tails[-1] + noise * energy
    return rounded


def spent_by(ranks: Sequence[int], curves: Sequence[RankCurve]) -> float:
    """What these ranks store."""
    return sum(float(curve.sizes[rank - 1]) for curve, rank in zip(curves, ranks, strict=True))


def fill(left: float, ranks: list[int], curves: Sequence[RankCurve]) -> float:
    """Raise `ranks`, in place, by what lowers the tails most for its size, while there is `left` enough.

    Where nothing lowers a tail, the sublayer goes first that keeps the least. Returns what remains.
    """
    while True:
        gains = []
        for k, (curve, rank) in enumerate(zip(curves, ranks, strict=True)):
            prices = curve.sizes[rank:] - curve.sizes[rank - 1]
            affordable = ((prices > 0) & (prices <= left)).nonzero().flatten()
            if len(affordable):
                rates = (curve.tails[rank - 1] - curve.tails[rank + affordable]) / prices[affordable]
                best = int(rates.argmax())
                lacking = 1 - float(curve.sizes[rank - 1] / curve.sizes[-1])
                gains.append((float(rates[best]), lacking, k, rank + int(affordable[best]) + 1))
        if not gains:
            return left
        _, _, k, rank = max(gains)
        left -= float(curves[k].sizes[rank - 1] - curves[k].sizes[ranks[k] - 1])
        ranks[k] = rank


@lru_cache(maxsize=1024)  # MLPs of all layers try the same shapes
def sizes_by_rank(shape: Shape, storage: Storage, allowed: Allowed) -> torch.Tensor:
    """What is stored at the ranks 1 … min(m, n), float64; infinite at those that are not `allowed`.

    The result is shared: do not change it.
    """
    sizes = torch.tensor([storage.size(r, shape) for r in range(1, min(shape) + 1)]).double()
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[allowed.multiple - 1 :: allowed.multiple] = True
    chosen &= sizes <= (1 - allowed.saving) * sizes[-1]
    chosen[-1] = True
    return sizes.where(chosen, torch.inf)


def raised_rank(rank: int, curve: RankCurve, part: float) -> int:
    """The largest rank that stores what `rank` does and at most the fraction `part` of what it lacks."""
    stored = curve.sizes[rank - 1]
    return int((curve.sizes <= stored + part * (curve.sizes[-1] - stored)).nonzero()[-1]) + 1


def tails_of(singular_values: torch.Tensor) -> torch.Tensor:
    """Σ_{i>r} σ_i² for the ranks r = 1 … n, float64, of σ (…, n); the last is 0."""
    energy = singular_values.double().square()
    tails = (energy.sum(-1, keepdim=True) - energy.cumsum(-1)).clamp_min(0)
    tails[..., -1] = 0
    return tails
