"""Shapes of the linear sublayers, and how many parameters a factor form stores in them for a rank."""

from bisect import bisect_right
from dataclasses import dataclass

from hisvd.factor_forms import FORMS, Shape


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
