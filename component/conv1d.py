"""GPT-2's Conv1D: a linear whose weight is stored transposed in the checkpoint. Inside HiSVD it is an nn.Linear."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def conv1d_weights(model: nn.Module) -> set[str]:
    """Names of the Conv1D weights of `model`."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def as_linears(model: nn.Module) -> None:
    """Replace every Conv1D of `model` by an nn.Linear without weights (on the meta device)."""
    for name in conv1d_weights(model):
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        rows, columns = linear_shape(model.get_submodule(f"{parent}.{child}"))
        with torch.device("meta"):
            setattr(model.get_submodule(parent), child, nn.Linear(columns, rows))


def linear_shape(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear, a Conv1D, or one of our modules that stand in for one."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def narrow_like(module: Any, in_features: int, out_features: int) -> nn.Module:
    """An nn.Linear or a Conv1D of another size, of the class and dtype of `module`, without bias."""
    if isinstance(module, Conv1D):
        narrow: Any = Conv1D(out_features, in_features)
        narrow.bias = None
    else:
        narrow = nn.Linear(in_features, out_features, bias=False)
    return narrow.to(module.weight.dtype)
