"""A linear whose weight is stored in the INT6 2:4 pairwise sparse format, see hisvd.sparse_int6."""

import functools
import itertools
import logging
from collections.abc import Callable

import torch
from torch import nn

from hisvd.errors import first_line
from hisvd.sparse_int6 import (
    CHUNK,
    COLUMNS,
    FORMAT_NAME,
    USER_ALIAS,
    check_packed,
    dequantize,
    kept_pairs,
    pack_weight,
    padded,
    rows_at_once,
)

FEW_TOKENS = 4  # up to this many, the fused product is faster than dequantizing for a matrix product
# Every chunk keeps its pairs 0 and 1: legal metadata for a module that waits for its weights.
EMPTY_METADATA = 0x44444444


def first_tensor(module: nn.Module) -> torch.Tensor:
    """A tensor with the device of `module` and, if it has parameters, their dtype."""
    return next(itertools.chain(module.parameters(), module.buffers()))


def apply_except(module: nn.Module, kept: str, fn: Callable, recurse: bool) -> nn.Module:
    """`nn.Module._apply`, after which the buffer `kept` has its dtype again: it is part of a format."""
    before = module.get_buffer(kept)
    nn.Module._apply(module, fn, recurse)
    if module.get_buffer(kept).dtype != before.dtype:
        setattr(module, kept, before.to(module.get_buffer(kept).device))
    return module


class INT6SparseLinear(nn.Module):
    """y = W x + bias, with W (m, n) unpacked whenever it is used, a block of rows at a time."""

    format_name = FORMAT_NAME
    user_alias = USER_ALIAS
    scale_name = "scales"  # the buffer whose dtype no cast changes
    packed_weight: torch.Tensor
    metadata: torch.Tensor
    scales: torch.Tensor
    qweight = property(first_tensor)  # where peft looks for the device of a module that has no `weight`

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        words = -(-in_features // COLUMNS)
        self.register_buffer("packed_weight", torch.zeros(out_features, 24 * words, dtype=torch.uint8))
        self.register_buffer("metadata", torch.full((out_features, words), EMPTY_METADATA, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def from_dense(cls, layer: nn.Linear) -> "INT6SparseLinear":
        """The module for a linear, by the plain rule of the format, with a copy of its bias.

        Raises:
            TypeError: `layer` is not an nn.Linear.
            HiSVDError: the weight is not finite.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"INT6SparseLinear.from_dense takes an nn.Linear, not a {type(layer).__name__}.")
        module = cls(layer.in_features, layer.out_features, bias=False).to(layer.weight.device)
        module.load_state_dict(pack_weight(layer.weight.detach()))
        if layer.bias is not None:
            module.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return module

    def dequantize_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (m, n) weight that this module stands for."""
        return dequantize(self.packed_weight, self.metadata, self.scales, self.in_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        tokens = x.numel() // self.in_features
        few = 0 < tokens <= FEW_TOKENS and not (x.requires_grad and torch.is_grad_enabled())
        product = fused_product(x.device.type) if few else None
        if product:
            y = product(x.reshape(tokens, -1), self.packed_weight, self.metadata, self.scales).to(x.dtype)
            y = y.view(*x.shape[:-1], self.out_features)
        else:
            y = x.new_empty(*x.shape[:-1], self.out_features)
            for first in range(0, self.out_features, rows_at_once(self.in_features)):
                rows = slice(first, first + rows_at_once(self.in_features))
                packed, metadata, scales = self.packed_weight[rows], self.metadata[rows], self.scales[rows]
                weight = dequantize(packed, metadata, scales, self.in_features, x.dtype)
                y[..., rows] = nn.functional.linear(x, weight)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Moves and casts as usual, but the scales stay float32."""
        return apply_except(self, self.scale_name, fn, recurse)

    def check(self) -> None:
        """Refuse a damaged weight.

        Raises:
            HiSVDError: a wrong size or dtype, or values that the format does not allow; it begins with the tensor.
        """
        check_packed(self.packed_weight, self.metadata, self.scales, (self.out_features, self.in_features))

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.user_alias}"


def few_token_product(
    x: torch.Tensor, packed_weight: torch.Tensor, metadata: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """x Wᵀ in float32 for x (tokens, n), reading only the inputs that kept pairs multiply; written to be compiled."""
    low, middle, high = packed_weight.unflatten(1, (-1, 3)).to(torch.int32).unbind(-1)
    values = (low, low >> 6 | middle << 2, middle >> 4 | high << 4, high >> 2)
    first, second = kept_pairs(metadata)
    chunk = CHUNK * torch.arange(first.shape[1], device=x.device, dtype=torch.int32)
    first, second = chunk + 2 * first, chunk + 2 * second
    inputs = padded(x.float())
    # Four products added up, not stacked and summed: the stack would be written to memory first.
    columns = (first, first + 1, second, second + 1)
    products = sum(((v & 63 ^ 32) - 32) * inputs[:, column] for v, column in zip(values, columns, strict=True))
    return products.sum(-1) * scales


@functools.cache
def fused_product(device: str) -> Callable | None:
    """`few_token_product` compiled for a device type, or None (with one line in the log) where that fails."""
    compiled = torch.compile(few_token_product, dynamic=True)
    try:
        example = INT6SparseLinear(128, 8, bias=False).to(device)
        compiled(torch.ones(1, 128, device=device), example.packed_weight, example.metadata, example.scales)
    except Exception as error:  # whatever a missing or broken compiler raises
        logging.getLogger("hisvd").warning(
            "INT6 products of few tokens run without torch.compile, more slowly: %s", first_line(error)
        )
        return None
    return compiled
