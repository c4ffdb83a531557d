"""The updates by name: what factors are fitted to. See factoring.Update for their interface."""

from collections.abc import Callable, Iterator

from hisvd.cached_moments import input_moment
from hisvd.factor_forms import Entries, Shape
from hisvd.factoring import Case, CompressionJob, Tensors, Update, without_neurons
from hisvd.layer_tensors import stored_prefix
from hisvd.sequential_update import SequentialUpdate
from hisvd.shape_utils import Sublayer


class OneShot:
    """Factors every matrix as it is in the checkpoint, for the inputs that it has in the original model."""

    shares_layers = True

    def __init__(self, job: CompressionJob, first_layer: int) -> None:
        self.job = job

    def start(self, index: int, stored: Tensors) -> Tensors:
        """All that the cache holds of the layer."""
        self.stored, self.statistics = stored, self.job.cache.read_layer(index)
        return self.statistics

    def cases(self, index: int, members: list[Sublayer], needs_moment: bool) -> Iterator[Case]:
        """One case for all targets that keep the same neurons."""
        job = self.job
        weights = {s.path: self.stored[f"{stored_prefix(job.checkpoint, s)}weight"].to(job.device) for s in members}
        moment = input_moment(members[0], self.statistics, job.device) if needs_moment else None
        case = Case([], weights, weights[members[0].path].dtype, moment)
        biases = job.biases(members, self.stored)
        by_shape: dict[Shape, list[float]] = {}
        for target, plan in job.plans.items():
            by_shape.setdefault(plan.shape(members[0]), []).append(target)
        for targets in by_shape.values():
            kept = job.neurons_kept(targets[0], members, self.statistics)
            # A copy of the weights: what is factored is taken out of it.
            all_there = case._replace(targets=targets, weights=dict(weights))
            yield without_neurons(all_there, kept, biases, self.statistics)

    def place(self, target: float, sublayer: Sublayer, entries: Entries) -> None:
        """Nothing to do: no later case depends on it."""

    def advance(self, index: int) -> None:
        """Drop the layer."""
        del self.stored, self.statistics


UPDATES: dict[str, Callable[[CompressionJob, int], Update]] = {"sequential": SequentialUpdate, "none": OneShot}
