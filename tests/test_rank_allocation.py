"""Ranks from spectra and a budget: metrics, Stage 1 and 2, the loss allocation, clusters of layers."""

import math

import pytest
import torch
from conftest import assert_budget_spent

from hisvd.cluster_sublayer_lwe import cluster_scores, tail_redundancy
from hisvd.clustering import layer_clusters, subspace_overlap
from hisvd.errors import HiSVDError
from hisvd.factor_forms import FORMS
from hisvd.rank_allocation import (
    budget_of,
    project_shares,
    ranks_from_shares,
    stage1_shares,
    uniform_shares,
)
from hisvd.rank_metrics import RANK_METRICS, effective_rank, mathematical_rank, rank_of, stable_rank
from hisvd.refinement import MODULATIONS, stage2_factors
from hisvd.shape_utils import Sublayer, is_dense, largest_rank, next_rank, stored_parameters
from hisvd.width_allocation import loss_ranks

SHAPES = {"q": (64, 64), "k": (32, 64), "up": (160, 64), "down": (64, 160)}
SUBLAYERS = [Sublayer(f"{i}.{t}", i, t, t, *shape) for i in range(6) for t, shape in SHAPES.items()]

TYPES = [s.path for s in SUBLAYERS]


def refined(shares, spectra, target, form, modulation, strength):
    """Stage 1 shares after Stage 2, clusters by type."""
    ranks = ranks_from_shares(shares, SUBLAYERS, target, form)
    factors = stage2_factors(spectra, ranks, TYPES, modulation, strength, 1.0)
    return project_shares([s * f for s, f in zip(shares, factors, strict=True)], SUBLAYERS, target, form)


def random_spectrum(sublayer, seed):
    generator = torch.Generator().manual_seed(seed)
    decay = 0.01 + 0.2 * torch.rand(1, generator=generator)
    return torch.exp(-decay * torch.arange(sublayer.full_rank))


# --- shapes ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (8, 8), (1, 7), (2, 3)])
def test_largest_rank_is_the_largest_that_fits(shape, form):
    m, n = shape
    useful = [r for r in range(1, min(shape)) if not is_dense(r, shape, form)] + [min(shape)]
    for parameters in range(m + n, m * n + 1):
        fitting = [r for r in useful if stored_parameters(r, shape, form) <= parameters]
        assert largest_rank(parameters, shape, form) == max(fitting, default=1), parameters


@pytest.mark.parametrize("form", FORMS)
def test_next_rank_walks_through_every_useful_rank_to_dense(form):
    rank, seen = 1, []
    while rank < 9:
        seen.append(stored_parameters(rank, (9, 14), form))
        rank = next_rank(rank, (9, 14), form)
    assert seen == sorted(set(seen)) and seen[-1] < 9 * 14
    assert stored_parameters(rank, (9, 14), form) == 9 * 14


# --- rank metrics ---


def test_rank_metrics_on_spectra_with_known_answers():
    flat, single = torch.ones(10), torch.tensor([3.0, 0, 0])
    assert stable_rank(flat) == pytest.approx(10) and effective_rank(flat) == pytest.approx(10)
    assert stable_rank(single) == pytest.approx(1) and effective_rank(single) == pytest.approx(1)
    assert mathematical_rank(flat, (10, 20)) == 10 and mathematical_rank(single, (3, 3)) == 1
    two = torch.tensor([2.0, 1.0])
    assert stable_rank(two) == pytest.approx(5 / 4)
    assert effective_rank(two) == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert stable_rank(torch.zeros(4)) == effective_rank(torch.zeros(4)) == 0


def test_mathematical_rank_agrees_with_torch():
    matrix = torch.randn(30, 7) @ torch.randn(7, 20)
    assert mathematical_rank(torch.linalg.svdvals(matrix), (30, 20)) == torch.linalg.matrix_rank(matrix) == 7


