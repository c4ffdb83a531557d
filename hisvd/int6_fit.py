"""Choose the pairs that an INT6 weight keeps, and their values, by the output error on the model's own inputs.

The error is ‖(W − Ŵ) H^{1/2}‖, as in whitening_svd. A first pass goes through the chunks of 8 columns; the columns not
yet chosen are free to compensate for the error of the chunk (SparseGPT, arXiv 2301.00774, chunk by chunk with its
saliency of optimal brain surgeon); then every chunk is chosen again, given all others, until little changes (coordinate
descent, as QuantEase, arXiv 2309.01885). No step raises the error.
"""

import functools
import itertools
from typing import NamedTuple

import torch

from hisvd.factor_forms import FORMS, form_of
from hisvd.sparse_int6 import (
    CHUNK,
    COLUMNS,
    LARGEST,
    SMALLEST_SCALE,
    check_finite,
    dequantize,
    pack,
    pack_weight,
    padded,
)
from hisvd.whitening_svd import H_DAMPING, cholesky_root

BLOCK = 128  # columns that are chosen chunk by chunk between two matrix products
SWEEPS = 4  # passes in which every chunk is chosen again
# The columns of a chunk that each of the 6 choices of two pairs keeps.
KEPT = [[2 * a, 2 * a + 1, 2 * b, 2 * b + 1] for a, b in itertools.combinations(range(4), 2)]


def int6_entries(
    tensors: dict[str, torch.Tensor], moment: torch.Tensor | None, sweeps: int = SWEEPS
) -> dict[str, torch.Tensor]:
    """The state dict entries of a linear, plain or factored, with every weight of at least 64 inputs in INT6.

    With `moment` (n, n), E[x xᵀ] of the inputs, codes are fitted to them; the outer factor of a pair is first fitted
    to the outputs of the stored inner one. Without it, codes follow the plain format rule.

    Raises:
        HiSVDError: a weight is not finite.
    """
    entries, form = dict(tensors), form_of(tensors)
    if form is None:
        _replace_by_code(entries, "weight", moment, sweeps)
        return entries
    inner, outer = f"{FORMS[form].inner}.weight", f"{FORMS[form].outer}.weight"
    stored = _replace_by_code(entries, inner, moment, sweeps)
    if moment is not None:
        cross = stored @ moment.double()
        root = cholesky_root(cross @ stored.T, H_DAMPING)
        change = cross @ (tensors[inner].double() - stored).T @ tensors[outer].double().T
        fitted = tensors[outer].double() + torch.cholesky_solve(change, root).T
        entries[outer] = fitted.to(tensors[outer].dtype)
        moment = cross @ stored.T
    _replace_by_code(entries, outer, moment, sweeps)
    return entries


def _replace_by_code(
    entries: dict[str, torch.Tensor], name: str, moment: torch.Tensor | None, sweeps: int
) -> torch.Tensor:
    """Replace the weight `name` by its code if it has at least 64 inputs; returns the weight as stored, float64."""
    weight = entries[name]
    if weight.shape[1] < COLUMNS:
        return weight.double()
    code = pack_weight(weight) if moment is None else fit_weight(weight, moment, sweeps)
    del entries[name]
    entries |= {name.removesuffix("weight") + key: tensor for key, tensor in code.items()}
    return dequantize(**code, in_features=weight.shape[1], dtype=torch.float64)


def fit_weight(weight: torch.Tensor, moment: torch.Tensor, sweeps: int = SWEEPS) -> dict[str, torch.Tensor]:
    """packed_weight, metadata and scales of `weight` (m, n), fitted to inputs of second moment `moment` (n, n).

    Raises:
        HiSVDError: the weight is not finite.
    """
    check_finite(weight)
    q, scales = fit_int6(weight, moment, sweeps)
    payload, metadata = pack(q)
    return {"packed_weight": payload, "metadata": metadata, "scales": scales}


