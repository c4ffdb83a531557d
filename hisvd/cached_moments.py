"""Second moments of one sublayer from the tensors of its layer in the calibration cache."""

import torch

from hisvd.shape_utils import Sublayer
from hisvd.whitening_svd import F_DAMPING, SecondMoment, damped, second_moment


def packed_shape(n: int) -> tuple[int, int]:
    """The shape of `packed` for an (n, n) matrix: n (n + 1) / 2 entries."""
    return (n + 1) // 2, n + 1 - n % 2


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle of a symmetric matrix (n, n) as a rectangle of `packed_shape`.

    Long rows, the longest first, are filled up with short ones, reversed, the shortest first.
    """
    n, lower = len(matrix), matrix.tril()
    rows, width = packed_shape(n)
    rectangle = lower.new_zeros(rows, width)
    rectangle[:, :n] = lower.flip(0)[:rows]
    rectangle[n % 2 :, width - n :] += lower[: n // 2].flip(1)
    return rectangle


def unpacked(rectangle: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix (n, n) that `packed` made the rectangle of."""
    rows, width = rectangle.shape
    n = width - 1 if width > 2 * rows else width
    lower = rectangle.new_empty(n, n)
    lower[n // 2 :] = rectangle[:, :n].flip(0).tril_(n // 2)
    lower[: n // 2] = rectangle[n % 2 :, width - n :].flip(1).tril_()
    return lower.add_(lower.tril(-1).T)


def input_moment(sublayer: Sublayer, statistics: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """H = E[x xᵀ] (n, n) at a sublayer's input, undamped, float64."""
    return unpacked(statistics[f"{sublayer.input_group}.H"].to(device))


def input_mean(sublayer: Sublayer, statistics: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """E[x] (n,) at the input of an MLP's output linear that has a bias, float64; None for all others."""
    mean = statistics.get(f"{sublayer.input_group}.mean")
    return mean if mean is None else mean.to(device, torch.float64)


def output_moment(
    sublayer: Sublayer,
    statistics: dict[str, torch.Tensor],
    whitening: str,
    device: torch.device,
    rows: torch.Tensor | None = None,
) -> SecondMoment | None:
    """The damped F at a sublayer's output (of its entries `rows` (k,) alone) for whitening `two_sided`, else None."""
    if whitening != "two_sided":
        return None
    moment = output_gradient_moment(sublayer, statistics, device)
    return second_moment(moment if rows is None else moment[rows][:, rows], 0.0)


def output_gradient_moment(
    sublayer: Sublayer, statistics: dict[str, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """F = E[g gᵀ] (m, m) at a sublayer's output, damped, float64."""
    return damped(unpacked(statistics[f"{sublayer.path}.F"].to(device, torch.float64)), F_DAMPING)
