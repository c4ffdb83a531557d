"""The modules that stand in for nn.Linear in a compressed model."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hisvd.component.conv1d import linear_shape, narrow_like
from hisvd.component.int6_linear import INT6SparseLinear, first_tensor
from hisvd.component.quantized_linear import QuantizedLinear
from hisvd.errors import HiSVDError
from hisvd.integer_codes import INTEGERS
from hisvd.schema import SIZE, TEXT

MANY_TOKENS = 128  # from which rows of the weight are permuted, see PivotedLinear


def product(factor: Any, x: torch.Tensor) -> torch.Tensor:
    """`factor(x)`, for a plain linear without bias by its weight: calling a module takes as long as a small product.

    Where adapters, codes or hooks (accelerate's too, which replace its forward) take part, the module is called.
    """
    hooks = factor._forward_pre_hooks or factor._forward_hooks or factor._backward_pre_hooks or factor._backward_hooks
    if type(factor) is nn.Linear and not hooks and "forward" not in factor.__dict__:
        weight = factor._parameters["weight"]  # factor.weight goes through Python's __getattr__
        assert weight is not None
        return nn.functional.linear(x, weight)
    return factor(x)


def select_columns(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """y[..., order] by the faster kernel: on CPUs, index_select copies column by column, which suits a single row."""
    if y.device.type == "cpu" and y.numel() > y.shape[-1]:
        return y.gather(-1, order.long().expand(*y.shape[:-1], -1))
    return y.index_select(-1, order)


class LowRankLinear(nn.Module):
    """y = left (right x) + bias, with left (m, r) and right (r, n)."""

    qweight = property(first_tensor)  # as in INT6SparseLinear

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False)
        self.left = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        y = product(self._modules["left"], product(self._modules["right"], x))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _forget_order(module: "PivotedLinear", _: object) -> None:
    """After load_state_dict the permutation may be another one."""
    module.in_order = False


class PivotedLinear(nn.Module):
    """t = base x, then rows of [t; coefficients t] in their order, + bias: see hisvd.pivoting.

    With `in_order` the permutation is the identity, and left out: see hisvd.component.fold.
    """

    permutation: torch.Tensor
    in_order = False
    qweight = property(first_tensor)

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.base = nn.Linear(in_features, rank, bias=False)
        self.coefficients = nn.Linear(rank, out_features - rank, bias=False)
        self.register_buffer("permutation", torch.empty(out_features, dtype=torch.int32))
        self.register_load_state_dict_post_hook(_forget_order)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        base_rows = product(self._modules["base"], x)
        if self._permutes_weights(x):
            unit = torch.eye(self.rank, dtype=x.dtype, device=x.device)
            weight = torch.cat([unit, self.coefficients.weight]).index_select(0, self.permutation)
            y = nn.functional.linear(base_rows, weight)
        else:
            rows = torch.cat([base_rows, product(self._modules["coefficients"], base_rows)], dim=-1)
            del base_rows  # not held in memory beside the two copies of all rows
            order: Any = self._buffers["permutation"]
            y = rows if self.in_order else select_columns(rows, order)
        return y if self.bias is None else y + self.bias

    def check(self) -> None:
        """Refuse a damaged permutation.

        Raises:
            HiSVDError: its entries are not the numbers from 0 to m - 1, each once; it begins with the tensor.
        """
        order = self.permutation
        if order.is_floating_point() or not torch.equal(order.sort().values.long().cpu(), torch.arange(len(order))):
            raise HiSVDError(
                f"permutation does not name every one of {len(order)} rows once; create or copy the model again."
            )

    def _permutes_weights(self, x: torch.Tensor) -> bool:
        """Whether to permute the rows of [1; coefficients] rather than the outputs of many tokens.

        On CPUs in 16 bits the latter takes longer than the products.
        """
        if self.in_order or x.numel() < MANY_TOKENS * x.shape[-1] or x.device.type != "cpu" or x.dtype.itemsize != 2:
            return False
        # A plain linear, without adapter or codes, whose weight accelerate does not bring in its forward alone.
        return type(self.coefficients) is nn.Linear and self.coefficients.weight.device == x.device

    extra_repr = LowRankLinear.extra_repr


# Keyed like hisvd.factor_forms.FORMS. Each is built as module(in_features, out_features, rank, bias: bool).
MODULE_OF_FORM: dict[str, type[nn.Module]] = {"pivoted": PivotedLinear, "svd": LowRankLinear}
# The schema of the table in config.json.
MODULES = {"*": {"form": TEXT, "rank?": SIZE, "in?": SIZE, "out?": SIZE}}


def swap_linears(model: nn.Module, table: dict[str, dict]) -> None:
    """Replace the nn.Linear (or Conv1D) modules named in `table` by empty factored or coded ones, in place.

    `table` maps a module's full name to {"form": a name in MODULE_OF_FORM, "rank": r}, {"form": "int6", "int8" or
    "int4"}, or {"form": "narrow"} for a module of the same class; "in" and "out" beside them are the numbers of its
    inputs and outputs where these have changed. The factors of a factored module are linears too and may be listed as
    codes themselves. New modules have the device and dtype of the weight they replace, and a bias if there was one.

    Raises:
        HiSVDError: the model has no linear of that name, or not of that size, or the table names an unknown form.
    """
    modules, head = dict(model.named_modules()), getattr(model, "get_output_embeddings", lambda: None)()
    for name, entry in sorted(table.items()):  # a module comes before its factors
        parent_name, _, child_name = name.rpartition(".")
        parent, linear = modules.get(parent_name), modules.get(name)
        if parent is None or not isinstance(linear, (nn.Linear, Conv1D)) or linear is head:
            raise HiSVDError(
                f"the table of modules names '{name[:100]}', which is no linear of the model's decoder layers; "
                "create the model again."
            )
        outputs, inputs = linear_shape(linear)
        size = entry.get("in", inputs), entry.get("out", outputs)
        has_rank = entry["form"] not in MODULE_OF_FORM or 0 < entry.get("rank", 0) <= min(size)
        if size[0] > inputs or size[1] > outputs or not has_rank:
            raise HiSVDError(
                f"the table of modules gives {name}, a linear of {inputs} inputs and {outputs} outputs, the entry "
                f"{str(entry)[:100]}, which does not fit it; create the model again."
            )
        with torch.device("meta"):  # weights are loaded later, so none are initialized
            if entry["form"] == "int6":
                module: nn.Module = INT6SparseLinear(*size, bias=False)
            elif entry["form"] in INTEGERS:
                module = QuantizedLinear(*size, entry["form"], bias=False)
            elif entry["form"] == "narrow":
                module = narrow_like(linear, *size)
            elif entry["form"] not in MODULE_OF_FORM:
                raise HiSVDError(
                    f"{name} is stored in the form '{entry['form'][:100]}', but this version of HiSVD only knows int6, "
                    f"narrow, {', '.join((*INTEGERS, *MODULE_OF_FORM))}; install a newer version."
                )
            else:
                module = MODULE_OF_FORM[entry["form"]](*size, entry["rank"], bias=False).to(linear.weight.dtype)
        if not linear.weight.is_meta:
            module.to_empty(device=linear.weight.device)
        module.bias = linear.bias
        if linear.bias is not None and size[1] != outputs:
            module.bias = nn.Parameter(linear.bias.new_empty(size[1]))
        setattr(parent, child_name, module)
        modules |= {name: module} | {f"{name}.{child}": part for child, part in module.named_children()}
