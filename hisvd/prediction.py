"""The loss that a plan is predicted to add: the second-order estimate that the loss allocation minimises."""

from typing import TYPE_CHECKING

from hisvd.allocations import RankProblem
from hisvd.moves import curves_of
from hisvd.shape_utils import Storage

if TYPE_CHECKING:  # plans hold what is predicted of them
    from hisvd.planning import Plan


def predicted_loss(problem: RankProblem, plan: "Plan") -> list[dict[str, float]]:
    """By decoder layer, what "low_rank", "neurons" and "rounding" add to the mean loss, in nats per token.

    On the calibration text, of weights that no update fits to the compressed layers below them. What rounding adds is
    discounted as in the allocation. Empty where the estimate does not hold: without gradients in the cache, in another
    metric than the two-sided one, and for INT6.
    """
    cache, settings, sublayers = problem.cache, problem.settings, problem.sublayers
    if not cache.has_gradients or settings.whitening != "two_sided" or settings.export == "int6":
        return []
    plain = [Storage(plan.form_of(s)) for s in sublayers]
    stored = [Storage(plan.form_of(s), plan.dtypes.get(s.name)) for s in sublayers]
    exact, neurons = _added(problem, plan, plain)
    rounded = _added(problem, plan, stored)[0] if plan.dtypes else exact
    layers = [dict.fromkeys(("low_rank", "neurons", "rounding"), 0.0) for _ in range(cache.num_layers)]
    for s, without, added, removed in zip(sublayers, exact, rounded, neurons, strict=True):
        for key, value in (("low_rank", without), ("neurons", removed), ("rounding", added - without)):
            layers[s.layer][key] += value / 2  # tails are twice the loss
    return [{key: float(f"{value:.6g}") for key, value in layer.items()} for layer in layers]


def _added(problem: RankProblem, plan: "Plan", storages: list[Storage]) -> tuple[list[float], list[float]]:
    """Of every sublayer, the tail at its rank and twice the loss of the neurons, which counts at output linears."""
    curves = curves_of(problem, storages, ranked=True, narrow=bool(plan.shapes))
    ranks = [plan.ranks[s.name] for s in problem.sublayers]
    tails = [0.0 if c is None else float(c.tails[rank - 1]) for c, rank in zip(curves.others, ranks, strict=True)]
    neurons = [0.0] * len(tails)
    for mlp in curves.mlps:
        output = mlp.members[-1]
        width = plan.shape(problem.sublayers[output])[1]
        neurons[output] = mlp.loss(width)
        for member, curve in zip(mlp.members, mlp.curves_at(width), strict=True):
            tails[member] = float(curve.tails[min(ranks[member], len(curve.tails)) - 1])
    return tails, neurons
