"""The integer formats of a linear's weight: int8 with one scale per row, int4 with one per 32 columns of a row.

A weight (m, n) is codes · scales. Both formats are symmetric, without zero points. In files it is two tensors:
`weight_int8` (m, n) or `weight_int4` (m, ⌈n/2⌉), two codes per byte, and `weight_scale` (m, number of groups). The last
group of a row may be shorter, so no width or rank has to be a multiple of 32.
"""

from typing import NamedTuple

import torch

from hisvd.errors import HiSVDError

SMALLEST_SCALE = 1e-12  # of a group that is zero


class IntegerFormat(NamedTuple):
    """Codes are in [−`largest`, `largest`], `per_byte` of them in a byte.

    `group` columns of a row share a scale (None: all), stored in `scale`.
    """

    largest: int
    per_byte: int
    group: int | None
    scale: torch.dtype

    def bytes(self, rows: int, columns: int) -> int:
        """What codes and scales of a weight take."""
        return rows * (-(-columns // self.per_byte) + self.groups(columns) * self.scale.itemsize)

    def nearest(self, values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What codes can stand for next to `values`, where the codes 0 and 1 are `steps` apart."""
        return (values / steps).round().clamp(-self.largest, self.largest) * steps

    def groups(self, columns: int) -> int:
        """Scales per row of that many columns."""
        return -(-columns // (self.group or columns))

    def of_columns(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """The scale (m, n) of every weight, from those of the groups (m, g)."""
        return scales.repeat_interleave(self.group or columns, dim=1)[:, :columns]


INT4_GROUP = 32
INTEGERS = {
    "int8": IntegerFormat(127, 1, None, torch.float32),
    "int4": IntegerFormat(7, 2, INT4_GROUP, torch.bfloat16),
}
SCALE = "weight_scale"
CODES = {f"weight_{name}": name for name in INTEGERS}  # by the last part of a tensor's name


def pack_codes(codes: torch.Tensor, name: str) -> torch.Tensor:
    """What files hold for int8 `codes` (m, n): themselves, or for int4 (m, ⌈n/2⌉) bytes.

    A half holds its code plus 8, the low one that of an even column; the half of a column that does not exist is 8.
    """
    if name == "int8":
        return codes.contiguous()
    shifted = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).add(8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def unpack_codes(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes (m, n) in int8 of n = `columns`, from what files hold."""
    if packed.dtype == torch.int8:
        return packed
    halves = torch.stack([packed & 15, packed >> 4], dim=-1)
    return halves.flatten(1)[:, :columns].to(torch.int8) - 8


def dequantize_codes(packed: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (m, n) in `dtype` that packed codes and scales (m, g) stand for, n = `columns`."""
    form = INTEGERS["int8" if packed.dtype == torch.int8 else "int4"]
    # A product in bfloat16 of a rounded scale would round twice.
    exact = torch.promote_types(dtype, scales.dtype)
    codes, scales = unpack_codes(packed, columns).to(exact), scales.to(exact)
    if form.group and columns % form.group == 0:  # quicker than a scale per column
        codes.unflatten(1, (-1, form.group)).mul_(scales[..., None])
        return codes.to(dtype)
    return codes.mul_(form.of_columns(scales, columns)).to(dtype)


def empty_codes(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The tensors of the format `name` for a weight (rows, columns) that is zero."""
    form, codes = INTEGERS[name], torch.zeros(rows, columns, dtype=torch.int8)
    scales = torch.ones(rows, form.groups(columns), dtype=form.scale)
    return {f"weight_{name}": pack_codes(codes, name), SCALE: scales}


def check_codes(packed: torch.Tensor, scales: torch.Tensor, name: str) -> None:
    """Refuse what no fit of this package can have written.

    Raises:
        HiSVDError: a scale that is not a positive number, or a code beyond the largest; the sentence begins with the
            tensor's name.
    """
    if not (scales.isfinite().all() and (scales > 0).all()):
        raise HiSVDError(f"{SCALE} holds values that are not positive numbers; the file is damaged, create it again.")
    codes = unpack_codes(packed, 2 * packed.shape[1] if name == "int4" else packed.shape[1])
    if (codes < -INTEGERS[name].largest).any():
        raise HiSVDError(f"weight_{name} holds a code that {name} does not use; the file is damaged, create it again.")
