"""Lossless packing of two factors: rows of the product, and coefficients of all others."""

import pytest
import torch

from hisvd.pivoting import pack_pivoted, unpack_pivoted
from hisvd.shape_utils import stored_parameters


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 20, 5), (20, 12, 11), (9, 9, 1), (5, 40, 4)])
def test_packing_is_lossless_and_stores_r_squared_fewer_parameters(m, n, rank):
    torch.manual_seed(rank)
    left, right = torch.randn(m, rank), torch.randn(rank, n)
    ((rows, coefficients, permutation),) = pack_pivoted(left, [rank])
    base = rows @ right.double()
    torch.testing.assert_close(unpack_pivoted(base, coefficients, permutation), left.double() @ right.double())
    assert base.numel() + coefficients.numel() == left.numel() + right.numel() - rank**2
    assert base.numel() + coefficients.numel() == stored_parameters(rank, (m, n), "pivoted")
    assert permutation.dtype == torch.int32 and sorted(permutation.tolist()) == list(range(m))


def test_packing_picks_rows_of_the_product_with_coefficients_of_about_one():
    torch.manual_seed(1)
    left, right = torch.linalg.qr(torch.randn(300, 40).double()).Q, torch.randn(40, 80).double()
    ((rows, coefficients, permutation),) = pack_pivoted(left, [40])
    assert torch.equal(rows, left[torch.argsort(permutation)[:40]])
    torch.testing.assert_close(unpack_pivoted(rows @ right, coefficients, permutation), left @ right)
    assert coefficients.abs().max() <= 1.05


def test_packing_for_several_ranks_is_that_for_each():
    left = torch.linalg.qr(torch.randn(90, 40, generator=torch.Generator().manual_seed(0)).double()).Q
    ranks = [17, 40, 3]
    for rank, together in zip(ranks, pack_pivoted(left, ranks), strict=True):
        (alone,) = pack_pivoted(left[:, :rank], [rank])
        assert torch.equal(together.permutation, alone.permutation) and torch.equal(together.rows, alone.rows)
        torch.testing.assert_close(together.coefficients, alone.coefficients, rtol=1e-10, atol=1e-12)
