"""Stage 2: shrink the shares of sublayer clusters whose discarded tails are redundant."""

import math
from collections.abc import Callable, Hashable, Sequence

import torch

from hisvd.cluster_sublayer_lwe import cluster_scores, tail_redundancy

# (LWE score x ≥ 0, strength β ≥ 0) → factor in (0, 1] on a share; β = 0 changes nothing. Each entry is a
# choice of `--modulation`.
MODULATIONS: dict[str, Callable[[float, float], float]] = {
    "logarithmic": lambda x, beta: 1.0 / (1.0 + beta * math.log1p(x)),
    "power": lambda x, beta: (1.0 + x) ** -beta,
    "exponential": lambda x, beta: math.exp(-beta * x),
    "linear": lambda x, beta: max(0.05, 1.0 - beta * x),
}


def stage2_factors(
    whitened_singular_values: Sequence[torch.Tensor],
    ranks: Sequence[int],
    clusters: Sequence[Hashable],
    modulation: str,
    lwe_strength: float,
    tail_redundancy_weight: float,
) -> list[float]:
    """The factor on each sublayer's Stage 1 share, the same for all members of a cluster.

    `whitened_singular_values` holds those of W H^{1/2} of every sublayer, largest first, `ranks` its Stage 1 rank,
    `clusters` its cluster.
    """
    redundancies = [tail_redundancy(q, r) for q, r in zip(whitened_singular_values, ranks, strict=True)]
    scores = cluster_scores(redundancies, clusters, tail_redundancy_weight)
    return [MODULATIONS[modulation](scores[cluster], lwe_strength) for cluster in clusters]
