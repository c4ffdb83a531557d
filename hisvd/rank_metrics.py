"""Three answers to "what is the rank of this matrix", each from its singular values and its shape.

RANK_METRICS holds them by name; each entry is a choice of `--rank_method`.
"""

from collections.abc import Callable

import torch


def stable_rank(singular_values: torch.Tensor, shape: tuple[int, int] | None = None) -> float:
    """‖W‖_F² / ‖W‖₂² from singular values (k,) alone; 0 for a zero matrix.

    Source: Rudelson and Vershynin, "Sampling from large matrices" (2007).
    """
    energy = singular_values.double().square()
    return float(energy.sum() / energy.max()) if energy.max() > 0 else 0.0


def effective_rank(singular_values: torch.Tensor, shape: tuple[int, int] | None = None) -> float:
    """exp(entropy of σ/Σσ) from singular values (k,) alone; 0 for a zero matrix.

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    sigma = singular_values.double()
    total = sigma.sum()
    if total <= 0:
        return 0.0
    return float(torch.special.entr(sigma / total).sum().exp())


def mathematical_rank(singular_values: torch.Tensor, shape: tuple[int, int]) -> float:
    """Number of σ above max(m, n) · float32 eps · σ_max, the rule of `torch.linalg.matrix_rank`."""
    sigma = singular_values.double()
    threshold = max(shape) * torch.finfo(torch.float32).eps * sigma.max()
    return float((sigma > threshold).sum())


RANK_METRICS: dict[str, Callable[[torch.Tensor, tuple[int, int]], float]] = {
    "stable": stable_rank,
    "effective": effective_rank,
    "mathematical": mathematical_rank,
}


def rank_of(singular_values: torch.Tensor, shape: tuple[int, int], method: str) -> float:
    """The rank by `method`, a key of RANK_METRICS, at least 1 so that its logarithm is not negative."""
    return max(RANK_METRICS[method](singular_values, shape), 1.0)
