"""Optimal low-rank factors of a weight in the metric of its inputs and of its output gradients.

With H = E[x xᵀ], the error E‖(W − W_r) x‖² equals ‖(W − W_r) H^{1/2}‖_F², so the best W_r truncates the
SVD of A = W H^{1/2} = U Σ Vᵀ: W_r = U_r U_rᵀ W, a projection that needs no inverse of H.
Source: SVD-LLM, arXiv 2403.07378 (there by Cholesky factor and its inverse).

With F = E[g gᵀ] of the output gradients as well, ½ ‖F^{1/2} (W − W_r) H^{1/2}‖_F² is the second-order estimate of the
loss added (Kronecker-factored Fisher, arXiv 1503.05671), A = F^{1/2} W H^{1/2} and W_r = F^{−1/2} U_r U_rᵀ F^{1/2} W.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

H_DAMPING = 1e-4  # added to H as a fraction of its mean diagonal entry
F_DAMPING = 3e-2  # the same for F, which is inverted
# Added to a moment that is zero: in float64 its root can be inverted and its square is not 0, so such a moment weights
# all directions equally; in float32 it is 0, so what it weights does not count beside the others.
ALMOST_ZERO = 1e-100
SMALLEST_BLOCK = 384  # columns up to which `gram` is one product
VANISHING = 1e-20  # the largest entry of F's root below which factors as large as its inverse could not be stored
# The square of the smallest singular value, as a fraction of that of the largest, up to which A V has a full rank that
# rounding leaves alone.
FLAT = 1e-12


class Whitening(NamedTuple):
    """The sides of W that a metric weights."""

    inputs: bool  # by H
    outputs: bool  # by F


WHITENINGS = {"two_sided": Whitening(True, True), "input": Whitening(True, False), "none": Whitening(False, False)}


class SecondMoment(NamedTuple):
    """A damped second moment L Lᵀ in float64, L (n, n) lower triangular.

    `order` (n,) lists its entries in the order of L, in which that of a part is its leading block; None: they are.
    """

    root: torch.Tensor
    order: torch.Tensor | None = None

    def diagonal(self) -> torch.Tensor:
        """Its diagonal (n,), in the order of L."""
        return self.root.square().sum(1)

    def half(self, matrix: torch.Tensor) -> torch.Tensor:
        """Rᵀ M for a root R Rᵀ of the moment, and M (n, …)."""
        return self.root.T @ (matrix if self.order is None else matrix[self.order])

    def projection(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R⁻ᵀ U, R U), both up to one factor, for U (n, r)."""
        root = self.root
        if root.abs().max() < VANISHING:
            root = root / root.abs().max()
        outer, inner = torch.linalg.solve_triangular(root.T, left, upper=True), root @ left
        if self.order is None:
            return outer, inner
        places = self.order.argsort()
        return outer[places], inner[places]


class Factors(NamedTuple):
    """left (m, r) @ right (r, n) in float64; their first columns and rows are the factors of every smaller rank.

    `seen` (r, n) is right @ root for the root of the inputs' second moment, None without one.
    """

    left: torch.Tensor
    right: torch.Tensor
    seen: torch.Tensor | None = None

    def cut(self, rank: int) -> "Factors":
        """Those of a smaller rank."""
        return Factors(self.left[:, :rank], self.right[:rank], None if self.seen is None else self.seen[:rank])


