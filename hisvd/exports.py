"""What is done to a linear's factors before they are written: the choices of --export and of --linear_dtype."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from hisvd.factor_forms import Entries
from hisvd.int6_fit import int6_entries
from hisvd.integer_codes import INTEGERS


class Export(NamedTuple):
    """`multiply` the factors back into a plain weight; `encode` the entries, given E[x xᵀ] (None: by plain rules);
    `stock`: only what the family's own code loads, with one MLP width in its config.json."""

    multiply: bool = False
    encode: Callable[[Entries, torch.Tensor | None], Entries] | None = None
    stock: bool = False

    @property
    def needs_hisvd(self) -> bool:
        """Whether the result loads only where hisvd is installed."""
        return not (self.multiply or self.stock)


EXPORTS = {
    "none": Export(),
    "int6": Export(encode=int6_entries),
    "dense": Export(multiply=True),
    "plain": Export(stock=True),
}

LINEAR_DTYPES = ("bf16", *INTEGERS)
