"""A linear whose weight is stored in integer codes, see hisvd.integer_codes."""

from collections.abc import Callable

import torch
from torch import nn

from hisvd.component.int6_linear import apply_except, first_tensor
from hisvd.integer_codes import INT4_GROUP, SCALE, check_codes, dequantize_codes, empty_codes, unpack_codes

BLOCK_SIZE = 2**22  # weights that are unpacked at once
FEW_TOKENS = 12  # up to so many are quicker multiplied by the codes than by unpacked weights
CPU_ROWS = 16  # PyTorch's int4 product on CPUs takes multiples of these


def _forget_operands(module: "QuantizedLinear", _: object) -> None:
    """load_state_dict may write other codes into the same tensor."""
    module._operands = ()


class QuantizedLinear(nn.Module):
    """y = W x + bias in the dtype of x, with W (m, n) in the format `name`, a key of integer_codes.INTEGERS.

    W is unpacked whenever it is used, a block of rows at a time; but on CPUs in bfloat16, PyTorch multiplies a few
    tokens by the codes themselves, which for one takes half of the time of a plain linear or less.
    """

    weight_scale: torch.Tensor
    scale_name = SCALE
    qweight = property(first_tensor)  # as in INT6SparseLinear

    def __init__(self, in_features: int, out_features: int, name: str, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format_name = in_features, out_features, name
        self._operands: tuple[torch.Tensor, ...] = ()
        for key, tensor in empty_codes(name, out_features, in_features).items():
            self.register_buffer(key, tensor)
        self.register_load_state_dict_post_hook(_forget_operands)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def codes(self) -> torch.Tensor:
        """The codes as files hold them."""
        return self._buffers[f"weight_{self.format_name}"]  # type: ignore[return-value] # get_buffer takes longer

    def dequantize_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The (m, n) weight that this module stands for."""
        return dequantize_codes(self.codes, self.weight_scale, self.in_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        if self._multiplies_codes(x):
            y = self._few_token_product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        else:
            y = x.new_empty(*x.shape[:-1], self.out_features)
            # Codes of 8 bits are exact in these dtypes, and one scale per row can wait; in float16 sums would overflow.
            scaled_later = self.format_name == "int8" and x.dtype in (torch.float32, torch.bfloat16)
            at_once = max(1, BLOCK_SIZE // self.in_features)
            for first in range(0, self.out_features, at_once):
                rows = slice(first, first + at_once)
                if scaled_later:
                    weight = self.codes[rows].to(x.dtype)
                else:
                    weight = dequantize_codes(self.codes[rows], self.weight_scale[rows], self.in_features, x.dtype)
                y[..., rows] = nn.functional.linear(x, weight)
            if scaled_later:
                y = (y * self.weight_scale.flatten()).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _multiplies_codes(self, x: torch.Tensor) -> bool:
        """Whether PyTorch's product can be used; with other numbers of columns, that of int8 reads what it must not."""
        few = 0 < x.numel() <= FEW_TOKENS * self.in_features and self.in_features % INT4_GROUP == 0
        fitting = few and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        return fitting and not (torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()))

    def _few_token_product(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ (tokens, m) for x (tokens, n) in bfloat16 on the CPU; int4 codes are packed for it once."""
        if self.format_name == "int8":
            # The product takes scales in the dtype of x alone, which ours are finer than.
            y = torch._weight_int8pack_mm(x, self.codes, x.new_ones(self.out_features))
            return (y * self.weight_scale.flatten()).to(x.dtype)
        if not self._operands or self._operands[0] is not self.codes:
            codes, scales = int4_operands(self, CPU_ROWS, INT4_GROUP)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self._operands = (self.codes, packed, scales.to(x.dtype))
        _, packed, scales = self._operands
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, INT4_GROUP, scales)[:, : self.out_features]

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Moves and casts as usual, but the scales keep their dtype."""
        return apply_except(self, self.scale_name, fn, recurse)

    def check(self) -> None:
        """Refuse damaged codes or scales.

        Raises:
            HiSVDError: values that the format does not allow; it begins with the tensor.
        """
        check_codes(self.codes, self.weight_scale, self.format_name)

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format_name}"


def int4_operands(module: QuantizedLinear, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What PyTorch's int4 products take for an int4 module: int32 codes from 0 to 15 (m, n), and (n / 32, m, 2) of
    scales and zero points, padded to multiples of `rows` and `columns`. The weight is (code - 8) · scale + zero point.
    """
    codes, scales = unpack_codes(module.codes, module.in_features), module.weight_scale
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % columns, 0, -codes.shape[0] % rows)).int() + 8
    missing = (0, codes.shape[1] // INT4_GROUP - scales.shape[1], 0, len(codes) - len(scales))
    scales = nn.functional.pad(scales, missing)
    return codes, torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()
