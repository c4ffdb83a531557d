"""Round pairs of factors to their storage dtype, with a smaller output error than rounding to nearest.

Coefficients that rebuild rows from other rows read strongly correlated inputs, so their independent rounding errors
add up in the outputs. Source: GPTQ, arXiv 2210.17323, in the form of Babai's nearest plane, arXiv 2507.18553.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from hisvd.whitening_svd import cholesky_root, gram

BLOCK = 64  # columns that are rounded one by one between two matrix products
STACKED = 2048  # rows of inner factors that are rounded at once
DAMPING = 1e-4  # added to the second moment of the outer factor's inputs, as a fraction of its mean diagonal entry
EXACT = 1e-6  # dtypes with a smaller relative spacing are rounded to nearest


class Rounded(NamedTuple):
    """`values` (m, n) on the grid, and what is lost of the product: `lost` (m, n) = (weight − values) root, float64."""

    values: torch.Tensor
    lost: torch.Tensor


class Pair(NamedTuple):
    """outer (m, r) @ inner (r, n), and `seen` (r, n) = inner @ root, all in float64."""

    outer: torch.Tensor
    inner: torch.Tensor
    seen: torch.Tensor


def round_with_feedback(
    weight: torch.Tensor, root: torch.Tensor, nearest: Callable[[torch.Tensor, int], torch.Tensor]
) -> Rounded:
    """`weight` (m, n) on a grid, in its dtype, with a small ‖(weight − rounded) root‖_F.

    `root` is lower triangular (n, n); `nearest(column, j)` are the grid's points next to wanted values (m,) of column
    j. Columns are rounded from the last to the first; each compensates for the effect that the errors of the columns
    after it have on the same entry of the product.
    """
    slope = (root / root.diagonal()).to(weight.dtype)
    columns = weight.T.contiguous()
    values, errors, wanted = torch.empty_like(columns), torch.empty_like(columns), torch.empty_like(columns)
    for end in range(len(columns), 0, -BLOCK):
        start = max(0, end - BLOCK)
        wanted[start:end] = columns[start:end].addmm(slope[end:, start:end].T, errors[end:])
        near, after = slope[start:end, start:end].T.contiguous().unbind(), errors[start:end].T
        rows = zip(*(part[start:end].unbind() for part in (columns, wanted, values, errors)), strict=True)
        for k, (column, target, value, error) in reversed(list(enumerate(rows))):
            target.addmv_(after[:, k + 1 :], near[k][k + 1 :])
            value.copy_(nearest(target, start + k))
            torch.sub(column, value, out=error)
    # What compensates for all errors after it is known for every column, so no product is needed.
    return Rounded(values.T, ((wanted - values).T * root.diagonal()))


def round_products(
    pairs: Iterable[Pair], root: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Factors (outer, inner) of every pair in `dtype`, for inputs of second moment root rootᵀ.

    `root` is lower triangular (n, n); without it all inputs count equally. `inner` is rounded with feedback, those of
    several pairs at once, since columns are what takes time; `outer` is refitted to the result, then rounded with
    feedback in the metric of its own inputs.
    """
    waiting: list[Pair] = []
    for pair in pairs:
        if torch.finfo(dtype).eps < EXACT or not pair.outer.numel():
            yield from _rounded(waiting, root, dtype)
            waiting.clear()
            yield pair.outer.to(dtype), pair.inner.to(dtype)
            continue
        waiting.append(pair)
        if sum(len(p.inner) for p in waiting) >= STACKED:
            yield from _rounded(waiting, root, dtype)
            waiting.clear()
    yield from _rounded(waiting, root, dtype)


def _rounded(
    pairs: list[Pair], root: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    def nearest(column: torch.Tensor, _: int) -> torch.Tensor:
        return column.to(dtype)

    if not pairs:
        return
    stacked = torch.cat([pair.inner for pair in pairs])
    if root is None:
        inner = stacked.to(dtype)
        lost = stacked - inner
    else:
        values, lost = round_with_feedback(stacked, root, nearest)
        inner = values.to(dtype)
    sizes = [len(pair.inner) for pair in pairs]
    for pair, rows, without in zip(pairs, inner.split(sizes), lost.split(sizes), strict=True):
        fitted, metric = refitted_outer(pair.outer, pair.seen, without)
        yield round_with_feedback(fitted, metric, nearest).values.to(dtype), rows.contiguous()


def refitted_outer(outer: torch.Tensor, wanted: torch.Tensor, lost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The outer factor (m, r) that makes of a rounded inner one what `outer` made of it before, and its inputs' root.

    `wanted` (r, n) is the inner factor times the root of its inputs, `lost` how much that lost when it was rounded. The
    root is (r, r). All in float64.
    """
    seen = wanted - lost
    metric = cholesky_root(gram(seen.T), DAMPING)
    change = torch.cholesky_solve(seen @ lost.T, metric)
    return outer + outer @ change.T, metric
