"""Replace the moments of experts that few tokens reach by the pooled moments of all the layer's experts."""

import torch

from hisvd.component.experts import is_routed, kind_of


def pool_rare(sums: dict[str, torch.Tensor], tokens: dict[str, int]) -> list[str]:
    """Replace Σ v vᵀ (n, n) over an expert's tokens, where these are fewer than n, by the sum over all experts.

    Fewer tokens than channels leave directions unseen. The pooled sum is scaled to the expert's own token count
    (at least one, which is then written to `tokens`). Both arguments are changed in place and keyed by the name of a
    linear or of a group of them. Returns the names of those replaced.
    """
    rare = [name for name in sums if is_routed(name) and tokens[name] < len(sums[name])]
    for kind in {kind_of(name) for name in rare}:
        members = [name for name in sums if kind_of(name) == kind]
        total = sum((sums[name] for name in members), torch.zeros(()))
        mean = total / max(1, sum(tokens[name] for name in members))
        for name in set(members) & set(rare):
            tokens[name] = max(1, tokens[name])
            sums[name] = mean * tokens[name]
    return rare