def fit_int6(weight: torch.Tensor, moment: torch.Tensor, sweeps: int = SWEEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """(q int8 (m, n'), scales float32 (m,)) for W (m, n) and H = E[x xᵀ] (n, n); n' is n padded to a multiple of 64.

    The scale of a row is the least-squares fit of q · scale to the weight in the metric of H.
    """
    n = weight.shape[1]
    weight = padded(weight.float())
    moment = torch.nn.functional.pad(moment.double(), (0, weight.shape[1] - n) * 2)
    moment += H_DAMPING * moment.diagonal().mean().clamp_min(SMALLEST_SCALE) * torch.eye(len(moment)).to(moment)
    # Inputs of larger energy are chosen first, from the end, while most others are still free.
    energy = moment.diagonal().unflatten(0, (-1, CHUNK)).sum(1)
    order = (CHUNK * energy.argsort()[:, None] + torch.arange(CHUNK, device=energy.device)).flatten()
    weight, moment = weight[:, order], moment[order][:, order]
    root = cholesky_root(moment, 0)

    blocks = _diagonal_blocks(root)
    free, given = (ChunkMetrics.from_metric(m) for m in (blocks @ blocks.mT, _diagonal_blocks(moment)))
    root, moment = root.float(), moment.float()
    scales = _first_pass(weight, root, free, None).abs().amax(1).clamp_min(SMALLEST_SCALE) / LARGEST
    values = _first_pass(weight, root, free, scales)
    for _ in range(sweeps):
        scales, values = _refitted(values, scales, weight, moment)
        _sweep(weight, values, moment, given, scales)
    scales, values = _refitted(values, scales, weight, moment)
    return (values / scales[:, None]).round().to(torch.int8)[:, order.argsort()], scales


def _diagonal_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """The blocks (n / 8, 8, 8) of the chunks on the diagonal of (n, n)."""
    blocks = matrix.unflatten(0, (-1, CHUNK)).unflatten(2, (-1, CHUNK))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _refitted(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales that fit the codes of `values` best, and the values they then stand for."""
    q = (values / scales[:, None]).round()
    seen = q @ moment
    fit = ((seen * weight).sum(1) / (seen * q).sum(1).clamp_min(1e-30)).abs().clamp_min(SMALLEST_SCALE)
    return fit, q * fit[:, None]


def _first_pass(
    weight: torch.Tensor, root: torch.Tensor, metrics: "ChunkMetrics", scales: torch.Tensor | None
) -> torch.Tensor:
    """Kept values (m, n), from the last chunk to the first; `root` is lower triangular, root rootᵀ = H.

    With the columns before a chunk free, the error of the chunk and of the columns after it is measured by the root
    alone.
    """
    error, values = torch.zeros_like(weight), torch.zeros_like(weight)
    for block_end in range(weight.shape[1], 0, -BLOCK):
        block = max(0, block_end - BLOCK)
        after = error[:, block_end:] @ root[block_end:, block:block_end]
        for start in range(block_end - CHUNK, block - 1, -CHUNK):
            end = start + CHUNK
            shift = after[:, start - block : end - block] + error[:, end:block_end] @ root[end:block_end, start:end]
            diagonal = root[start:end, start:end]
            wanted = weight[:, start:end] + torch.linalg.solve_triangular(diagonal, shift, upper=False, left=False)
            values[:, start:end] = best_chunk(wanted, metrics.of(start), scales)
            error[:, start:end] = weight[:, start:end] - values[:, start:end]
    return values


def _sweep(
    weight: torch.Tensor, values: torch.Tensor, moment: torch.Tensor, metrics: "ChunkMetrics", scales: torch.Tensor
) -> None:
    """Choose every chunk of `values` again, given the others, in place."""
    for block_end in range(weight.shape[1], 0, -BLOCK):
        block = max(0, block_end - BLOCK)
        pull = (weight - values) @ moment[:, block:block_end]  # −½ the gradient of the error
        for start in range(block_end - CHUNK, block - 1, -CHUNK):
            end, here = start + CHUNK, metrics.of(start)
            old = values[:, start:end].clone()
            wanted = old + pull[:, start - block : end - block] @ here.inverse
            new = best_chunk(wanted, here, scales)
            worse = _cost(wanted - new, here.metric) > _cost(wanted - old, here.metric)
            values[:, start:end] = torch.where(worse[:, None], old, new)
            pull += (old - values[:, start:end]) @ moment[start:end, block:block_end]


class ChunkMetrics(NamedTuple):
    """What `best_chunk` needs of the metrics (..., 8, 8) of one chunk or of all.

    For every choice of two pairs, `fill` (..., 6, 4, 8) gives the best kept values, kept = fill · wanted, which
    compensate for the dropped ones as far as they can; `slope` (..., 6, 4, 4) feeds rounding errors back.
    """

    metric: torch.Tensor
    inverse: torch.Tensor
    fill: torch.Tensor
    slope: torch.Tensor

    @classmethod
    def from_metric(cls, metric: torch.Tensor) -> "ChunkMetrics":
        """For metrics (..., 8, 8), in float32."""
        kept = kept_columns(metric.device)
        rows = metric[..., kept, :]
        inner = rows.gather(-1, kept[:, None, :].expand(*rows.shape[:-1], 4))
        root = torch.linalg.cholesky(inner)
        slope = root / root.diagonal(dim1=-2, dim2=-1)[..., None, :]
        parts = (metric, torch.linalg.inv(metric), torch.cholesky_solve(rows, root), slope)
        return cls(*(part.float() for part in parts))

    def of(self, column: int) -> "ChunkMetrics":
        """For the chunk that starts at `column`."""
        return ChunkMetrics(*(part[column // CHUNK] for part in self))


@functools.cache
def kept_columns(device: torch.device) -> torch.Tensor:
    """KEPT (6, 4) on a device, copied there once: a copy per chunk would make the host wait for all queued work."""
    return torch.tensor(KEPT, device=device)


def best_chunk(wanted: torch.Tensor, metrics: ChunkMetrics, scales: torch.Tensor | None) -> torch.Tensor:
    """The legal chunk (m, 8) near `wanted` (m, 8) in the metric; every choice of two pairs is tried.

    With `scales` (m,) the kept values are rounded to codes one by one, with errors fed back; without, they are not
    rounded.
    """
    kept = torch.einsum("mj,kij->mki", wanted, metrics.fill)
    if scales is not None:
        kept = _rounded(kept, metrics.slope, scales[:, None])
    chunks = wanted.new_zeros(*kept.shape[:2], CHUNK)
    chunks.scatter_(-1, kept_columns(wanted.device).expand(len(wanted), -1, -1), kept)
    best = _cost(wanted[:, None] - chunks, metrics.metric).argmin(-1)
    return chunks[torch.arange(len(wanted), device=wanted.device), best]


def _cost(error: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return ((error @ metric) * error).sum(-1)


def _rounded(ideal: torch.Tensor, slope: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`ideal` (m, 6, 4) rounded to nonzero codes times `scales` (m, 1), from the last column to the first."""
    rounded, error = torch.empty_like(ideal), torch.zeros_like(ideal)
    for j in range(ideal.shape[-1] - 1, -1, -1):
        wanted = (ideal[..., j] + (error[..., j + 1 :] * slope[..., j + 1 :, j]).sum(-1)) / scales
        q = wanted.round().clamp(-LARGEST - 1, LARGEST)
        rounded[..., j] = torch.where(q == 0, torch.where(wanted < 0, -1.0, 1.0), q) * scales
        error[..., j] = ideal[..., j] - rounded[..., j]
    return rounded
