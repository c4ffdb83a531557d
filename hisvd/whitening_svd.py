"""Optimal low-rank factors of a weight in the metric of its inputs.

With H = E[x xᵀ], the error E‖(W − W_r) x‖² equals ‖(W − W_r) H^{1/2}‖_F², so the best W_r truncates the
SVD of A = W H^{1/2} = U Σ Vᵀ: W_r = U_r U_rᵀ W, a projection that needs no inverse of H.
Source: SVD-LLM, arXiv 2403.07378 (there by Cholesky factor and its inverse).
"""

import torch

H_DAMPING = 1e-4  # added to H as a fraction of its mean diagonal entry


def damped(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (n,) of H + 1e-4 · mean(diag H) · I in float64, rounding below zero removed."""
    values = eigenvalues.double().clamp_min(0)
    return values + H_DAMPING * values.mean()


def whitened(weight: torch.Tensor, eigenvalues: torch.Tensor, eigenvectors: torch.Tensor) -> torch.Tensor:
    """A = W V diag(λ)^{1/2} in float64 for W (m, n), H = V diag(λ) Vᵀ.

    W H^{1/2} up to a rotation from the right, which leaves singular values and U as they are.
    """
    return (weight.double() @ eigenvectors.double()) * damped(eigenvalues).sqrt()


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All min(m, n) singular values, largest first, float64.

    From the eigenvalues of the smaller Gram matrix in float64: accurate to 1e-8 of the largest.
    """
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def left_singular_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """U of shape (m, min(m, n)) in float64, columns by falling singular value, exactly orthonormal.

    From the eigenvectors of the smaller Gram matrix. Where that is AᵀA = V Σ² Vᵀ, the columns of A V are
    orthogonal already; QR scales them and completes the basis where singular values vanish.
    """
    matrix = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
    return torch.linalg.qr(matrix @ right).Q


def low_rank_factors(weight: torch.Tensor, left_basis: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right) of shapes (m, r), (r, n) in float64: left @ right = U_r U_rᵀ W."""
    left = left_basis[:, :rank]
    return left, left.T @ weight.double()
