"""Second moments of one sublayer from the tensors of its layer in the calibration cache."""

import torch

from hisvd.shape_utils import Sublayer
from hisvd.whitening_svd import F_DAMPING, PartOfMoment, SecondMoment, damped, moment_of


def input_moment(sublayer: Sublayer, statistics: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """H = E[x xᵀ] (n, n) at a sublayer's input, undamped, float64."""
    eigenvalues, eigenvectors = _eigenpairs(statistics, f"{sublayer.input_group}.", device)
    return moment_of(eigenvalues.clamp_min(0), eigenvectors)  # rounding leaves some below 0


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
) -> SecondMoment | PartOfMoment | None:
    """The damped F at a sublayer's output (of its entries `rows` (k,) alone) for whitening `two_sided`, else None."""
    if whitening != "two_sided":
        return None
    moment = output_gradient_moment(sublayer, statistics, device)
    return moment if rows is None else moment.part(rows)


def output_gradient_moment(
    sublayer: Sublayer, statistics: dict[str, torch.Tensor], device: torch.device
) -> SecondMoment:
    """F = E[g gᵀ] (m, m) at a sublayer's output, damped."""
    return damped(*_eigenpairs(statistics, f"{sublayer.path}.F_", device), F_DAMPING)


def _eigenpairs(
    statistics: dict[str, torch.Tensor], prefix: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    eigenvalues, eigenvectors = statistics[f"{prefix}eigenvalues"], statistics[f"{prefix}eigenvectors"]
    return eigenvalues.to(device, torch.float64), eigenvectors.to(device, torch.float64)
