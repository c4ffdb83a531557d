"""Rounding of factors to the storage dtype, and the Cholesky root it is measured by."""

import itertools

import pytest
import torch

from hisvd import rounding
from hisvd.rounding import Pair, round_products, round_with_feedback
from hisvd.whitening_svd import cholesky_root


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_inputs(n, seed=0):
    """The second moment of inputs that share one strong component."""
    inputs = normal(n, 4 * n, seed=seed) + 10 * normal(1, 4 * n, seed=seed + 1)
    return inputs @ inputs.T


def bfloat16(column, _):
    return column.bfloat16()


def pair(outer, inner, root):
    return Pair(outer, inner, inner if root is None else inner @ root)


def round_product(outer, inner, root, dtype):
    """One pair alone, in float64."""
    ((outer, inner),) = round_products([pair(outer, inner, root)], root, dtype)
    assert outer.dtype == inner.dtype == dtype
    return outer.double(), inner.double()


def on_grid(values, dtype):
    return torch.equal(values, values.to(dtype).double())


def test_cholesky_root_is_a_root_also_where_rounding_left_eigenvalues_below_zero():
    moment = correlated_inputs(20)
    root = cholesky_root(moment, 0.0)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, moment)
    vector = normal(20, 1)
    indefinite = vector @ vector.T - 1e-3 * torch.eye(20)
    root = cholesky_root(indefinite, 1e-6)
    torch.testing.assert_close(root @ root.T, vector @ vector.T, rtol=0, atol=2e-3)
    assert cholesky_root(torch.zeros(3, 3), 1e-3).isfinite().all()


def test_independent_inputs_round_to_nearest():
    weight = normal(7, 300)
    rounded = round_with_feedback(weight, torch.diag(normal(300).abs() + 0.1), bfloat16)
    assert torch.equal(rounded.values, weight.bfloat16().double())


def test_feedback_comes_near_the_best_point_of_the_grid_and_far_below_nearest():
    """Against all neighbours within one step of the grid, for six columns."""
    root = torch.linalg.cholesky(correlated_inputs(6))
    errors = {"feedback": 0.0, "nearest": 0.0, "best": 0.0}
    for seed in range(20):
        weight = 1.5 + 0.1 * normal(1, 6, seed=seed)  # one binade: the grid of bfloat16 has steps of 1/128
        nearest = weight.bfloat16().double()
        steps = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)), dtype=torch.float64) / 128
        rounded = round_with_feedback(weight, root, bfloat16).values
        assert on_grid(rounded, torch.bfloat16)
        errors["feedback"] += ((weight - rounded) @ root).square().sum().item()
        errors["nearest"] += ((weight - nearest) @ root).square().sum().item()
        errors["best"] += ((weight - nearest - steps) @ root).square().sum(1).min().item()
    assert errors["best"] <= errors["feedback"] < 1.5 * errors["best"], errors
    assert errors["feedback"] < errors["nearest"] / 4, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_has_a_smaller_output_error_than_rounding_to_nearest(dtype):
    outer, inner, root = normal(200, 150), normal(150, 300, seed=1), torch.linalg.cholesky(correlated_inputs(300))
    rounded = round_product(outer, inner, root, dtype)
    assert all(on_grid(t, dtype) for t in rounded)
    exact = outer @ inner @ root

    def error(outer, inner):
        return ((outer @ inner @ root - exact).norm() / exact.norm()).item()

    assert error(*rounded) < 0.7 * error(outer.to(dtype).double(), inner.to(dtype).double())


def test_without_a_root_and_in_float32():
    outer, inner = normal(50, 20), normal(20, 60, seed=1)
    nearest = [t.bfloat16().double() for t in (outer, inner)]
    rounded = round_product(outer, inner, None, torch.bfloat16)
    assert (rounded[0] @ rounded[1] - outer @ inner).norm() < (nearest[0] @ nearest[1] - outer @ inner).norm()
    for exact, kept in zip((outer, inner), round_product(outer, inner, None, torch.float32), strict=True):
        assert torch.equal(kept, exact.float().double())
    empty, _ = round_product(normal(0, 20), inner, None, torch.bfloat16)
    assert empty.shape == (0, 20)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_what_is_lost_is_known_without_a_product(n):
    weight, root = normal(9, n), torch.linalg.cholesky(correlated_inputs(n))
    values, lost = round_with_feedback(weight, root, bfloat16)
    assert on_grid(values, torch.bfloat16)
    torch.testing.assert_close(lost, (weight - values) @ root, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_root", [True, False])
def test_pairs_are_rounded_together_as_each_is_alone(monkeypatch, with_root):
    root = torch.linalg.cholesky(correlated_inputs(90)) if with_root else None
    pairs = [pair(normal(m, r, seed=r), normal(r, 90, seed=m), root) for m, r in ((50, 40), (0, 7), (60, 30), (9, 1))]
    alone = [round_product(p.outer, p.inner, root, torch.bfloat16) for p in pairs]
    for stacked in (2048, 40):
        monkeypatch.setattr(rounding, "STACKED", stacked)
        together = list(round_products(iter(pairs), root, torch.bfloat16))
        for found, expected in zip(together, alone, strict=True):
            assert all(torch.equal(a.double(), b) for a, b in zip(found, expected, strict=True))