def gram(x: torch.Tensor) -> torch.Tensor:
    """Xᵀ X (n, n) for X (t, n): every product of two column blocks once, 9/16 of the work of X.T @ X.

    In X's dtype, in float32 if that has 16 bits. TF32 holds such values whole and sums their products in float32, so
    GPUs may use it for them, at several times the speed.
    """
    short = x.dtype.itemsize == 2
    x = x.detach().float() if short else x.detach()
    product = x.new_empty(x.shape[1], x.shape[1])
    with tf32_allowed() if short else nullcontext():
        _fill_gram(x, product)
    return product


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Within the context, products of float32 matrices on GPUs may round their factors to TF32's 11 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fill_gram(x: torch.Tensor, product: torch.Tensor) -> None:
    n = x.shape[1]
    if n <= SMALLEST_BLOCK:
        torch.mm(x.T, x, out=product)
        return
    first, second = slice(n // 2), slice(n // 2, n)
    _fill_gram(x[:, first], product[first, first])
    _fill_gram(x[:, second], product[second, second])
    torch.mm(x[:, first].T, x[:, second], out=product[first, second])
    product[second, first] = product[first, second].T


def shift_of(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """What is added to the diagonal of `moment` (n, n): damping · mean diagonal entry, ALMOST_ZERO at least."""
    return (damping * moment.diagonal().double().mean()).clamp_min(ALMOST_ZERO)


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """`moment` (n, n) with `shift_of` added to its diagonal, a copy in float64."""
    shifted = moment.to(torch.float64, copy=True)
    shifted.diagonal().add_(shift_of(moment, damping))
    return shifted


def cholesky_root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower-triangular L (n, n) in float64 with L Lᵀ = damped(moment, damping).

    Eigenvalues of the moment that rounding left below zero count as zero.
    """
    root, failed = torch.linalg.cholesky_ex(damped(moment, damping))
    if not failed:
        return root
    eigenvalues, eigenvectors = torch.linalg.eigh(moment.double())
    shifted = eigenvalues.clamp_min(0) + shift_of(moment, damping)
    return torch.linalg.qr((eigenvectors * shifted.sqrt()).T).R.T


def second_moment(moment: torch.Tensor, damping: float) -> SecondMoment:
    """The damped `moment` (n, n)."""
    return SecondMoment(cholesky_root(moment, damping))


def whitened(weight: torch.Tensor, root: torch.Tensor | None, f: SecondMoment | None = None) -> torch.Tensor:
    """A = F^{1/2} W H^{1/2} in float64 for W (m, n), up to rotations from both sides; None leaves a side out.

    `root` (n, n) is any root of H: root rootᵀ = H.
    """
    matrix = weight.double()
    if root is not None:
        matrix = matrix @ root
    if f is not None:
        matrix = f.half(matrix)
    return matrix


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All min(m, n) singular values, largest first, float64.

    From the eigenvalues of the smaller Gram matrix in float64: accurate to 1e-8 of the largest.
    """
    matrix = matrix.double()
    return values_of_gram(gram(matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix))


def values_of_gram(product: torch.Tensor) -> torch.Tensor:
    """The singular values (n,) of a matrix whose Gram matrix, from either side, is `product` (n, n) in float64."""
    return torch.linalg.eigvalsh(product).flip(0).clamp_min(0).sqrt()


def left_singular_pairs(matrix: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """All singular values (min(m, n),), largest first, and U of shape (m, min(m, n)), its columns orthonormal; float64.

    With `count` the first columns alone. From the eigenvectors of the smaller Gram matrix. Where that is
    AᵀA = V Σ² Vᵀ, the columns of A V are orthogonal already; QR scales them and completes the basis where singular
    values vanish.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    eigenvalues, eigenvectors = torch.linalg.eigh(gram(matrix.T if wide else matrix))
    values, vectors = eigenvalues.flip(0).clamp_min(0).sqrt(), eigenvectors.flip(1)[:, :count]
    return values, vectors if wide else torch.linalg.qr(matrix @ vectors).Q


def left_singular_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """U of shape (m, min(m, n)) in float64, columns by falling singular value; see left_singular_pairs."""
    return left_singular_pairs(matrix)[1]


def optimal_factors(
    weight: torch.Tensor,
    root: torch.Tensor | None,
    f: SecondMoment | None,
    rank: int,
    seen: torch.Tensor | None = None,
) -> Factors:
    """left @ right = F^{−1/2} U_r U_rᵀ F^{1/2} W for W (m, n) in the metric of `whitened`, for all ranks up to `rank`.

    `root` is lower triangular; `seen` (m, n) is W root in float64, if it is known already. A tall W has its factors
    from the right singular vectors of A, which are quicker to find: with A V_r V_rᵀ the truncation of A, they are
    W root V_r and V_rᵀ root⁻¹, up to scales; but not where A loses rank. An F that is zero, or nearly so, does not give
    extreme factors: only ratios within F matter to the product.
    """
    weight = weight.double()
    if seen is None:
        seen = weight if root is None else weight @ root
    matrix = seen if f is None else f.half(seen)
    if weight.shape[0] <= weight.shape[1]:
        basis = left_singular_vectors(matrix)[:, :rank]
    else:
        eigenvalues, eigenvectors = torch.linalg.eigh(gram(matrix))
        vectors = eigenvectors.flip(1)[:, :rank]
        if eigenvalues[-rank] > FLAT * eigenvalues[-1]:
            left, right = seen @ vectors, vectors.T
            norms = left.norm(dim=0)
            if root is not None:
                right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
            return Factors(left / norms, norms[:, None] * right, None if root is None else norms[:, None] * vectors.T)
        basis = torch.linalg.qr(matrix @ vectors).Q
    left, inner = (basis, basis) if f is None else f.projection(basis)
    return Factors(left, inner.T @ weight, None if root is None else inner.T @ seen)
