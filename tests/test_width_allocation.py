"""The widths of MLPs and the ranks of all linears that add the least loss within a budget."""

import dataclasses
import itertools

import pytest
import torch

from hisvd.neurons import spectrum_widths
from hisvd.rank_allocation import Allowed, RankCurve, sizes_by_rank, spent_by, tails_of
from hisvd.shape_utils import Storage
from hisvd.width_allocation import MlpCurves, least_parameters, loss_widths_and_ranks


def mlp_curves(first, n, hidden, seed, fused=1, form="pivoted", ranked=True):
    """An MLP of two inputs (one where they are fused) at the places `first` on; its losses are as real ones are.

    Loss falls convexly as neurons come back, and narrower linears have smaller singular values.
    """
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(n, generator=generator, dtype=torch.float64).square().sort().values + 0.01
    inputs = 2 // fused
    shapes = (*[(fused * n, hidden)] * inputs, (hidden, n))
    widths = (*spectrum_widths(n), n)
    spectra = []
    for m, k in shapes:
        full = torch.rand(min(m, k), generator=generator, dtype=torch.float64).sort(descending=True).values + 0.02
        rows = [
            full * (width / n) ** 0.5 * (torch.arange(min(m, k)) < (m * k // n // hidden) * width) for width in widths
        ]
        spectra.append(torch.stack(rows))
    removal = torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    members = tuple(range(first, first + inputs + 1))
    return MlpCurves(members, shapes, fused, removal, widths, tuple(spectra), (Storage(form),) * len(shapes), ranked)


def attention_curve(shape, seed, form="pivoted", ranked=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(min(shape), generator=generator, dtype=torch.float64).sort(descending=True).values
    sizes = sizes_by_rank(shape, Storage(form), Allowed(1 if ranked else min(shape)))
    return RankCurve(tails_of(values).where(sizes.isfinite(), torch.inf), sizes)


def model(layers, n, hidden, form="pivoted", ranked=True, fused=1, seed=0):
    """One attention matrix and one MLP per layer."""
    curves, mlps = [], []
    for layer in range(layers):
        curves.append(attention_curve((hidden, hidden), seed + 10 * layer, form, ranked))
        mlp = mlp_curves(len(curves), n, hidden, seed + 10 * layer + 1, fused, form, ranked)
        curves += [None] * len(mlp.members)
        mlps.append(mlp)
    return curves, mlps


def whole(curves, mlps):
    size = sum(float(c.sizes[-1]) for c in curves if c is not None)
    return size + sum(m * n for mlp in mlps for m, n in mlp.shapes)


def outcome(curves, mlps, widths, ranks):
    """(twice the loss, parameters) of a choice."""
    found = list(curves)
    loss = sum(mlp.loss(width) for mlp, width in zip(mlps, widths, strict=True))
    for mlp, width in zip(mlps, widths, strict=True):
        for member, curve in zip(mlp.members, mlp.curves_at(width), strict=True):
            found[member] = curve
    loss += sum(float(c.tails[r - 1]) for c, r in zip(found, ranks, strict=True))
    return loss, spent_by(ranks, found)


def least_loss(curves, mlps, budget):
    """The least twice the loss of all choices of width and rank within the budget, by trying them all."""
    fronts = [list(zip(c.tails.tolist(), c.sizes.tolist(), strict=True)) for c in curves if c is not None]
    for mlp in mlps:
        front = []
        for width in range(1, mlp.neurons + 1):
            options = [list(zip(c.tails.tolist(), c.sizes.tolist(), strict=True)) for c in mlp.curves_at(width)]
            front += [
                (mlp.loss(width) + sum(t for t, _ in choice), sum(p for _, p in choice))
                for choice in itertools.product(*map(pareto, options))
            ]
        fronts.append(front)
    total = [(0.0, 0.0)]
    for front in fronts:
        sums = [(a + b, p + q) for a, p in total for b, q in pareto(front) if p + q <= budget]
        total = pareto(sums)
    return min(total)[0]


def pareto(choices):
    """Those (loss, parameters) that no other beats in both."""
    best, kept = float("inf"), []
    for loss, parameters in sorted(choices, key=lambda c: (c[1], c[0])):
        if loss < best:
            best = loss
            kept.append((loss, parameters))
    return kept


@pytest.mark.parametrize("form", ["pivoted", "svd"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_no_other_choice_is_much_better(form, seed, share):
    """The best by trying all; a multiplier reaches the corners of the convex hull, the rest is filled up."""
    curves, mlps = model(layers=2, n=8, hidden=5, form=form, seed=100 * seed)
    budget = int(share * whole(curves, mlps))
    widths, ranks = loss_widths_and_ranks(curves, mlps, budget)
    loss, spent = outcome(curves, mlps, widths, ranks)
    assert spent <= budget
    best = least_loss(curves, mlps, budget)
    everything = least_loss(curves, mlps, 0.2 * whole(curves, mlps))
    assert best - 1e-9 <= loss <= best + 0.05 * everything


def steps(curves, mlps, widths, ranks):
    """What every single step that lowers a tail, or gives back a neuron, would store more."""
    for curve, rank in zip(curves, ranks, strict=True):
        if curve is not None:
            yield from (curve.sizes[rank:] - curve.sizes[rank - 1]).tolist()
    for mlp, width in zip(mlps, widths, strict=True):
        own = [ranks[member] for member in mlp.members]
        for curve, rank in zip(mlp.curves_at(width), own, strict=True):
            yield from (curve.sizes[rank:] - curve.sizes[rank - 1]).tolist()
        if width < mlp.neurons:
            wider = mlp.ranks_at(width + 1, width, own)
            yield spent_by(wider, mlp.curves_at(width + 1)) - spent_by(own, mlp.curves_at(width))


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("fused", [1, 2])
@pytest.mark.parametrize("share", [0.4, 0.55, 0.8, 0.95])
def test_budget_is_spent(ranked, fused, share):
    curves, mlps = model(layers=4, n=160, hidden=32, ranked=ranked, fused=fused)
    budget = int(share * whole(curves, mlps))
    widths, ranks = loss_widths_and_ranks(curves, mlps, budget)
    _, spent = outcome(curves, mlps, widths, ranks)
    assert spent <= budget
    assert not any(0 < step <= budget - spent for step in steps(curves, mlps, widths, ranks))
    for mlp, width in zip(mlps, widths, strict=True):
        assert 1 <= width <= 160
        for member, shape in zip(mlp.members, mlp.shapes_at(width), strict=True):
            assert 1 <= ranks[member] <= min(shape)
            assert ranked or ranks[member] == min(shape)


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_widths_and_ranks_are_multiples_or_full(multiple, ranked, share):
    curves, mlps = model(layers=4, n=150, hidden=48, ranked=ranked)  # the full width is not a multiple
    if ranked:
        curves = [
            c and RankCurve(c.tails, sizes_by_rank((48, 48), Storage("pivoted"), Allowed(multiple))) for c in curves
        ]
    mlps = [dataclasses.replace(mlp, allowed=Allowed(multiple), _known={}) for mlp in mlps]
    budget = int(share * whole(curves, mlps))
    widths, ranks = loss_widths_and_ranks(curves, mlps, budget)
    loss, spent = outcome(curves, mlps, widths, ranks)
    assert spent <= budget and loss < float("inf")
    assert all(width == 150 or width % multiple == 0 for width in widths)
    shapes = [(48, 48) if c else None for c in curves]
    for mlp, width in zip(mlps, widths, strict=True):
        for member, shape in zip(mlp.members, mlp.shapes_at(width), strict=True):
            shapes[member] = shape
    assert all(rank == min(shape) or rank % multiple == 0 for rank, shape in zip(ranks, shapes, strict=True))
    assert spent > budget - multiple * (3 * 48 + 150)  # no room for a multiple of everything


def test_a_fine_grained_budget_is_met_to_a_thousandth():
    curves, mlps = model(layers=12, n=192, hidden=48)
    budget = int(0.6 * whole(curves, mlps))
    assert outcome(curves, mlps, *loss_widths_and_ranks(curves, mlps, budget))[1] >= 0.999 * budget


@pytest.mark.parametrize("ranked", [True, False])
def test_more_parameters_never_add_loss(ranked):
    curves, mlps = model(layers=3, n=48, hidden=16, ranked=ranked)
    size, losses = whole(curves, mlps), []
    for share in (0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
        widths, ranks = loss_widths_and_ranks(curves, mlps, int(share * size))
        losses.append(outcome(curves, mlps, widths, ranks)[0])
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0


@pytest.mark.parametrize("ranked", [True, False])
def test_a_full_budget_removes_nothing(ranked):
    curves, mlps = model(layers=2, n=20, hidden=8, ranked=ranked)
    widths, ranks = loss_widths_and_ranks(curves, mlps, int(whole(curves, mlps)))
    assert widths == [20, 20] and outcome(curves, mlps, widths, ranks) == (0, whole(curves, mlps))


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_where_nothing_adds_loss_the_budget_is_spread_evenly(ranked, share):
    curves, mlps = model(layers=2, n=64, hidden=16, ranked=ranked)
    curves = [c and RankCurve(c.tails.where(c.tails.isinf(), 0), c.sizes) for c in curves]
    silent = [torch.zeros_like(spectra) for spectra in mlps[0].spectra]
    mlps = [MlpCurves(m.members, m.shapes, 1, 0 * m.removal, m.widths, tuple(silent), m.storages, ranked) for m in mlps]
    budget = int(share * whole(curves, mlps))
    widths, ranks = loss_widths_and_ranks(curves, mlps, budget)
    assert 0.96 * budget <= outcome(curves, mlps, widths, ranks)[1] <= budget
    assert abs(widths[0] - widths[1]) <= 4 and abs(ranks[0] - ranks[4]) <= 1


def test_both_moves_are_better_than_either():
    curves, mlps = model(layers=3, n=64, hidden=24, seed=5)
    alone_curves, alone = model(layers=3, n=64, hidden=24, seed=5, ranked=False)
    full = [MlpCurves(m.members, m.shapes, m.fused, m.removal * 1e9, m.widths, m.spectra, m.storages) for m in mlps]
    for share in (0.5, 0.7, 0.9):
        budget = int(share * whole(curves, mlps))
        both = outcome(curves, mlps, *loss_widths_and_ranks(curves, mlps, budget))[0]
        neurons = outcome(alone_curves, alone, *loss_widths_and_ranks(alone_curves, alone, budget))[0]
        widths, ranks = loss_widths_and_ranks(curves, full, budget)
        assert widths == [64] * 3
        assert both <= min(neurons, outcome(curves, full, widths, ranks)[0]) + 1e-9


def test_dead_neurons_are_removed_first():
    curves, mlps = model(layers=2, n=64, hidden=16, ranked=False)
    dead = torch.cat([torch.zeros(33), torch.arange(1, 33)]).double()
    mlps[1] = MlpCurves(
        mlps[1].members, mlps[1].shapes, 1, dead, mlps[1].widths, mlps[1].spectra, mlps[1].storages, False
    )
    budget = int(whole(curves, mlps)) - 32 * 48
    widths, ranks = loss_widths_and_ranks(curves, mlps, budget)
    assert widths == [64, 32] and outcome(curves, mlps, widths, ranks) == (0, budget)


def test_the_least_budget_holds_the_narrowest_mlps():
    curves, mlps = model(layers=2, n=16, hidden=8, ranked=False)
    smallest = 2 * 8 * 8 + 2 * 3 * 8
    widths, _ = loss_widths_and_ranks(curves, mlps, smallest)
    assert widths == [1, 1] and least_parameters(curves, mlps) == smallest


@pytest.mark.parametrize("width", [1, 9, 10, 37, 64])
def test_tails_between_known_widths_lie_between_theirs(width):
    mlp = mlp_curves(0, 64, 16, seed=3)
    curves = mlp.curves_at(width)
    assert [len(c.tails) for c in curves] == [min(s) for s in mlp.shapes_at(width)]
    lower = max((w for w in mlp.widths if w <= width), default=mlp.widths[0])
    upper = min(w for w in mlp.widths if w >= width)
    for curve, values in zip(curves, mlp.spectra, strict=True):
        assert curve.tails[-1] == 0 and bool((curve.tails.diff() <= 0).all())
        below, above = (tails_of(values[mlp.widths.index(w)])[: len(curve.tails)] for w in (lower, upper))
        inner = slice(0, len(curve.tails) - 1)
        assert bool((curve.tails[inner] >= below[inner] - 1e-12).all())
        assert bool((curve.tails[inner] <= above[inner] + 1e-12).all())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_neurons(n):
    curves, mlps = model(layers=2, n=n, hidden=6)
    for share in (0.7, 0.9):
        budget = int(share * whole(curves, mlps))
        widths, ranks = loss_widths_and_ranks(curves, mlps, budget)
        assert outcome(curves, mlps, widths, ranks)[1] <= budget and all(1 <= w <= n for w in widths)


def test_results_repeat():
    first, second = (loss_widths_and_ranks(*model(layers=3, n=48, hidden=16), 4000) for _ in range(2))
    assert first == second