# --- Stage 1 and the budget ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
@pytest.mark.parametrize("method", RANK_METRICS)
def test_budget_is_met_from_below_and_spent(form, target, method):
    spectra = [random_spectrum(s, i) for i, s in enumerate(SUBLAYERS)]
    ranks = [rank_of(sigma, s.shape, method) for sigma, s in zip(spectra, SUBLAYERS, strict=True)]
    shares = stage1_shares(SUBLAYERS, ranks, target, 1.0, form)
    assert sum(shares) == pytest.approx(budget_of(SUBLAYERS, target), rel=1e-9)
    shares = refined(shares, spectra, target, form, "logarithmic", 1.0)
    assert sum(shares) == pytest.approx(budget_of(SUBLAYERS, target), rel=1e-9)
    assert_budget_spent(ranks_from_shares(shares, SUBLAYERS, target, form), SUBLAYERS, target, form)


def test_stage1_weights_follow_the_log_density():
    ranks = [2.0 + i for i in range(len(SUBLAYERS))]
    shares = stage1_shares(SUBLAYERS, ranks, 0.5, 1.0, "pivoted")
    densities = [math.log(r) / math.log(s.full_rank) for r, s in zip(ranks, SUBLAYERS, strict=True)]
    ratios = [share / s.size / d for share, s, d in zip(shares, SUBLAYERS, densities, strict=True) if share < s.size]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_alpha_zero_is_uniform_and_target_one_is_dense():
    ranks = [2.0 + i for i in range(len(SUBLAYERS))]
    assert stage1_shares(SUBLAYERS, ranks, 0.5, 0.0, "svd") == pytest.approx(uniform_shares(SUBLAYERS, 0.5))
    shares = stage1_shares(SUBLAYERS, ranks, 1.0, 1.0, "pivoted")
    assert ranks_from_shares(shares, SUBLAYERS, 1.0, "pivoted") == [s.full_rank for s in SUBLAYERS]


