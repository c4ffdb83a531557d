"""Moments and their roots, and the factors that are optimal in their metric."""

import math

import pytest
import torch

from hisvd.cached_moments import packed, packed_shape, unpacked
from hisvd.whitening_svd import (
    F_DAMPING,
    H_DAMPING,
    cholesky_root,
    gram,
    left_singular_vectors,
    optimal_factors,
    second_moment,
    singular_values,
    whitened,
)


def random_psd(n, rank, seed):
    x = torch.randn(rank, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / rank


def random_moment(n, damping, seed):
    return second_moment(random_psd(n, 3 * n, seed), damping)


def dense_moment(moment):
    return moment.root @ moment.root.T


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (7, 7)])
def test_factors_are_the_best_rank_r_matrix_in_the_weighted_objective(m, n, two_sided):
    torch.manual_seed(m)
    weight = torch.randn(m, n, dtype=torch.float64)
    h = random_moment(n, H_DAMPING, seed=n)
    f = random_moment(m, F_DAMPING, seed=m) if two_sided else None
    metric = dense_moment(h)
    gradient_metric = dense_moment(f) if two_sided else torch.eye(m, dtype=torch.float64)

    def error(candidate):
        return torch.trace(gradient_metric @ (weight - candidate) @ metric @ (weight - candidate).T).item()

    root = torch.linalg.cholesky(dense_moment(h))
    sigma = singular_values(whitened(weight, root, f))
    factors = optimal_factors(weight, root, f, 5)
    for rank in (1, 3, 5):
        left, right, seen = factors.cut(rank)
        assert left.shape == (m, rank) and right.shape == (rank, n)
        torch.testing.assert_close(seen, right @ root)
        assert error(left @ right) == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-6)
        # Brute force: alternating weighted least squares from random starts cannot do better.
        for seed in range(5):
            u = torch.randn(m, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for _ in range(200):
                v = torch.linalg.solve(u.T @ gradient_metric @ u, u.T @ gradient_metric @ weight)
                u = weight @ metric @ v.T @ torch.linalg.pinv(v @ metric @ v.T)
            assert error(left @ right) <= error(u @ v) * (1 + 1e-6)


def test_two_sided_with_the_identity_is_input_whitening():
    torch.manual_seed(0)
    weight, root = torch.randn(8, 12, dtype=torch.float64), cholesky_root(random_psd(12, 36, seed=1), H_DAMPING)
    identity = second_moment(torch.eye(8), F_DAMPING)
    products = []
    for f in (None, identity):
        left, right, _ = optimal_factors(weight, root, f, 3)
        products.append(left @ right)
    torch.testing.assert_close(products[0], products[1])


@pytest.mark.parametrize("whitening", ["none", "input", "two_sided"])
@pytest.mark.parametrize("deficient", [False, True])
def test_factors_of_a_tall_weight_are_those_of_its_left_singular_vectors(whitening, deficient):
    """Also where it loses rank: `left` then still has its full rank, without which it could not be packed."""
    weight = torch.randn(30, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if deficient:
        weight[:, 6:] = weight[:, :6]
    root = None if whitening == "none" else cholesky_root(random_psd(12, 36, seed=1), H_DAMPING)
    f = random_moment(30, F_DAMPING, seed=2) if whitening == "two_sided" else None
    basis = left_singular_vectors(whitened(weight, root, f))[:, :5]
    outer, inner = f.projection(basis) if f else (basis, basis)
    factors = optimal_factors(weight, root, f, 9)
    torch.testing.assert_close(factors.left[:, :5] @ factors.right[:5], outer @ inner.T @ weight)
    assert torch.linalg.cond(factors.left) < 1e4
    if root is not None:
        torch.testing.assert_close(factors.seen, factors.right @ root)


def test_singular_values_and_vectors_agree_with_the_svd_also_when_rank_deficient():
    for shape in [(12, 30), (30, 12)]:
        matrix = torch.randn(shape[0], 5).double() @ torch.randn(5, shape[1]).double()
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(singular_values(matrix)[:5], s[:5])
        assert singular_values(matrix)[5:].max() < 1e-6 * s[0]
        basis = left_singular_vectors(matrix)
        torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=torch.float64))
        torch.testing.assert_close(basis[:, :5] @ basis[:, :5].T, u[:, :5] @ u[:, :5].T)


@pytest.mark.parametrize("spread", [1e1, 1e3, 1e6])
def test_factors_lose_nothing_where_f_is_kept_in_float32(spread):
    m, n, rank = 40, 60, 8
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    root, basis = cholesky_root(random_psd(n, 90, 1), H_DAMPING), torch.linalg.qr(random_psd(m, m, 2)).Q
    moment = 1e-9 * (basis * torch.logspace(0, math.log10(spread), m, dtype=torch.float64)) @ basis.T
    exact = second_moment(moment, F_DAMPING)
    losses = []
    for kept in (packed(moment), packed(moment).float()):
        f = second_moment(unpacked(kept), F_DAMPING)
        left, right, _ = optimal_factors(weight, root, f, rank)
        losses.append(whitened(weight - left @ right, root, exact).square().sum())
    assert losses[1] <= (1 + 1e-5) * losses[0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_symmetric_matrices_are_packed_without_loss(n):
    matrix = random_psd(n, n, 0)
    rectangle = packed(matrix)
    assert tuple(rectangle.shape) == packed_shape(n) and rectangle.numel() == n * (n + 1) // 2
    assert torch.equal(unpacked(rectangle), matrix.tril() + matrix.tril(-1).T)
    assert sorted(rectangle.flatten().tolist()) == sorted(matrix[tuple(torch.tril_indices(n, n))].tolist())


@pytest.mark.parametrize("shape", [(5, 3), (3, 400), (50, 1001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gram_is_the_product(shape, dtype, monkeypatch):
    """Values of 16 bits alone may be multiplied in TF32, which holds them whole."""
    allowed, mm = [], torch.mm

    def watched(*args, **kwargs):
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = gram(x)
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(product.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert set(allowed) == {dtype.itemsize == 2} and not torch.backends.cuda.matmul.allow_tf32
