"""The modules that stand in for nn.Linear in a compressed model."""

from typing import Literal

import torch
from torch import nn

from hisvd.component.conv1d import linear_shape
from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.pivoting import pack_pivoted, unpack_pivoted
from hisvd.rounding import round_product
from hisvd.shape_utils import FactorForm
from hisvd.sparse_int6 import dequantize


class LowRankLinear(nn.Module):
    """y = left (right x) + bias, with left (m, r) and right (r, n)."""

    form: FactorForm = "svd"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        y = self.left(self.right(x))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """t = base x, then rows of [t; coefficients t] in their order, + bias: see hisvd.pivoting."""

    form: FactorForm = "pivoted"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.base = nn.Linear(in_features, rank, bias=False)
        self.coefficients = nn.Linear(rank, out_features - rank, bias=False)
        self.register_buffer("permutation", torch.empty(out_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        base_rows = self.base(x)
        y = torch.cat([base_rows, self.coefficients(base_rows)], dim=-1).index_select(-1, self.permutation)
        return y if self.bias is None else y + self.bias

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
        return {"left.weight": left.to(dtype), "right.weight": right.to(dtype)}
    base, coefficients, permutation = pack_pivoted(left, right)
    coefficients, base = round_product(coefficients, base, root, dtype)
    return {"base.weight": base.to(dtype), "coefficients.weight": coefficients.to(dtype), "permutation": permutation}


def dense_weight(entries: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
    """The weight (m, n) in float64 that the state dict entries of a plain, factored or INT6 linear stand for."""

    def matrix(prefix: str, columns: int) -> torch.Tensor:
        if f"{prefix}weight" in entries:
            return entries[f"{prefix}weight"].double()
        code = (entries[prefix + key] for key in ("packed_weight", "metadata", "scales"))
        return dequantize(*code, columns, torch.float64)

    if "permutation" in entries:
        base = matrix("base.", in_features)
        return unpack_pivoted(base, matrix("coefficients.", len(base)), entries["permutation"])
    if any(name.startswith("right.") for name in entries):
        right = matrix("right.", in_features)
        return matrix("left.", len(right)) @ right
    return matrix("", in_features)


def modules_of(name: str, entries: dict[str, torch.Tensor]) -> dict[str, dict]:
    """The table entries for `swap_linears` of the linear `name` with these state dict entries."""
    table = {}
    for key, tensor in entries.items():
        path, _, kind = f"{name}.{key}".rpartition(".")
        if kind == "packed_weight":
            table[path] = {"form": "int6"}
        if kind in ("weight", "packed_weight") and key.startswith(("base.", "right.")):
            table[name] = {"form": "pivoted" if key.startswith("base.") else "svd", "rank": len(tensor)}
    return table


def swap_linears(model: nn.Module, table: dict[str, dict]) -> None:
    """Replace the nn.Linear (or Conv1D) modules named in `table` by empty factored or INT6 ones, in place.

    `table` maps a module's full name to {"form": "pivoted" | "svd", "rank": r} or {"form": "int6"}; the factors of a
    factored module are linears too and may follow it as INT6 ones. New modules take the device and dtype of the weight
    they replace, and the bias.

    Raises:
        KeyError: the model has no linear of that name.
    """
    for name, entry in sorted(table.items()):  # a module comes before its factors
        parent_name, _, child_name = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = getattr(parent, child_name)
        except AttributeError:
            raise KeyError(name) from None
        size = linear_shape(linear)[::-1]
        with torch.device("meta"):  # weights are loaded later: nothing is drawn for them
            if entry["form"] == "int6":
                module = INT6SparseLinear(*size, bias=False)
            else:
                module = MODULE_OF_FORM[entry["form"]](*size, entry["rank"], bias=False).to(linear.weight.dtype)
        if not linear.weight.is_meta:
            module.to_empty(device=linear.weight.device)
        module.bias = linear.bias
        setattr(parent, child_name, module)
