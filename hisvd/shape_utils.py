"""Shapes of the linear sublayers, and how many parameters a factor form stores in them for a rank."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from hisvd.factor_forms import FORMS, Shape
from hisvd.integer_codes import INTEGERS

PLAIN_BYTES = 2  # per weight that is not in integers, where bytes are budgeted


@dataclass(frozen=True)
class Sublayer:
    """One linear sublayer of one decoder layer: weight W of shape (out_features, in_features).

    `path` is the module's path inside its decoder layer, `input_group` names the tensor it reads:
    sublayers of one layer with the same group receive the same input.
    """

    name: str
    layer: int
    path: str
    input_group: str
    out_features: int
    in_features: int

    @property
    def shape(self) -> Shape:
        """(m, n) = (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def size(self) -> int:
        """Parameters of the dense weight, m·n."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """min(m, n): the rank that stands for "stays a plain linear"."""
        return min(self.out_features, self.in_features)


def stored_parameters(rank: int, shape: Shape, form: str) -> int:
    """Parameters stored for a weight (m, n) at `rank`, in the form named `form`; never more than the dense m·n."""
    m, n = shape
    return m * n if rank >= min(m, n) else min(FORMS[form].parameters(rank, shape), m * n)


def stored_bytes(rank: int, shape: Shape, form: str, dtype: str | None) -> int:
    """Bytes stored for a weight (m, n) at `rank`, its matrices in the integers `dtype`, or in 16 bits (None)."""
    m, n = shape
    if is_dense(rank, shape, form):
        return matrix_bytes(m, n, dtype)
    outer = FORMS[form].outer_rows(rank, m)
    rest = FORMS[form].parameters(rank, shape) - rank * (n + outer)
    stored = matrix_bytes(rank, n, dtype) + matrix_bytes(outer, rank, dtype)
    return stored + PLAIN_BYTES * rest + 4 * FORMS[form].indices(m)


def matrix_bytes(rows: int, columns: int, dtype: str | None) -> int:
    """Bytes of one matrix in the integers `dtype`, or in 16 bits (None)."""
    return INTEGERS[dtype].bytes(rows, columns) if dtype else PLAIN_BYTES * rows * columns


class Storage(NamedTuple):
    """How a linear is stored, and what that counts: parameters, or with `in_bytes` bytes.

    Factors are in `form`, weights in the integers `dtype`, a key of INTEGERS, or in 16 bits (None).
    """

    form: str
    dtype: str | None = None
    in_bytes: bool = False

    @property
    def per_weight(self) -> int:
        """What a weight counts that stays as it is."""
        return PLAIN_BYTES if self.in_bytes else 1

    def size(self, rank: int, shape: Shape) -> int:
        """What a weight (m, n) at `rank` counts."""
        if self.in_bytes:
            return stored_bytes(rank, shape, self.form, self.dtype)
        return stored_parameters(rank, shape, self.form)


def is_dense(rank: int, shape: Shape, form: str) -> bool:
    """Whether the form saves nothing at this rank, so that the sublayer stays a plain linear."""
    return stored_parameters(rank, shape, form) >= shape[0] * shape[1]


def next_rank(rank: int, shape: Shape, form: str) -> int:
    """The next larger useful rank: rank + 1, or min(m, n) where that would save nothing."""
    return min(shape) if is_dense(rank + 1, shape, form) else rank + 1


def largest_rank(parameters: float, shape: Shape, form: str) -> int:
    """The largest rank, at least 1, that stores at most `parameters` parameters (1 where none does)."""
    ranks = range(1, min(shape) + 1)
    return max(1, bisect_right(ranks, parameters, key=lambda rank: stored_parameters(rank, shape, form)))
