"""Mixtures of experts: transformers fuses a layer's experts into two tensors; here each expert has its own linears."""

import re
from typing import Any

import torch
from torch import nn


class SeparateExperts(nn.ModuleDict):
    """Computes what the family's fused experts do, with an nn.Linear per matrix, so that each can be swapped.

    Member "3" holds the linears of expert 3 by name. Called by the family's own block, after its router.
    """

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        """Take the weights of `fused`: gate_up_proj (experts, 2 inner, hidden) and down_proj (experts, hidden, inner).

        `names` are those of the gate, up and down linears.
        """
        super().__init__()
        self.names, self.act_fn, self.num_experts = names, fused.act_fn, len(fused.down_proj)
        for index, (gate_up, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            matrices = (*gate_up.chunk(2), down)
            self[str(index)] = nn.ModuleDict({n: _linear(w) for n, w in zip(names, matrices, strict=True)})

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map (tokens, hidden) to the same shape; the router chose experts and weights (tokens, experts per token)."""
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            gate, up, down = (self.get_submodule(f"{index}.{name}") for name in self.names)
            token, choice = torch.where(top_k_index == index)
            x = hidden_states[token]
            y = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, choice, None]
            result = result.index_add(0, token, y.to(result.dtype))
        return result


def _linear(weight: torch.Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear


def kind_of(path: str) -> str:
    """`path` with a star for an expert's index: the same for all experts' linears of one kind."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", path)


def is_routed(path: str) -> bool:
    """Whether a linear (or a group of them) belongs to an expert, so that only some tokens reach it."""
    return kind_of(path) != path
