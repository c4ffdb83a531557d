"""Lossless packing of a low-rank pair: the same matrix from r² fewer parameters and with fewer FLOPs.

A rank-r matrix is determined by r of its rows and the coefficients that rebuild the other rows from them.
Source: PIFA, arXiv 2501.19090; the exchange of rows is maxvol (Goreinov et al., "How to find a good submatrix", 2010).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

MAXVOL_TOLERANCE = 1.05  # rows are exchanged while a coefficient is larger than this


class Packed(NamedTuple):
    """Row i of the matrix (m, n) is row permutation[i] of [B; C B], B = rows @ right: r of the rows of `left`, (r, r).

    `coefficients` C (m−r, r) and `rows` are in float64, `permutation` (m,) in int32.
    """

    rows: torch.Tensor
    coefficients: torch.Tensor
    permutation: torch.Tensor


def pack_pivoted(left: torch.Tensor, ranks: Sequence[int]) -> Iterator[Packed]:
    """Pack left[:, :r] @ right[:r] for every r of `ranks`, whatever `right`, and `left` (m, at least r).

    The base rows are picked by LU with partial pivoting of `left`, whose first columns are factored alike for all
    ranks, then exchanged until no coefficient is much larger than 1: that lowers the error of rounding C and B to
    bfloat16 by a third. The other rows keep their order.
    """
    left = left.double()
    lu, pivots = torch.linalg.lu_factor(left[:, : max(ranks)])
    first = _row_order(pivots, len(left))
    for rank in ranks:
        order, base = list(first), lu[:rank, :rank]
        coefficients = torch.linalg.solve_triangular(
            base, lu[rank:, :rank], upper=False, left=False, unitriangular=True
        )
        _exchange_rows(order, coefficients)
        rows = torch.tensor(order, device=left.device)
        places = rows[rank:].argsort()
        rows[rank:] = rows[rank:][places]
        yield Packed(left[rows[:rank], :rank], coefficients[places], torch.argsort(rows).to(torch.int32))


def unpack_pivoted(base: torch.Tensor, coefficients: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The dense (m, n) matrix that base (r, n) and pack_pivoted's output stand for, in the dtype of `base`."""
    return torch.cat([base, coefficients @ base]).index_select(0, permutation)


def _exchange_rows(order: list[int], coefficients: torch.Tensor) -> None:
    """Maxvol, in place: swap the base row and the other row of the largest coefficient while it exceeds 1.

    With row c of the coefficients for the other row i and unit vector e of base row j, the exchange changes
    C by −(column j)(c − e) / c_j, and row i then holds the coefficients of the former base row. Every exchange
    multiplies the volume of the base by |c_j|, so it ends; at most r exchanges are made.
    """
    rest, rank = coefficients.shape
    for _ in range(rank if rest else 0):
        # The row first: the place of the largest of all entries takes several times as long to find.
        largest = coefficients.abs().amax(1).argmax(keepdim=True)
        row = coefficients.index_select(0, largest).flatten()
        place = row.abs().argmax(keepdim=True)
        i, j, pivot = torch.cat([largest, place, row[place]]).tolist()
        if abs(pivot) <= MAXVOL_TOLERANCE:
            return
        i, j = int(i), int(j)
        column = coefficients[:, j].clone()
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
