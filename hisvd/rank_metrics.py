"""Three answers to "what is the rank of this matrix", each from its singular values alone."""

import torch

RANK_METHODS = ("stable", "effective", "mathematical")


def stable_rank(singular_values: torch.Tensor) -> float:
    """‖W‖_F² / ‖W‖₂² from singular values of shape (k,); 0 for a zero matrix.

    Source: Rudelson and Vershynin, "Sampling from large matrices" (2007).
    """
    energy = singular_values.double().square()
    return float(energy.sum() / energy.max()) if energy.max() > 0 else 0.0


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp(entropy of σ/Σσ) from singular values of shape (k,); 0 for a zero matrix.

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    sigma = singular_values.double()
    total = sigma.sum()
    if total <= 0:
        return 0.0
    return float(torch.special.entr(sigma / total).sum().exp())


def mathematical_rank(singular_values: torch.Tensor, shape: tuple[int, int]) -> int:
    """Number of σ above max(m, n) · float32 eps · σ_max, the rule of `torch.linalg.matrix_rank`."""
    sigma = singular_values.double()
    threshold = max(shape) * torch.finfo(torch.float32).eps * sigma.max()
    return int((sigma > threshold).sum())


def rank_of(singular_values: torch.Tensor, shape: tuple[int, int], method: str) -> float:
    """The rank by `method`, one of RANK_METHODS, at least 1 so that its logarithm is a density."""
    if method == "stable":
        rank = stable_rank(singular_values)
    elif method == "effective":
        rank = effective_rank(singular_values)
    else:
        rank = mathematical_rank(singular_values, shape)
    return max(float(rank), 1.0)
