"""The second move: remove hidden neurons of an MLP, and re-fit its output linear on those that stay.

An MLP's hidden neurons are an inner interface: neuron j is row j of the linears that feed it (gate and up, fc1) and
column j of its output linear W (m, n), here called down. With C = E[h hᵀ] (n, n) of down's input and F of its output,
the weight on the kept neurons S that repeats the original outputs best is W C_{:,S} C_{S,S}⁻¹, and what the removal
adds is ½ tr(F W (C − C_{:,S} C_{S,S}⁻¹ C_{S,:}) Wᵀ): the second-order estimate of the loss, in the unit of
whitening_svd's tails, so that both moves compete for one budget.

Sources: Optimal Brain Surgeon for structures, ZipLM, arXiv 2302.04089; the Nyström form, MoDeGPT, arXiv 2408.09632.
"""

from typing import NamedTuple

import torch

from hisvd.whitening_svd import ALMOST_ZERO, H_DAMPING, SecondMoment, cholesky_root, damped, values_of_gram, whitened

DAMPING = H_DAMPING  # added to C as a fraction of its mean diagonal entry; the same, so that roots serve both
BLOCK = 16  # neurons that are removed between two updates of the whole inverse
SPECTRUM_STEPS = 8  # steps between widths of an MLP for which spectra are kept; others are interpolated
COMPACTED = 0.1  # share of removed neurons above which what is left is copied
CANDIDATES = 4  # times as many as a block takes are looked at one by one


class Elimination(NamedTuple):
    """`order` (n,): the neurons as they are removed; `losses` (n + 1,): what the first 0 … n of them add, float64."""

    order: torch.Tensor
    losses: torch.Tensor


def eliminate(weight: torch.Tensor, moment: torch.Tensor, f: SecondMoment) -> Elimination:
    """Remove neurons one after the other, each time the one that adds the least loss after a re-fit (W (m, n) is down).

    `moment` is C (n, n) as `fitting_moment` gives it. With P = C_{S,S}⁻¹ and V = F^{1/2} W of the neurons still there,
    removing j adds ½ ‖V_j‖² / P_jj, after which V and P lose their parts along it. Within a block of removals only the
    cheapest candidates are kept up to date; what is removed leaves the matrices once it is a share COMPACTED of them,
    since they are copied then. Memory: three n × n matrices and one m × n matrix in float64.
    """
    n = len(moment)
    v = whitened(weight, None, f)
    p = torch.cholesky_inverse(cholesky_root(moment, 0.0))
    left, gone = torch.arange(n, device=moment.device), v.new_zeros(n)
    order, losses = [], [v.new_zeros(1)]
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        scores = v.square().sum(0) / p.diagonal().clamp_min(ALMOST_ZERO) + gone
        candidates = scores.topk(min(CANDIDATES * count, n - start), largest=False).indices
        chosen, added = _cheapest(v[:, candidates], p[candidates][:, candidates], count)
        removed = candidates[chosen]
        order.append(left[removed])
        losses.append(losses[-1][-1] + added.cumsum(0))
        gone = gone.index_fill(0, removed, torch.inf)
        rows = p[removed]
        solved = torch.linalg.solve(rows[:, removed], rows)
        v.addmm_(v[:, removed], solved, alpha=-1)
        p.addmm_(rows.T, solved, alpha=-1)
        if n - start - count < (1 - COMPACTED) * len(left):
            keep = (gone == 0).nonzero().flatten()
            v, p = v[:, keep], p[keep][:, keep]
            left, gone = left[keep], gone[keep]
    return Elimination(torch.cat(order), torch.cat(losses))


