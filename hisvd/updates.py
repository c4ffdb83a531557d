"""The updates by name: what factors are fitted to. See factoring.Update for their interface."""

from collections.abc import Callable, Iterator

import torch

from hisvd.cached_moments import input_moment
from hisvd.factor_forms import Entries, Shape
from hisvd.factoring import Case, CompressionJob, Tensors, Update, without_neurons
from hisvd.layer_tensors import stored_prefix
from hisvd.narrowing import output_fits
from hisvd.sequential_update import SequentialUpdate
from hisvd.shape_utils import Sublayer
from hisvd.whitening_svd import H_DAMPING, WHITENINGS, cholesky_root


class OneShot:
    """Factors every matrix as it is in the checkpoint, for the inputs that it has in the original model."""

    shares_layers = True

    def __init__(self, job: CompressionJob, first_layer: int) -> None:
        self.job = job

    def start(self, index: int, stored: Tensors) -> Tensors:
        """What the cache holds of the layer; what the gradients say of it only if that is needed."""
        job = self.job
        needed = WHITENINGS[job.whitening].outputs or any(plan.shapes for plan in job.plans.values())
        self.stored = stored
        self.statistics = job.cache.read_layer(index) if needed else job.cache.read_forward(index)
        return self.statistics

    def cases(self, index: int, members: list[Sublayer], needs_moment: bool) -> Iterator[Case]:
        """One case for all targets that keep the same neurons, which share what does not depend on their number."""
        job, first = self.job, members[0].path
        weights = {s.path: self.stored[f"{stored_prefix(job.checkpoint, s)}weight"].to(job.device) for s in members}
        moment = input_moment(members[0], self.statistics, job.device) if needs_moment else None
        biases, weighed = job.biases(members, self.stored), job.weighs(members)
        by_shape: dict[Shape, list[float]] = {}
        for target, plan in job.plans.items():
            by_shape.setdefault(plan.shape(members[0]), []).append(target)
        kept = [job.neurons_kept(targets[0], members, self.statistics) for targets in by_shape.values()]
        narrow = next((k for k in kept if k), None)
        fits, root_of_fits, root = None, None, None
        seen: dict[str, torch.Tensor] = {}
        if narrow and narrow.at_output:
            fits = output_fits(weights[first], biases.get(first), narrow, self.statistics, moment)
            root_of_fits = fits.root(moment) if moment is not None and weighed else None
        if moment is not None and weighed and not (fits and all(kept)):
            root = cholesky_root(moment, H_DAMPING)
            seen = {path: weight.double() @ root for path, weight in weights.items()} if narrow else {}
        # The weights of every case are its own: what is factored is taken out of them.
        case = Case([], weights, weights[first].dtype, moment if job.fits_codes else None)
        for targets, k in zip(by_shape.values(), kept, strict=True):
            own = case._replace(targets=targets, weights=dict(weights), root=root, seen=seen)
            own = own._replace(root=root_of_fits, seen={}) if k and k.at_output else own
            yield without_neurons(own, k, biases, fits)

    def place(self, target: float, sublayer: Sublayer, entries: Entries) -> None:
        """Nothing to do: no later case depends on it."""

    def advance(self, index: int) -> None:
        """Drop the layer."""
        del self.stored, self.statistics


UPDATES: dict[str, Callable[[CompressionJob, int], Update]] = {"sequential": SequentialUpdate, "none": OneShot}
