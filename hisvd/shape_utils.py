"""Shapes of the linear sublayers and how many numbers each factor form stores for a rank."""

import math
from dataclasses import dataclass
from typing import Literal

FactorForm = Literal["pivoted", "svd"]


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
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def size(self) -> int:
        """Numbers in the dense weight, m·n."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """min(m, n): the rank that stands for "stays a plain linear"."""
        return min(self.out_features, self.in_features)


def stored_numbers(rank: int, shape: tuple[int, int], form: FactorForm) -> int:
    """Numbers stored for an (m, n) weight at `rank`, never more than the dense m·n.

    `svd` stores r(m+n) numbers, `pivoted` r(m+n-r); pivot indices are not weights and not counted.
    """
    m, n = shape
    if rank >= min(m, n):
        return m * n
    factored = rank * (m + n) if form == "svd" else rank * (m + n - rank)
    return min(factored, m * n)


def is_dense(rank: int, shape: tuple[int, int], form: FactorForm) -> bool:
    """Whether the form saves nothing at this rank, so that the sublayer stays a plain linear."""
    return stored_numbers(rank, shape, form) >= shape[0] * shape[1]


def next_rank(rank: int, shape: tuple[int, int], form: FactorForm) -> int:
    """The next larger useful rank: rank + 1, or min(m, n) where that would save nothing."""
    return min(shape) if is_dense(rank + 1, shape, form) else rank + 1


def largest_rank(numbers: float, shape: tuple[int, int], form: FactorForm) -> int:
    """The largest rank, at least 1, that stores at most `numbers` numbers (rank 1 where none does)."""
    m, n = shape
    if numbers >= m * n:
        return min(m, n)
    if form == "svd":
        rank = int(numbers // (m + n))
    else:  # the smaller root of r² − (m+n) r + numbers = 0
        rank = int(((m + n) - math.sqrt((m + n) ** 2 - 4 * numbers)) / 2)
        while stored_numbers(rank + 1, shape, form) <= numbers:  # undo a root rounded down
            rank += 1
        while rank > 1 and stored_numbers(rank, shape, form) > numbers:  # undo a root rounded up
            rank -= 1
    return max(rank, 1)
