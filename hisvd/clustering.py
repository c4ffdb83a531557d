"""LESA-style clusters of adjacent decoder layers: layers whose weights read the same input directions stay together.

Source of the idea: LESA, arXiv 2502.13794 (the leading singular vectors of adjacent layers evolve smoothly).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch


def subspace_overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean squared cosine of the principal angles between the row spaces of a and b, (k, n) with orthonormal rows.

    1 for equal subspaces, k/n on average for random ones.
    """
    return float((a.double() @ b.double().T).square().sum() / min(len(a), len(b)))


def layer_clusters(leading_vectors: Sequence[dict[str, torch.Tensor]], clusters: int | None = None) -> list[int]:
    """The cluster index of every layer, from 0; a cluster is a run of adjacent layers.

    `leading_vectors[layer]` maps the layer's sublayers to their leading right singular vectors (k, n). The link
    between two adjacent layers is the mean overlap over the sublayers that both have; the weakest links are cut to
    leave `clusters` runs (default: about the square root of the number of layers).
    """
    count = len(leading_vectors)
    wanted = min(clusters or max(1, round(math.sqrt(count))), count)
    links = []
    for below, above in pairwise(leading_vectors):
        overlaps = [subspace_overlap(v, above[name]) for name, v in below.items() if name in above]
        links.append(sum(overlaps) / max(len(overlaps), 1))
    cuts = set(sorted(range(len(links)), key=lambda i: links[i])[: wanted - 1])
    indices = [0]
    for i in range(len(links)):
        indices.append(indices[-1] + (i in cuts))
    return indices
