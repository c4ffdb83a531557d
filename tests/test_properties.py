"""Properties of the mathematics over random shapes and numbers: rank-deficient, zero, tied, large and small ones."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import assert_budget_spent
from hypothesis import given, settings
from hypothesis import strategies as st

from hisvd.clustering import layer_clusters
from hisvd.errors import HiSVDError
from hisvd.factor_forms import FORMS, dense_weight, factor_tensors
from hisvd.integer_codes import INTEGERS, dequantize_codes, pack_codes, unpack_codes
from hisvd.neurons import DAMPING, eliminate, fitting_moment, refits
from hisvd.quantization import fit_codes
from hisvd.rank_allocation import budget_of, project_shares, ranks_from_shares, stage1_shares, uniform_shares
from hisvd.rank_metrics import RANK_METRICS, rank_of
from hisvd.refinement import MODULATIONS, stage2_factors
from hisvd.rounding import round_with_feedback
from hisvd.shape_utils import Sublayer, is_dense
from hisvd.sparse_int6 import check_packed, dequantize, make_encodable, pack, pack_weight, padded, unpack
from hisvd.whitening_svd import (
    F_DAMPING,
    H_DAMPING,
    cholesky_root,
    gram,
    optimal_factors,
    second_moment,
    singular_values,
    whitened,
)
from hisvd.width_allocation import loss_ranks

SIZES, SEEDS = st.integers(1, 14), st.integers(0, 2**31)
KINDS = st.sampled_from(["plain", "deficient", "zero", "tied", "outlier", "small"])


def some(examples, *strategies):
    """Run a test on that many draws, the same ones in every run."""
    return lambda test: settings(max_examples=examples, deadline=None, derandomize=True, database=None)(
        given(*strategies)(test)
    )


def matrix(m, n, kind, seed):
    """A float64 matrix (m, n) of that kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if kind == "deficient":
        rank = max(1, min(m, n) // 2)
        x = x[:, :rank] @ torch.randn(rank, n, generator=generator, dtype=torch.float64)
    elif kind == "tied":  # all singular values are equal
        x = torch.linalg.qr(x if m >= n else x.T).Q
        x = x if m >= n else x.T
    elif kind == "outlier":
        x[-1, -1] = 1e4
    return x * {"zero": 0, "small": 1e-12}.get(kind, 1)


def moment(n, kind, seed, tokens=9):
    """E[x xᵀ] (n, n) of inputs of that kind; where n > 9 there are fewer tokens than inputs."""
    x = matrix(tokens, n, kind, seed)
    return x.T @ x / tokens


@some(60, SIZES, SIZES, KINDS, KINDS, KINDS, SEEDS, st.sampled_from(list(FORMS)))
def test_factors_leave_the_tail_and_any_form_stores_them(m, n, weights, inputs, gradients, seed, form):
    weight, h = matrix(m, n, weights, seed), moment(n, inputs, seed + 1)
    root = cholesky_root(h, H_DAMPING)
    f = second_moment(moment(m, gradients, seed + 2), F_DAMPING)
    seen = whitened(weight, root, f)
    sigma, rank = singular_values(seen), 1 + seed % min(m, n)
    left, right, _ = optimal_factors(weight, root, f, rank)
    assert left.shape == (m, rank) and right.shape == (rank, n)
    missed = whitened(weight - left @ right, root, f).square().sum()
    energy = sigma.square().sum()
    assert missed <= sigma[rank:].square().sum() + 1e-9 * energy
    if not is_dense(rank, (m, n), form):
        entries = factor_tensors(left, right, form, torch.float64, root)
        product = left @ right
        assert (dense_weight(entries, n) - product).norm() <= 1e-9 * left.norm() * right.norm()
        assert sum(t.numel() for k, t in entries.items() if k != "permutation") == FORMS[form].parameters(rank, (m, n))


@some(40, SIZES, SIZES, KINDS, KINDS, KINDS, SEEDS)
def test_removed_neurons_cost_what_a_refit_leaves(m, n, weights, inputs, gradients, seed):
    weight, c = matrix(m, n, weights, seed), fitting_moment(moment(n, inputs, seed + 1), None, DAMPING)
    f = second_moment(moment(m, gradients, seed + 2), F_DAMPING)
    order, losses = eliminate(weight, c, f)
    assert sorted(order.tolist()) == list(range(n)) and len(losses) == n + 1
    assert losses[0] == 0 and (losses.diff() >= 0).all()
    removed = seed % (n + 1)
    kept = order[removed:].sort().values
    change = weight.clone()
    if len(kept):
        change[:, kept] -= refits(weight, c, kept).at(len(kept))
    left = torch.trace(f.root @ f.root.T @ change @ c @ change.T) / 2
    error = 2 if inputs == "zero" else 1e-7  # a moment that is zero is damped twice
    assert losses[removed].item() == pytest.approx(left.item(), rel=1e-5, abs=error * losses[-1].item() + 1e-200)


@some(60, st.integers(1, 9), st.integers(1, 100), KINDS, SEEDS, st.sampled_from(list(INTEGERS)))
def test_integer_codes(m, n, kind, seed, name):
    weight, form = matrix(m, n, kind, seed), INTEGERS[name]
    root = cholesky_root(moment(n, "plain", seed + 1), 0.1)
    codes, scales, stands_for = fit_codes(weight, root, name)
    assert codes.abs().max() <= form.largest and (scales > 0).all() and scales.isfinite().all()
    packed = pack_codes(codes, name)
    assert packed.nbytes + scales.nbytes == form.bytes(m, n) and torch.equal(unpack_codes(packed, n), codes)
    torch.testing.assert_close(dequantize_codes(packed, scales, n, torch.float64), stands_for, rtol=1e-12, atol=0)
    nearest = fit_codes(weight, torch.eye(n, dtype=torch.float64), name).weight
    half = weight.abs().amax(1) / form.largest / 2  # a step as wide as the row asks for
    assert ((weight - nearest).square().sum(1) <= 1.1 * n * half.square() + 1e-20).all()


@some(40, st.integers(1, 9), st.integers(1, 150), KINDS, SEEDS)
def test_int6(m, n, kind, seed):
    weight = matrix(m, n, kind, seed).float()
    packed = pack_weight(weight)
    check_packed(**packed, shape=(m, n))
    found = dequantize(**packed, in_features=n, dtype=torch.float32)
    assert found.shape == (m, n) and found.isfinite().all()
    q = make_encodable(torch.randint(-32, 32, padded(weight).shape, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(unpack(*pack(q.to(torch.int8))), q.to(torch.int8))


@some(60, SIZES, SIZES, KINDS, SEEDS, st.sampled_from([1e-3, 0.1, 3.0]))
def test_rounding_with_feedback_stays_within_half_a_step_of_every_direction(m, n, kind, seed, step):
    weight, root = matrix(m, n, kind, seed), cholesky_root(moment(n, "deficient", seed), 1e-3)
    rounded, lost = round_with_feedback(weight, root, lambda column, _: (column / step).round() * step)
    torch.testing.assert_close((rounded / step).round() * step, rounded)
    # Babai's bound: what is left along each direction of the root is at most half a step of it.
    bound = m * (root.diagonal() * step / 2).square().sum()
    torch.testing.assert_close(lost, (weight - rounded) @ root, rtol=1e-6, atol=1e-9 * (1 + weight.abs().max().item()))
    assert lost.square().sum() <= bound * (1 + 1e-6) + 1e-12 * weight.square().sum()


SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)


@some(60, SHAPES, KINDS, SEEDS, st.floats(0.01, 1), st.sampled_from(list(FORMS)), st.sampled_from(list(MODULATIONS)))
def test_every_allocation_spends_the_budget_or_says_that_it_is_too_small(shapes, kind, seed, target, form, modulation):
    sublayers = [Sublayer(str(i), i, "t", "t", m, n) for i, (m, n) in enumerate(shapes)]
    spectra = [torch.linalg.svdvals(matrix(m, n, kind, seed + i)) for i, (m, n) in enumerate(shapes)]
    try:
        loss = loss_ranks(spectra, sublayers, target, form)
        ranks = [rank_of(v, s.shape, "effective") for v, s in zip(spectra, sublayers, strict=True)]
        shares = stage1_shares(sublayers, ranks, target, 1.0, form)
    except HiSVDError as error:
        assert "too small" in str(error)
        return
    first = ranks_from_shares(shares, sublayers, target, form)
    factors = stage2_factors(spectra, first, ["t"] * len(first), modulation, 1.0, 1.0)
    assert all(0 < factor < math.inf for factor in factors)
    second = project_shares([s * f for s, f in zip(shares, factors, strict=True)], sublayers, target, form)
    uniform = project_shares(uniform_shares(sublayers, target), sublayers, target, form)
    for found in (shares, second, uniform):
        assert sum(found) <= budget_of(sublayers, target) + 1e-6
        assert all(0 < share <= s.size for share, s in zip(found, sublayers, strict=True))
    for found in (loss, first, *(ranks_from_shares(s, sublayers, target, form) for s in (second, uniform))):
        assert_budget_spent(found, sublayers, target, form)


@some(60, SIZES, SIZES, KINDS, SEEDS)
def test_ranks_of_a_matrix_are_at_most_its_size(m, n, kind, seed):
    x = matrix(m, n, kind, seed)
    sigma = singular_values(x)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(x), rtol=1e-6, atol=1e-7 * float(sigma[0]))
    values = {name: metric(torch.linalg.svdvals(x), (m, n)) for name, metric in RANK_METRICS.items()}
    most = min(m, n) * (1 + 1e-9)
    assert all(0 <= value <= most for value in values.values())
    assert values["stable"] <= values["effective"] * (1 + 1e-9)
    assert all(value >= 1 - 1e-9 for value in values.values()) == (kind != "zero")


@some(40, SIZES, st.integers(1, 500), KINDS, SEEDS)
def test_gram(t, n, kind, seed):
    x = matrix(t, n, kind, seed)
    torch.testing.assert_close(gram(x), x.T @ x)


@some(40, st.integers(1, 12), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 20)), SEEDS)
def test_clusters_are_runs_of_layers(layers, size, wanted, seed):
    vectors = [{"t": torch.linalg.qr(matrix(8, size, "plain", seed + i)).Q.T} for i in range(layers)]
    clusters = layer_clusters(vectors, wanted)
    assert len(clusters) == layers and clusters[0] == 0
    assert all(b - a in (0, 1) for a, b in pairwise(clusters))
    assert clusters[-1] + 1 == min(wanted or max(1, round(math.sqrt(layers))), layers)
