"""The linears whose weights are stored in codes, and a check of codes and permutations."""

from torch import nn

from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.component.low_rank import PivotedLinear
from hisvd.component.mapped_files import forget_pages, mapped_ranges
from hisvd.component.quantized_linear import QuantizedLinear
from hisvd.errors import HiSVDError

CODED_LINEARS = (INT6SparseLinear, QuantizedLinear)


def check_buffers(model: nn.Module, prefix: str = "") -> None:
    """Refuse a model, or a part of one whose modules' names start with `prefix`, with damaged codes or permutations.

    The model has just been loaded; what lies in mapped files does not stay in memory for having been checked.

    Raises:
        HiSVDError: a wrong size or dtype, or values that the format does not allow; the module is named.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (PivotedLinear, *CODED_LINEARS))]
    mapped = mapped_ranges() if found else []
    for name, module in found:
        if any(buffer.is_meta for buffer in module.buffers()):  # offloaded
            continue
        try:
            module.check()
        except HiSVDError as error:
            raise HiSVDError(f"{prefix}{name}.{error}") from None
        for buffer in module.buffers(recurse=False):
            forget_pages(buffer, mapped)
