"""Lossless packing of a low-rank pair: the same matrix from r² fewer numbers and fewer FLOPs.

A rank-r matrix is determined by r of its rows and the coefficients that rebuild the other rows from them.
Source: PIFA, arXiv 2501.19090.
"""

import torch


def pack_pivoted(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack left (m, r) @ right (r, n) into (base, coefficients, permutation).

    LU with partial pivoting of `left` picks the r base rows. With B = base (r, n) and C = coefficients
    (m−r, r), row i of the product is row permutation[i] of [B; C B]; permutation is int32 (m,).
    Partial pivoting keeps the coefficients small (|c| ≤ about 3 on real weights).
    """
    m, rank = left.shape
    lu, pivots = torch.linalg.lu_factor(left.double())
    order = _row_order(pivots, m)
    unit_lower = lu[:rank]  # its strict lower triangle and an implied unit diagonal
    coefficients = torch.linalg.solve_triangular(unit_lower, lu[rank:], upper=False, left=False, unitriangular=True)
    base = left.double()[order[:rank]] @ right.double()
    return base, coefficients, torch.argsort(order).to(torch.int32)


def unpack_pivoted(base: torch.Tensor, coefficients: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The dense (m, n) matrix that pack_pivoted's output stands for, in the dtype of `base`."""
    return torch.cat([base, coefficients @ base]).index_select(0, permutation)


def _row_order(pivots: torch.Tensor, rows: int) -> torch.Tensor:
    """LAPACK's list of row swaps (1-based, one a column) as an order of the rows, shape (rows,)."""
    order = list(range(rows))
    for i, j in enumerate(pivots.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, device=pivots.device)