def _cheapest(v: torch.Tensor, p: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eliminate `count` of the candidates v (m, k), p (k, k) one by one; their places, and the loss that each adds."""
    gram, p = v.T @ v, p.clone()
    gone = torch.zeros(len(p), dtype=p.dtype, device=p.device)
    chosen, added = [], []
    for _ in range(count):
        scores = gram.diagonal().clamp_min(0) / p.diagonal().clamp_min(ALMOST_ZERO) + gone
        j = scores.argmin().unsqueeze(0)
        chosen.append(j)
        added.append(scores[j] / 2)
        pivot = p[j, j].unsqueeze(1)
        solved = p[j] / pivot
        cross = gram[:, j] @ solved
        gram = gram - cross - cross.T + gram[j, j].unsqueeze(1) * (solved.T @ solved)
        p = p - p[:, j] @ solved
        gone = gone.index_fill(0, j, torch.inf)
        p[j, j], gram[j, j] = 1.0, 0.0
    return torch.cat(chosen), torch.cat(added)


class Refits(NamedTuple):
    """An output linear on the first k of an order of neurons, for every k: `root` (n, n) is lower triangular.

    With C = L Lᵀ in this order, C_{S,S} = L_{S,S} L_{S,S}ᵀ for every k, and the re-fit W C_{:,S} C_{S,S}⁻¹ times
    L_{S,S} is the first columns of W C L⁻ᵀ, `seen` (m, n). All in float64.
    """

    root: torch.Tensor
    seen: torch.Tensor

    def at(self, count: int) -> torch.Tensor:
        """The weight (m, count), its columns in that order."""
        seen, root = self.seen[:, :count], self.root[:count, :count]
        return torch.linalg.solve_triangular(root, seen, upper=False, left=False)


def refits(weight: torch.Tensor, moment: torch.Tensor, order: torch.Tensor) -> Refits:
    """The re-fits of W (m, n) on the first of the neurons `order` (k, at most n), for C (n, n) as in `eliminate`."""
    root = cholesky_root(moment[order][:, order], 0.0)
    seen = torch.linalg.solve_triangular(root.T, weight.double() @ moment[:, order], upper=True, left=False)
    return Refits(root, seen)


def removal_losses(fits: Refits, f: SecondMoment) -> torch.Tensor:
    """What removing the neurons in the reverse of the order of `fits` adds after 0 … n of them, (n + 1,) in float64."""
    lost = f.half(fits.seen).square().sum(0).flip(0)
    return torch.cat([lost.new_zeros(1), lost.cumsum(0) / 2])


def fitting_moment(moment: torch.Tensor, mean: torch.Tensor | None, damping: float = DAMPING) -> torch.Tensor:
    """C (n, n) for the functions above, from E[h hᵀ]: damped by a fraction of its mean diagonal entry, in float64.

    With `mean` E[h] (n,), where a bias takes up the means, the covariance with the same damping.
    """
    fitting = damped(moment, damping)
    if mean is not None:
        fitting -= torch.outer(mean, mean)
    return fitting


def narrow_output_spectra(fits: Refits, mean: torch.Tensor | None, f: SecondMoment, kept: torch.Tensor) -> torch.Tensor:
    """The two-sided singular values (widths, m) of an output linear on fewer neurons, largest first, float64.

    `kept` (n,) is the order of `fits`, those first that stay longest; widths are those of `spectrum_widths`. A `mean`
    that the moment of `fits` lacks is added to E[h hᵀ] again.
    """
    seen = f.half(fits.seen)
    shift = None if mean is None else torch.linalg.solve_triangular(fits.root, mean[kept][:, None], upper=False)
    gram, spectra, before = seen.new_zeros(len(seen), len(seen)), [], 0
    for width in spectrum_widths(len(kept)):
        new = seen[:, before:width]
        gram.addmm_(new, new.T)
        outputs = None if shift is None else seen[:, :width] @ shift[:width]
        spectra.append(_with_zeros(values_of_gram(gram if outputs is None else gram + outputs @ outputs.T), width))
        before = width
    return torch.stack(spectra) if spectra else seen.new_zeros(0, len(seen))


def narrow_input_spectra(
    weight: torch.Tensor, root: torch.Tensor, f: torch.Tensor, kept: torch.Tensor, fused: int
) -> torch.Tensor:
    """The two-sided singular values (widths, n) of the rows that stay of W (fused · neurons, n), as above.

    `root` (n, n) is one of the inputs' second moment, `f` the damped F of all rows. The Gram matrix
    rootᵀ W_Sᵀ F_{S,S} W_S root grows with S.
    """
    rows = torch.stack([kept + part * len(kept) for part in range(fused)], dim=1).flatten()
    seen, metric = weight.double()[rows] @ root, f[rows][:, rows]
    gram, spectra, before = seen.new_zeros(len(root), len(root)), [], 0
    for width in spectrum_widths(len(kept)):
        new, old = slice(fused * before, fused * width), slice(0, fused * before)
        half = seen[new].T @ (metric[new, old] @ seen[old] + metric[new, new] @ seen[new] / 2)
        gram += half + half.T
        spectra.append(_with_zeros(values_of_gram(gram), fused * width))
        before = width
    return torch.stack(spectra) if spectra else seen.new_zeros(0, len(root))


def _with_zeros(values: torch.Tensor, rank: int) -> torch.Tensor:
    """Singular values (n,), of which those beyond `rank` are rounding errors, with zeros in their places."""
    values[rank:] = 0
    return values


def stacked(kept: torch.Tensor, n: int, fused: int) -> torch.Tensor:
    """The rows of the neurons `kept` (k,) of n in a linear that stands for `fused` stacked ones, (fused · k,)."""
    return torch.cat([kept + part * n for part in range(fused)])


def spectrum_widths(n: int) -> list[int]:
    """The widths below n for which the cache holds spectra, SPECTRUM_STEPS equal steps apart, and half of the first."""
    return sorted({max(1, round(n * i / SPECTRUM_STEPS)) for i in (0.5, *range(1, SPECTRUM_STEPS))} - {n})
