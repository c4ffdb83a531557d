"""Round a pair of factors to its storage dtype, with a smaller output error than rounding to nearest.

Coefficients that rebuild rows from other rows read strongly correlated inputs, so their independent rounding errors
add up in the outputs. Source: GPTQ, arXiv 2210.17323, in the form of Babai's nearest plane, arXiv 2507.18553.
"""

from collections.abc import Callable

import torch

from hisvd.whitening_svd import cholesky_root

BLOCK = 128  # columns that are rounded one by one between two matrix products
DAMPING = 1e-4  # added to the second moment of the outer factor's inputs, as a fraction of its mean diagonal entry
EXACT = 1e-6  # dtypes with a smaller relative spacing are rounded to nearest


def round_with_feedback(
    weight: torch.Tensor, root: torch.Tensor, nearest: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """`weight` (m, n) on a grid, in float64, with a small ‖(weight − rounded) root‖_F.

    `root` is lower triangular (n, n); `nearest(column, j)` are the grid's points next to wanted values (m,) of column
    j. Columns are rounded from the last to the first; each compensates for the effect that the errors of the columns
    after it have on the same entry of the product.
    """
    slope = root / root.diagonal()
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    for end in range(weight.shape[1], 0, -BLOCK):
        start = max(0, end - BLOCK)
        wanted = weight[:, start:end] + error[:, end:] @ slope[end:, start:end]
        for j in range(end - 1, start - 1, -1):
            column = wanted[:, j - start] + error[:, j + 1 : end] @ slope[j + 1 : end, j]
            rounded[:, j] = nearest(column, j)
            error[:, j] = weight[:, j] - rounded[:, j]
    return rounded


def round_product(
    outer: torch.Tensor, inner: torch.Tensor, root: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of outer (m, r) @ inner (r, n), float64 on the grid of `dtype`, for inputs of second moment root rootᵀ.

    `root` is lower triangular (n, n); without it all inputs count equally. `inner` is rounded with feedback; `outer`
    is refitted to the result, then rounded with feedback in the metric of its own inputs.
    """
    if torch.finfo(dtype).eps < EXACT or not outer.numel():
        return outer.to(dtype).double(), inner.to(dtype).double()
    root = torch.eye(inner.shape[1], dtype=torch.float64, device=inner.device) if root is None else root

    def nearest(column: torch.Tensor, _: int) -> torch.Tensor:
        return column.to(dtype)

    rounded = round_with_feedback(inner, root, nearest)
    fitted, metric = refitted_outer(outer, inner, rounded, root)
    return round_with_feedback(fitted, metric, nearest), rounded


def refitted_outer(
    outer: torch.Tensor, inner: torch.Tensor, rounded: torch.Tensor, root: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outer factor (m, r) that makes of `rounded` (r, n) what `outer` made of `inner`, and its inputs' root (r, r).

    `root` is that of the inputs of `inner`, as in `round_product`. All in float64.
    """
    seen, wanted = rounded @ root, inner @ root
    metric = cholesky_root(seen @ seen.T, DAMPING)
    return outer + torch.cholesky_solve(seen @ (wanted - seen).T @ outer.T, metric).T, metric
