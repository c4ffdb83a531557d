"""Fold the row orders of pivoted linears into the MLPs, so that their outputs need not be permuted.

The order of an MLP's hidden neurons is free: rows of its inputs and columns of its output linear may move together.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hisvd.component.families import ADAPTERS, adapter_for
from hisvd.component.low_rank import LowRankLinear, PivotedLinear


@torch.no_grad()
def fold_permutations(model: PreTrainedModel) -> None:
    """Give the neurons of every MLP, in place, the order in which its first pivoted input computes them.

    The model computes the same. MLPs with fused inputs, integer codes or offloaded weights stay as they are.
    """
    if model.config.model_type not in ADAPTERS:
        return
    adapter = adapter_for(model)
    layers: Any = model.get_submodule(adapter.layers)
    for layer in layers:
        for mlp in adapter.mlps_of(layer):
            inputs = [layer.get_submodule(path) for path in mlp.inputs]
            output = layer.get_submodule(mlp.output)
            first = next((module for module in inputs if isinstance(module, PivotedLinear)), None)
            if first is None or mlp.fused > 1 or not all(map(_is_plain, (*inputs, output))):
                continue
            order = torch.argsort(first.permutation)
            for module in inputs:
                _reorder_rows(module, order)
            _reorder_columns(output, order)
            first.in_order = True


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear, or a factored one, whose weights are in memory as they are."""
    linears = list(module.children()) or [module]
    return all(isinstance(m, nn.Linear | Conv1D) and not m.weight.is_meta for m in linears)


def _reorder_rows(module: Any, order: torch.Tensor) -> None:
    """Move output order[i] of a linear to place i."""
    if isinstance(module, PivotedLinear):
        module.permutation = module.permutation[order]
    else:
        _reorder(module.left if isinstance(module, LowRankLinear) else module, order, outputs=True)
    if module.bias is not None:
        module.bias.data = module.bias.data[order.to(module.bias.device)]


def _reorder_columns(module: Any, order: torch.Tensor) -> None:
    """Move input order[i] of a linear to place i."""
    inner = {PivotedLinear: "base", LowRankLinear: "right"}.get(type(module))
    _reorder(getattr(module, inner) if inner else module, order, outputs=False)


def _reorder(linear: Any, order: torch.Tensor, outputs: bool) -> None:
    """Reorder the outputs, or the inputs, of the weight of an nn.Linear or a Conv1D."""
    dim = int(outputs == isinstance(linear, Conv1D))
    linear.weight.data = linear.weight.data.index_select(dim, order.to(linear.weight.device))
