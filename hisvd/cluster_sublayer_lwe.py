"""Layer-wise entropy (LWE): how redundant is what truncation would discard, sublayer by sublayer."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from hisvd.rank_metrics import effective_rank


def tail_redundancy(singular_values: torch.Tensor, rank: int) -> float | None:
    """1 − e/len(q), with e the effective rank of the discarded values q = σ_{rank+1..} of shape (k,).

    0 for a flat tail (everything dropped matters equally), near 1 for a tail that is itself low-rank.
    None where fewer than two values are discarded: such a tail has no shape.
    """
    tail = singular_values[rank:]
    if len(tail) < 2:
        return None
    return 1.0 - effective_rank(tail) / len(tail)


def cluster_scores(
    redundancies: Sequence[float | None], clusters: Sequence[Hashable], weight: float
) -> dict[Hashable, float]:
    """Score x_t = weight · (mean redundancy of cluster t) / (mean over clusters) for every cluster.

    A cluster whose members all have no redundancy (None) scores 0 and does not enter the mean.
    """
    members: dict[Hashable, list[float]] = defaultdict(list)
    for redundancy, cluster in zip(redundancies, clusters, strict=True):
        if redundancy is not None:
            members[cluster].append(redundancy)
    means = {cluster: sum(values) / len(values) for cluster, values in members.items()}
    overall = sum(means.values()) / len(means) if means else 0.0
    return {c: weight * means[c] / overall if c in means and overall > 0 else 0.0 for c in clusters}
