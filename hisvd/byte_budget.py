"""The integers that linears are stored in where the budget is in bytes: one multiplier for widths, ranks and bits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hisvd.rank_allocation import RankCurve
from hisvd.width_allocation import MlpCurves, bracket

SIZE_ALONE = 1e30  # the multiplier at which nothing but the size counts


class Curves(NamedTuple):
    """The choices of a model's linears: `others` of those outside MLPs (None for members of MLPs), and of the MLPs."""

    others: list[RankCurve | None]
    mlps: list[MlpCurves]


class Stored(NamedTuple):
    """For every linear the place of its storage in the menu, and the bytes of all."""

    places: list[int]
    size: float


def least_loss_storages(menu: Sequence[Curves], budget: float) -> list[int]:
    """For every linear the place in `menu` of its storage in the model of least loss within `budget` bytes.

    `budget` holds at least what `storages_at` gives for SIZE_ALONE.
    """
    high = bracket(lambda multiplier: storages_at(menu, multiplier).size <= budget)[1]
    return storages_at(menu, high).places


def storages_at(menu: Sequence[Curves], multiplier: float) -> Stored:
    """What goes with the least loss + multiplier · bytes, where `menu` holds the same linears in one storage each.

    A linear takes the storage and the rank, and an MLP the width, that cost least.
    """
    places, size = [0] * len(menu[0].others), 0.0
    for k, curves in enumerate(zip(*(curves.others for curves in menu), strict=True)):
        costs = [(*_least(curve, multiplier), place) for place, curve in enumerate(curves) if curve is not None]
        if costs:
            _, stored, places[k] = min(costs)
            size += stored
    for mlps in zip(*(curves.mlps for curves in menu), strict=True):
        options = [mlp.options(mlp.coarse) for mlp in mlps]
        costs_by_rank = torch.stack([o.tails + multiplier * o.sizes for o in options])
        costs_by_place, ranks = costs_by_rank.min(-1)
        least, best = costs_by_place.min(0)
        width = int((least.sum(-1) + options[0].removal).argmin())
        for j, member in enumerate(mlps[0].members):
            place = places[member] = int(best[width, j])
            size += float(options[place].sizes[width, j, ranks[place, width, j]])
    return Stored(places, size)


def _least(curve: RankCurve, multiplier: float) -> tuple[float, float]:
    """The least tail + multiplier · size, and that size."""
    cost, rank = (curve.tails + multiplier * curve.sizes).min(0)
    return float(cost), float(curve.sizes[rank])
