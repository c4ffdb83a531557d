"""Stage 2: shrink the shares of sublayer clusters whose discarded tails are redundant."""

import math
from collections.abc import Hashable, Sequence

import torch

from hisvd.cluster_sublayer_lwe import cluster_scores, tail_redundancy
from hisvd.rank_allocation import project_shares, ranks_from_shares
from hisvd.shape_utils import Sublayer

MODULATIONS = ("logarithmic", "power", "exponential", "linear")


def modulation_factor(score: float, method: str, strength: float) -> float:
    """Factor in (0, 1] on a share for an LWE score x ≥ 0 and strength β ≥ 0; β = 0 changes nothing.

    logarithmic 1/(1 + β ln(1+x)), power (1+x)^−β, exponential e^(−βx), linear max(0.05, 1 − βx).
    """
    if method == "logarithmic":
        return 1.0 / (1.0 + strength * math.log1p(score))
    if method == "power":
        return (1.0 + score) ** -strength
    if method == "exponential":
        return math.exp(-strength * score)
    return max(0.05, 1.0 - strength * score)


def stage2_shares(
    sublayers: Sequence[Sublayer],
    shares: Sequence[float],
    whitened_singular_values: Sequence[torch.Tensor],
    clusters: Sequence[Hashable],
    target: float,
    form: str,
    modulation: str,
    lwe_strength: float,
    tail_redundancy_weight: float,
) -> list[float]:
    """Stage 1 shares modulated by the LWE score of each sublayer's cluster, projected onto the budget again.

    `whitened_singular_values` holds those of W H^{1/2} for every sublayer, largest first, `clusters` its cluster.
    """
    ranks = ranks_from_shares(shares, sublayers, target, form)
    redundancies = [tail_redundancy(q, r) for q, r in zip(whitened_singular_values, ranks, strict=True)]
    scores = cluster_scores(redundancies, clusters, tail_redundancy_weight)
    factors = {c: modulation_factor(score, modulation, lwe_strength) for c, score in scores.items()}
    modulated = [share * factors[c] for share, c in zip(shares, clusters, strict=True)]
    return project_shares(modulated, sublayers, target, form)
