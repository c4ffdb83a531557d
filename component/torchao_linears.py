"""Hands linears of integer codes over to torchao, whose kernels for GPUs multiply by them without unpacking."""

import torch
from torch import nn

from hisvd.component.quantized_linear import QuantizedLinear, int4_operands
from hisvd.errors import HiSVDError
from hisvd.integer_codes import INT4_GROUP

ROWS, COLUMNS = 8, 1024  # the kernel for GPUs takes multiples of these


def to_torchao(model: nn.Module) -> nn.Module:
    """Give every linear in integer codes a weight that torchao multiplies by; returns the model, which is changed.

    Call it once the model is on the device on which it will run. Codes and scales stay the same, so results differ by
    rounding alone, but the model can no longer be saved as it was. Int4 computes in bfloat16 and needs a GPU.

    Raises:
        HiSVDError: torchao is not installed, or the model has int4 codes and is not on a CUDA device.

    Example:
        >>> import hisvd, torch
        >>> model = hisvd.to_torchao(hisvd.load("models/small_int8", torch.bfloat16, "cuda"))
    """
    try:
        import torchao  # noqa: F401 (the reason for a failure below)
    except ImportError:
        raise HiSVDError("torchao is not installed; run: pip install 'hisvd[quant]'.") from None
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(_torchao_weight(module, dtype), requires_grad=False)
            linear.register_parameter("bias", module.bias)
            model.set_submodule(name, linear)
    return model


def _torchao_weight(module: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    from torchao.quantization import Int4TilePackedTo4dTensor, Int8Tensor

    shape = torch.Size((module.out_features, module.in_features))
    if module.format_name == "int8":
        return Int8Tensor(module.codes, module.weight_scale, [1, module.in_features], dtype)
    if module.codes.device.type != "cuda":
        raise HiSVDError("torchao's int4 kernel needs a CUDA device; move the model there first, or use it as it is.")
    codes, scales = int4_operands(module, ROWS, COLUMNS)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    return Int4TilePackedTo4dTensor(packed, scales, [1, INT4_GROUP], shape)
