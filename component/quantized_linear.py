"""A linear whose weight is stored in integer codes, see hisvd.integer_codes."""

from collections.abc import Callable

import torch
from torch import nn

from hisvd.component.int6_linear import apply_except, first_tensor
from hisvd.integer_codes import check_codes, dequantize_codes, empty_codes

BLOCK_SIZE = 2**18  # weights that are unpacked at once, so that they stay in a core's cache


class QuantizedLinear(nn.Module):
    """y = W x + bias in the dtype of x, with W (m, n) in the format `name`, a key of integer_codes.INTEGERS.

    W is unpacked whenever it is used, a block of rows at a time.
    """

    weight_scale: torch.Tensor
    qweight = property(first_tensor)  # as in INT6SparseLinear

    def __init__(self, in_features: int, out_features: int, name: str, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format_name = in_features, out_features, name
        for key, tensor in empty_codes(name, out_features, in_features).items():
            self.register_buffer(key, tensor)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def codes(self) -> torch.Tensor:
        """The codes as files hold them."""
        return self.get_buffer(f"weight_{self.format_name}")

    def dequantize_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (m, n) weight that this module stands for."""
        return dequantize_codes(self.codes, self.weight_scale, self.in_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        at_once = max(1, BLOCK_SIZE // self.in_features)
        for first in range(0, self.out_features, at_once):
            rows = slice(first, first + at_once)
            weight = dequantize_codes(self.codes[rows], self.weight_scale[rows], self.in_features, x.dtype)
            y[..., rows] = nn.functional.linear(x, weight)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Moves and casts as usual, but the scales keep their dtype."""
        return apply_except(self, "weight_scale", fn, recurse)

    def check(self) -> None:
        """Refuse damaged codes or scales.

        Raises:
            HiSVDError: values that the format does not allow; it begins with the tensor.
        """
        check_codes(self.codes, self.weight_scale, self.format_name)

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format_name}"
