"""The allocation rules by name: from the spectra in the cache to the ranks of all sublayers, within the budget.

A rule is a function of a RankProblem and a target. To add one, add an entry to ALLOCATIONS.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hisvd.calibration_cache import LEADING_VECTORS, REMOVAL, ROUNDING, SPECTRA, CalibrationCache
from hisvd.clustering import layer_clusters
from hisvd.component.adapter import Mlp
from hisvd.component.experts import kind_of
from hisvd.integer_codes import INTEGERS
from hisvd.rank_allocation import project_shares, ranks_from_shares, stage1_shares, uniform_shares
from hisvd.rank_metrics import rank_of
from hisvd.refinement import stage2_factors
from hisvd.shape_utils import PLAIN_BYTES, Storage, Sublayer
from hisvd.width_allocation import loss_ranks

if TYPE_CHECKING:  # the settings take their choices from the rules, so they import this module
    from hisvd.settings import CompressionSettings


# What is truncated is chosen by its small loss on the calibration text, so it costs more on other texts; rounding
# errors are not chosen. By experience, see docs/ablations.md.
ROUNDING_DISCOUNT = 0.5
# Where little is removed, neurons go that other texts may need; where much is, all have to give. Between these shares
# of the parameters, the losses of removing neurons pass from measured to guarded ones. By experience as well.
MEASURED_BELOW, GUARDED_ABOVE = 0.6, 0.7


def guard_at(target: float, settings: "CompressionSettings") -> float:
    """The part of guarded losses (layer_statistics.GUARD) among those of removing neurons, in [0, 1]."""
    smallest = PLAIN_BYTES * max(i.per_byte for i in INTEGERS.values()) if settings.budget == "bytes" else 1
    return min(max((target * smallest - MEASURED_BELOW) / (GUARDED_ABOVE - MEASURED_BELOW), 0.0), 1.0)


@dataclass(frozen=True)
class RankProblem:
    """What a rule works from: the sublayers, their spectra in the cache, and the settings.

    Whatever takes time is read or computed on first use, once for all targets.
    """

    cache: CalibrationCache
    settings: "CompressionSettings"

    @cached_property
    def sublayers(self) -> list[Sublayer]:
        """All sublayers, in the order of the forward pass; ranks come in the same order."""
        return self.cache.sublayers

    @cached_property
    def _spectra(self) -> list[dict[str, torch.Tensor]]:
        """By layer, the spectra and what removing neurons and rounding cost."""
        return [self.cache.read_small(index, SPECTRA, REMOVAL, ROUNDING) for index in range(self.cache.num_layers)]

    def singular_values(self, kind: str) -> list[torch.Tensor]:
        """Singular values (min(m, n),) of every sublayer, largest first.

        `kind` is `singular_values` (of W), `whitened_singular_values` (of W H^{1/2}), or, where the cache has
        gradients, `two_sided_singular_values` (of F^{1/2} W H^{1/2}).
        """
        return [self._spectra[s.layer][f"{s.path}.{kind}"] for s in self.sublayers]

    def spectra_by_width(self, layer: int, path: str) -> torch.Tensor:
        """Two-sided singular values (widths, min(m, n)) of a member of an MLP at neurons.spectrum_widths, then full."""
        known = self._spectra[layer]
        return torch.cat([known[f"{path}.narrow_singular_values"], known[f"{path}.two_sided_singular_values"][None]])

    @cached_property
    def mlps(self) -> list[tuple[Sublayer, Mlp]]:
        """The MLPs whose neurons can be removed, each with the first sublayer of its layer."""
        layers = range(self.cache.num_layers)
        return [(self.cache.sublayers_of(index)[0], mlp) for index in layers for mlp in self.cache.mlps_of(index)]

    def removal_losses(self, layer: int, path: str, guard: float) -> torch.Tensor:
        """What removing 0 … n neurons adds (n + 1,), for the MLP with the output linear `path`; see `guard_at`."""
        measured, guarded = self._spectra[layer][f"{path}.{REMOVAL}"]
        return torch.lerp(measured, guarded, guard)

    def noise(self, sublayer: Sublayer, storage: Storage) -> float:
        """Energy of the rounding errors of its plain weight, as a fraction of that of F^{1/2} W H^{1/2}, discounted."""
        if storage.dtype is None:
            return 0.0
        known = self._spectra[sublayer.layer]
        energy = float(known[f"{sublayer.path}.two_sided_singular_values"].double().square().sum())
        errors = known[f"{sublayer.path}.{ROUNDING}"]
        return ROUNDING_DISCOUNT * float(errors[list(INTEGERS).index(storage.dtype)]) / energy if energy else 0.0

    @cached_property
    def weight_ranks(self) -> list[float]:
        """R(W) of every sublayer by the rank metric that the settings name."""
        sigmas, method = self.singular_values("singular_values"), self.settings.rank_method
        return [rank_of(sigma, s.shape, method) for sigma, s in zip(sigmas, self.sublayers, strict=True)]

    @cached_property
    def clusters(self) -> list[Hashable]:
        """The Stage 2 cluster of every sublayer."""
        return CLUSTERINGS[self.settings.cluster_by](self)


def clusters_by_type(problem: RankProblem) -> list[Hashable]:
    """One cluster per sublayer type."""
    return [kind_of(s.path) for s in problem.sublayers]


def clusters_by_type_and_depth(problem: RankProblem) -> list[Hashable]:
    """One cluster per sublayer type and run of similar adjacent layers."""
    cache = problem.cache
    depth = layer_clusters([cache.read_small(index, LEADING_VECTORS) for index in range(cache.num_layers)])
    return [(kind_of(s.path), depth[s.layer]) for s in problem.sublayers]


CLUSTERINGS: dict[str, Callable[[RankProblem], list[Hashable]]] = {
    "type": clusters_by_type,
    "type_depth": clusters_by_type_and_depth,
}


def least_loss(problem: RankProblem, target: float) -> list[int]:
    """The ranks that add the least loss by its second-order estimate; without gradients, the least output error."""
    kind = "two_sided_singular_values" if problem.cache.has_gradients else "whitened_singular_values"
    settings, spectra = problem.settings, problem.singular_values(kind)
    return loss_ranks(spectra, problem.sublayers, target, settings.factors, settings.allowed_ranks)


def stages_1_and_2(problem: RankProblem, target: float) -> list[int]:
    """Shares by rank density (Stage 1), refined by the tail redundancy of their clusters (Stage 2)."""
    sublayers, settings = problem.sublayers, problem.settings
    shares = stage1_shares(sublayers, problem.weight_ranks, target, settings.alpha, settings.factors)
    factors = stage2_factors(
        problem.singular_values("whitened_singular_values"),
        ranks_from_shares(shares, sublayers, target, settings.factors),
        problem.clusters,
        settings.modulation,
        settings.lwe_strength,
        settings.tail_redundancy_weight,
    )
    refined = [share * factor for share, factor in zip(shares, factors, strict=True)]
    shares = project_shares(refined, sublayers, target, settings.factors)
    return ranks_from_shares(shares, sublayers, target, settings.factors)


def uniform(problem: RankProblem, target: float) -> list[int]:
    """The same share of every sublayer."""
    sublayers, form = problem.sublayers, problem.settings.factors
    shares = project_shares(uniform_shares(sublayers, target), sublayers, target, form)
    return ranks_from_shares(shares, sublayers, target, form)


ALLOCATIONS: dict[str, Callable[[RankProblem, float], list[int]]] = {
    "hisvd": stages_1_and_2,
    "loss": least_loss,
    "uniform": uniform,
}
