"""The modules that stand in for nn.Linear in a compressed model."""

from typing import Literal

import torch
from torch import nn

from hisvd.pivoting import pack_pivoted, unpack_pivoted
from hisvd.rounding import round_product
from hisvd.shape_utils import FactorForm


class LowRankLinear(nn.Module):
    """y = left (right x) + bias, with left (m, r) and right (r, n)."""

    form: FactorForm = "svd"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.right = nn.Parameter(torch.empty(rank, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The (m, n) weight that this module stands for."""
        return self.left @ self.right

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """t = base x, then rows of [t; coefficients t] in their order, + bias: see hisvd.pivoting."""

    form: FactorForm = "pivoted"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.base = nn.Parameter(torch.empty(rank, in_features))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank))
        self.register_buffer("permutation", torch.empty(out_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        base_rows = nn.functional.linear(x, self.base)
        other_rows = nn.functional.linear(base_rows, self.coefficients)
        y = torch.cat([base_rows, other_rows], dim=-1).index_select(-1, self.permutation)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> torch.Tensor:
        """The (m, n) weight that this module stands for."""
        return unpack_pivoted(self.base, self.coefficients, self.permutation)

    extra_repr = LowRankLinear.extra_repr


MODULE_OF_FORM: dict[FactorForm, type[nn.Module]] = {"svd": LowRankLinear, "pivoted": PivotedLinear}


def factor_tensors(
    left: torch.Tensor,
    right: torch.Tensor,
    form: FactorForm | Literal["dense"],
    dtype: torch.dtype,
    root: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """State dict entries (without bias) of the module of `form` for the pair left (m, r), right (r, n), in `dtype`.

    `root` (n, n) is the Cholesky root of the inputs' second moment, which decides how rounding errors are weighed.
    "dense" gives the weight of a plain linear.
    """
    if form == "dense":
        return {"weight": (left @ right).to(dtype)}
    if form == "svd":
        left, right = round_product(left, right, root, dtype)
        return {"left": left.to(dtype), "right": right.to(dtype)}
    base, coefficients, permutation = pack_pivoted(left, right)
    coefficients, base = round_product(coefficients, base, root, dtype)
    return {"base": base.to(dtype), "coefficients": coefficients.to(dtype), "permutation": permutation}


def swap_linears(model: nn.Module, table: dict[str, dict]) -> None:
    """Replace the nn.Linear modules named in `table` by empty factored ones, in place.

    `table` maps a module's full name to {"form": "pivoted" | "svd", "rank": r}. New modules take the
    device and dtype of the weight they replace, and the bias.

    Raises:
        KeyError: the model has no linear of that name.
    """
    for name, entry in table.items():
        parent_name, _, child_name = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = getattr(parent, child_name)
        except AttributeError:
            raise KeyError(name) from None
        with torch.device(linear.weight.device):
            module = MODULE_OF_FORM[entry["form"]](
                linear.in_features, linear.out_features, entry["rank"], linear.bias is not None
            )
        module.to(linear.weight.dtype).bias = linear.bias
        setattr(parent, child_name, module)