def test_projection_clips_and_keeps_proportions():
    shares = [1e9] + [1.0] * (len(SUBLAYERS) - 1)
    projected = project_shares(shares, SUBLAYERS, 0.5, "pivoted")
    assert projected[0] == SUBLAYERS[0].size
    free = [share for share, s in zip(projected, SUBLAYERS, strict=True) if share < s.size]
    assert len(free) > 6 and max(free) == pytest.approx(min(free))
    assert sum(projected) == pytest.approx(budget_of(SUBLAYERS, 0.5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [0.9, 0.6, 0.3])
def test_loss_allocation_meets_the_budget_and_beats_uniform_in_its_objective(form, target):
    spectra = [random_spectrum(s, i) * (1 + i % 5) for i, s in enumerate(SUBLAYERS)]

    def tails(ranks):
        return sum(sigma[r:].double().square().sum().item() for sigma, r in zip(spectra, ranks, strict=True))

    chosen = loss_ranks(spectra, SUBLAYERS, target, form)
    assert_budget_spent(chosen, SUBLAYERS, target, form)
    uniform = ranks_from_shares(uniform_shares(SUBLAYERS, target), SUBLAYERS, target, form)
    assert tails(chosen) < tails(uniform)


def test_loss_allocation_is_exact_on_a_problem_small_enough_for_brute_force():
    from itertools import product

    few = [Sublayer(str(i), i, "t", "t", *shape) for i, shape in enumerate([(4, 6), (6, 4), (5, 5)])]
    for seed in range(20):
        spectra = [
            torch.rand(4 + (i == 2), generator=torch.Generator().manual_seed(10 * seed + i)).sort(descending=True)[0]
            for i in range(3)
        ]

        def tail(ranks, spectra=spectra):
            return sum(sigma[r:].double().square().sum().item() for sigma, r in zip(spectra, ranks, strict=True))

        def cost(ranks):
            return sum(stored_parameters(r, s.shape, "pivoted") for r, s in zip(ranks, few, strict=True))

        chosen = loss_ranks(spectra, few, 0.7, "pivoted")
        assert cost(chosen) <= budget_of(few, 0.7)
        rivals = [r for r in product(range(1, 5), range(1, 5), range(1, 6)) if cost(r) <= cost(chosen)]
        slack = max(s[0].item() ** 2 for s in spectra)  # one step of one matrix: the distance from the convex hull
        assert tail(chosen) <= min(map(tail, rivals)) + slack


def test_impossible_target_is_refused():
    with pytest.raises(HiSVDError, match="rank 1 everywhere"):
        project_shares(uniform_shares(SUBLAYERS, 0.01), SUBLAYERS, 0.01, "svd")


# --- Stage 2 ---


def test_tail_redundancy_of_flat_single_and_short_tails():
    assert tail_redundancy(torch.tensor([9.0, 1, 1, 1, 1]), 1) == pytest.approx(0)
    assert tail_redundancy(torch.tensor([9.0, 5, 0, 0, 0]), 1) == pytest.approx(1 - 1 / 4)
    assert tail_redundancy(torch.tensor([9.0, 5]), 1) is None


def test_cluster_scores_are_relative_means_and_zero_without_tails():
    scores = cluster_scores([0.1, 0.3, 0.6, None], ["a", "a", "b", "c"], weight=2.0)
    assert scores == pytest.approx({"a": 2 * 0.2 / 0.4, "b": 2 * 0.6 / 0.4, "c": 0.0})


def test_modulations_as_defined():
    assert MODULATIONS["logarithmic"](1.5, 2.0) == pytest.approx(1 / (1 + 2 * math.log(2.5)))
    assert MODULATIONS["power"](1.5, 2.0) == pytest.approx(2.5**-2)
    assert MODULATIONS["exponential"](1.5, 2.0) == pytest.approx(math.exp(-3))
    assert MODULATIONS["linear"](0.25, 2.0) == pytest.approx(0.5)
    assert MODULATIONS["linear"](1.5, 2.0) == 0.05
    for modulation in MODULATIONS.values():
        assert modulation(1.5, 0.0) == modulation(0.0, 2.0) == 1


def test_rules_are_looked_up_by_name(monkeypatch):
    monkeypatch.setitem(RANK_METRICS, "largest", lambda sigma, shape: max(shape) * float(sigma[0]))
    assert rank_of(torch.tensor([0.5, 0.1]), (4, 8), "largest") == 4
    assert rank_of(torch.zeros(4), (4, 8), "stable") == 1
    monkeypatch.setitem(MODULATIONS, "half", lambda score, strength: 0.5)
    assert stage2_factors([torch.ones(4)] * 2, [1, 2], "ab", "half", 1.0, 1.0) == [0.5, 0.5]
    with pytest.raises(KeyError, match="no such"):
        rank_of(torch.ones(4), (4, 8), "no such")
    with pytest.raises(KeyError, match="no such"):
        stage2_factors([torch.ones(4)] * 2, [1, 2], "ab", "no such", 1.0, 1.0)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_stage2_takes_from_the_types_with_redundant_tails(modulation):
    flat = {"q": 0.0, "k": 0.001, "up": 0.02, "down": 0.2}  # decay: the faster, the more redundant the tail
    spectra = [torch.exp(-flat[s.path] * torch.arange(s.full_rank)) for s in SUBLAYERS]
    shares = project_shares(uniform_shares(SUBLAYERS, 0.5), SUBLAYERS, 0.5, "pivoted")
    after = refined(shares, spectra, 0.5, "pivoted", modulation, 0.5)
    change = {s.path: new / old for s, new, old in zip(SUBLAYERS, after, shares, strict=True)}
    assert change["q"] > change["k"] > change["up"] > change["down"]
    assert refined(shares, spectra, 0.5, "pivoted", modulation, 0.0) == pytest.approx(shares)


# --- clusters of adjacent layers ---


def test_overlap_of_equal_orthogonal_and_half_equal_subspaces():
    eye = torch.eye(6)
    assert subspace_overlap(eye[:2], eye[:2]) == pytest.approx(1)
    assert subspace_overlap(eye[:2], eye[2:4]) == pytest.approx(0)
    assert subspace_overlap(eye[:2], eye[1:3]) == pytest.approx(0.5)


def test_layers_are_cut_where_their_subspaces_change():
    torch.manual_seed(0)
    parents = [torch.linalg.qr(torch.randn(40, 4)).Q for _ in range(3)]
    sizes, layers = (2, 4, 3), []
    for parent, size in zip(parents, sizes, strict=True):
        for _ in range(size):
            layers.append({"q": torch.linalg.qr(parent + 0.05 * torch.randn(40, 4)).Q.T})
    assert layer_clusters(layers) == [0, 0, 1, 1, 1, 1, 2, 2, 2]  # three: the square root of nine
    assert layer_clusters(layers[:1]) == [0]
