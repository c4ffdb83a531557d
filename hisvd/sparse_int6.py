"""The INT6 2:4 pairwise sparse format: prune, quantize, pack, and back. Functions on tensors, on any device.

A row is cut into chunks of 8 values, 4 pairs of neighbours. Two pairs of every chunk are kept, with 6 bits per value
and one float32 scale per row; a nibble per chunk says which pairs they are. 3.5 bits per weight, plus the scale.
"""

import torch

from hisvd.errors import HiSVDError

FORMAT_NAME = "int6_2x4_pairwise_sparse"
USER_ALIAS = "int6_2:4sp"
PAIR_SPARSITY = "2_of_4_pairs_per_8_values"
BITS = 6  # per value of a kept pair
CHUNK = 8  # values; 4 pairs
COLUMNS = 64  # rows are padded to a multiple of this: one metadata word
LARGEST = 31  # of the quantized values; the smallest is −32
SMALLEST_SCALE = 1e-6
BLOCK_SIZE = 2**20  # weights processed at once: keeps temporaries below 64 MiB
WORD_OF_PAIR = {1: torch.int16, 2: torch.int32, 4: torch.int64}  # by bytes per value: as wide as two values


def padded(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (rows, cols) with columns of zeros up to a multiple of 64."""
    missing = (COLUMNS - weight.shape[1] % COLUMNS) % COLUMNS  # torch.compile of torch 2.6 computes -n % 64 as C does
    return torch.nn.functional.pad(weight, (0, missing))


def prune(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (rows, 64 k) with the two pairs of larger squared energy in every chunk; of equals the first is kept."""
    pairs = weight.unflatten(1, (-1, 4, 2))
    energies = pairs.square().sum(-1).unbind(-1)
    kept = [
        sum((e >= mine) if j < i else (e > mine) for j, e in enumerate(energies) if j != i) < 2
        for i, mine in enumerate(energies)
    ]
    return (pairs * torch.stack(kept, -1)[..., None]).flatten(1)


def quantize(pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q int8 (rows, cols) in −32 … 31, scales float32 (rows,)) of a pruned float32 weight; non-zeros stay non-zero.

    The stored scale is the least-squares fit of q · scale to the weight.
    """
    scale = pruned.abs().amax(1, keepdim=True).clamp_min(SMALLEST_SCALE) / LARGEST
    q = (pruned / scale).round().clamp(-LARGEST - 1, LARGEST)
    q = torch.where(q == 0, pruned.sign(), q)
    fit = (q * pruned).sum(1) / q.square().sum(1).clamp_min(1e-6)
    return q.to(torch.int8), fit.abs().clamp_min(SMALLEST_SCALE)


def make_encodable(q: torch.Tensor) -> torch.Tensor:
    """The nearest code the format can hold: two kept pairs per chunk, two non-zero values each.

    The first two nonzero pairs are kept; where there are fewer, the lowest others are added. A zero beside a nonzero
    value becomes ±1 with its sign, a kept pair of zeros becomes (1, 1).
    """
    pairs = q.unflatten(1, (-1, 4, 2))
    filled = (pairs != 0).any(-1)
    found = filled.cumsum(-1, dtype=torch.int8)
    missing = 2 - found[..., -1:]  # pairs of zeros to keep, where positive
    kept = torch.where(filled, found <= 2, (~filled).cumsum(-1, dtype=torch.int8) <= missing)
    partner = pairs.flip(-1).sign()
    values = torch.where(pairs == 0, torch.where(partner == 0, 1, partner), pairs)
    return (values * kept[..., None]).flatten(1)


def pack(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(payload uint8 (rows, 3 cols / 8), metadata int32 (rows, cols / 64)) of an encodable q int8 (rows, cols)."""
    pairs = q.unflatten(1, (-1, 4, 2))
    kept = (pairs != 0).any(-1)
    first = kept.byte().argmax(-1)
    second = 3 - kept.flip(-1).byte().argmax(-1)
    code = (pairs[..., 0] & 63).to(torch.int16) | (pairs[..., 1] & 63).to(torch.int16) << 6
    low, high = (code.gather(-1, index[..., None])[..., 0] for index in (first, second))
    payload = torch.stack([low & 255, low >> 8 | (high & 15) << 4, high >> 4], -1).to(torch.uint8).flatten(1)
    nibbles = (first | second << 2).unflatten(1, (-1, 8))
    metadata = (nibbles << 4 * torch.arange(8, device=q.device)).sum(-1)
    return payload, metadata.to(torch.int32)


def kept_pairs(metadata: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices, int32 (rows, chunks), of the first and the second kept pair of every chunk."""
    shifts = 4 * torch.arange(8, device=metadata.device, dtype=torch.int32)
    nibbles = (metadata[..., None] >> shifts & 15).flatten(1)
    return nibbles & 3, nibbles >> 2


def unpack(payload: torch.Tensor, metadata: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """q (rows, cols) of a payload and its metadata, in `dtype` (any of 1, 2 or 4 bytes)."""
    low, middle, high = payload.unflatten(1, (-1, 3)).to(torch.int32).unbind(-1)
    codes = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], -1)
    code = torch.arange(4096, device=payload.device)
    table = torch.stack([(code & 63 ^ 32) - 32, (code >> 6 ^ 32) - 32], -1).to(dtype)
    table = table.view(WORD_OF_PAIR[dtype.itemsize])[:, 0]
    kept = torch.stack(kept_pairs(metadata), -1).long()
    pairs = table.new_zeros(*kept.shape[:2], 4)
    return pairs.scatter_(-1, kept, table[codes]).view(dtype).flatten(1)


def rows_at_once(columns: int) -> int:
    """Rows of `columns` columns that are processed at once."""
    return max(1, BLOCK_SIZE // columns)


def check_finite(weight: torch.Tensor) -> None:
    """Refuse a weight that cannot be stored.

    Raises:
        HiSVDError: it is not finite.
    """
    if not torch.isfinite(weight).all():
        raise HiSVDError("A weight to be stored in INT6 holds NaN or infinite values; repair the checkpoint first.")


def pack_weight(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """packed_weight, metadata and scales of `weight` (rows, cols) by the plain rule: the larger pairs are kept.

    Raises:
        HiSVDError: the weight is not finite.
    """
    check_finite(weight)
    blocks = [quantize(prune(padded(rows.float()))) for rows in weight.split(rows_at_once(weight.shape[1]))]
    parts = zip(*((*pack(make_encodable(q)), scales) for q, scales in blocks), strict=True)
    return dict(zip(("packed_weight", "metadata", "scales"), map(torch.cat, parts), strict=True))


def dequantize(
    packed_weight: torch.Tensor, metadata: torch.Tensor, scales: torch.Tensor, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight (rows, in_features) in `dtype`; padding columns are cut off."""
    weight = torch.empty(len(scales), in_features, dtype=dtype, device=scales.device)
    blocks = (t.split(rows_at_once(in_features)) for t in (weight, packed_weight, metadata, scales))
    for rows, payload, kept, scale in zip(*blocks, strict=True):
        rows.copy_(unpack(payload, kept, torch.float32)[:, :in_features] * scale[:, None])
    return weight


def check_packed(
    packed_weight: torch.Tensor, metadata: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
) -> None:
    """Refuse what is not a packed weight of `shape` (out_features, in_features).

    Raises:
        HiSVDError: a wrong size or dtype, kept pairs out of order, or a scale that is not finite.
    """
    rows, words = shape[0], -(-shape[1] // COLUMNS)
    expected = {
        "packed_weight": (packed_weight, torch.uint8, (rows, 24 * words)),
        "metadata": (metadata, torch.int32, (rows, words)),
        "scales": (scales, torch.float32, (rows,)),
    }
    for name, (tensor, dtype, size) in expected.items():
        if tensor.dtype != dtype or tensor.shape != size:
            raise HiSVDError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but an INT6 weight of shape {shape} needs "
                f"{dtype} {size}; the file is damaged or from another program."
            )
    first, second = kept_pairs(metadata)
    if not (first < second).all():
        raise HiSVDError("metadata names a second kept pair that does not follow the first; the file is damaged.")
    if not torch.isfinite(scales).all():
        raise HiSVDError("scales holds NaN or infinite values; the file is damaged.")
