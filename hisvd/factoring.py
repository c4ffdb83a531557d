"""Turn the weights of one decoder layer into what the files hold: the one place where matrices are factored.

An update (hisvd.updates) says which weights are factored and what their inputs are, and receives each result at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from hisvd.calibration_cache import CalibrationCache, output_moment
from hisvd.errors import naming
from hisvd.exports import EXPORTS, Export
from hisvd.factor_forms import DENSE, Entries, factor_tensors
from hisvd.layer_tensors import replace_entries
from hisvd.shape_utils import Sublayer
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.save_utils import ModelWriter
from hisvd.whitening_svd import (
    H_DAMPING,
    WHITENINGS,
    cholesky_root,
    left_singular_vectors,
    low_rank_factors,
    whitened,
)

if TYPE_CHECKING:  # the settings take their choices from the updates, so they import this module
    from hisvd.plan import Plan
    from hisvd.settings import CompressionSettings

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CompressionJob:
    """One model and its targets; `plans` and `writers` are keyed by target, `settings` are resolved."""

    checkpoint: Checkpoint
    cache: CalibrationCache
    settings: "CompressionSettings"
    plans: dict[float, "Plan"]
    writers: dict[float, ModelWriter]
    device: torch.device
    activation_budget: float = 0.0

    @property
    def whitening(self) -> str:
        """The metric of the factors."""
        assert self.settings.whitening is not None  # resolved
        return self.settings.whitening

    @property
    def export(self) -> Export:
        """What is done to the factors at once; the quality gate encodes linears later."""
        return EXPORTS["none" if self.settings.gated else self.settings.export]

    @property
    def fits_codes(self) -> bool:
        """Whether entries are encoded at once, fitted to the inputs."""
        return self.export.encode is not None and self.settings.int6_mode == "calibrated"

    def changes(self, sublayers: list[Sublayer]) -> bool:
        """Whether any of the sublayers is factored for any target."""
        return any(not plan.is_dense(s) for plan in self.plans.values() for s in sublayers)


class Case(NamedTuple):
    """Linears that share an input, for the targets that agree on their weights and inputs.

    `weights` holds W (m, n) by path inside the layer, `dtype` is what the files store them in, `moment` is
    E[x xᵀ] (n, n) of their input in float64.
    """

    targets: list[float]
    weights: dict[str, torch.Tensor]
    dtype: torch.dtype
    moment: torch.Tensor | None


class Update(Protocol):
    """The interface of every choice of --update (hisvd.updates); methods are called in this order, layer by layer."""

    shares_layers: bool  # several processes share the layers; otherwise all work on each

    def start(self, index: int, stored: Tensors) -> Tensors:
        """Begin layer `index`, whose tensors in the checkpoint are `stored`; returns its statistics from the cache."""

    def cases(self, index: int, members: list[Sublayer], needs_moment: bool) -> Iterator[Case]:
        """The cases of the linears `members`, which share an input, with moments if asked for."""

    def place(self, target: float, sublayer: Sublayer, entries: Entries) -> None:
        """Receive what a sublayer has become."""

    def advance(self, index: int) -> None:
        """End layer `index`, all of whose sublayers have been placed."""


@torch.no_grad()
def factor_layer(job: CompressionJob, update: Update, index: int, stored: Tensors) -> dict[float, Tensors]:
    """The tensors of layer `index` for the files of every target, made from those of the checkpoint.

    Raises:
        HiSVDError: factors that are not finite, or a damaged cache.
    """
    shards = {target: dict(stored) for target in job.plans}
    statistics = update.start(index, stored)
    for members in job.cache.groups_of(index):
        weighed = job.changes(members) and WHITENINGS[job.whitening].inputs
        for case in update.cases(index, members, weighed or job.fits_codes):
            root = None
            if weighed:
                assert case.moment is not None  # it was asked for
                root = cholesky_root(case.moment, H_DAMPING)
            for s in members:
                for target, entries in _results(job, case, s, statistics, root):
                    # Rounded like the files: later layers are fitted to what the saved model will compute.
                    update.place(target, s, entries)
                    replace_entries(job.checkpoint, s, shards[target], entries)
        for s in members:
            statistics.pop(f"{s.path}.F_eigenvectors", None)  # large, and no later group needs them
    return shards


def _results(
    job: CompressionJob, case: Case, s: Sublayer, statistics: Tensors, root: torch.Tensor | None
) -> Iterator[tuple[float, Entries]]:
    """The entries of sublayer `s` for every target of `case`; one decomposition serves them all."""
    weight, f, basis = case.weights.pop(s.path), None, None
    for target in case.targets:
        plan, entries = job.plans[target], {"weight": weight.to(case.dtype)}
        with naming(s.name):
            if not plan.is_dense(s):
                if basis is None:
                    f = output_moment(s, statistics, job.whitening, job.device)
                    basis = left_singular_vectors(whitened(weight, root, f))
                left, right = low_rank_factors(weight, basis, plan.ranks[s.name], f)
                entries = factor_tensors(left, right, DENSE if job.export.multiply else plan.form, case.dtype, root)
            if job.export.encode:
                entries = job.export.encode(entries, case.moment if job.fits_codes else None)
        yield target, entries
