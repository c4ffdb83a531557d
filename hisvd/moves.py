"""The choices of --moves: from the spectra in the cache to the width of every MLP and the rank of every linear."""

from collections.abc import Callable
from typing import NamedTuple

from hisvd.allocations import ALLOCATIONS, RankProblem
from hisvd.errors import HiSVDError
from hisvd.neurons import spectrum_widths
from hisvd.rank_allocation import Allowed, budget_of, rank_curve, refuse_below
from hisvd.width_allocation import MlpCurves, least_parameters, loss_widths_and_ranks


class Choice(NamedTuple):
    """`ranks` of all sublayers in order; `widths`, by the name of the output linear, of the MLPs that lose neurons."""

    ranks: list[int]
    widths: dict[str, int]


def low_rank_alone(problem: RankProblem, target: float) -> Choice:
    """Ranks by the rule of --allocation; every MLP keeps its neurons."""
    assert problem.settings.allocation is not None  # resolved
    return Choice(ALLOCATIONS[problem.settings.allocation](problem, target), {})


def both_moves(problem: RankProblem, target: float) -> Choice:
    """The widths and ranks that add the least loss."""
    return _least_loss(problem, target, ranked=True)


def neurons_alone(problem: RankProblem, target: float) -> Choice:
    """The widths that add the least loss; every linear stays in one piece."""
    return _least_loss(problem, target, ranked=False)


def _least_loss(problem: RankProblem, target: float, ranked: bool) -> Choice:
    form, allowed = problem.settings.factors, problem.settings.allowed_ranks
    curves = [
        rank_curve(sigma, s.shape, form, allowed if ranked else Allowed(s.full_rank))
        for s, sigma in zip(problem.sublayers, problem.singular_values("two_sided_singular_values"), strict=True)
    ]
    mlps = mlp_curves(problem, ranked)
    members = {member for mlp in mlps for member in mlp.members}
    others = [None if k in members else curve for k, curve in enumerate(curves)]
    what = f"--moves {problem.settings.moves}: the least that it can leave"
    refuse_below(least_parameters(others, mlps), problem.sublayers, target, what)
    widths, ranks = loss_widths_and_ranks(others, mlps, budget_of(problem.sublayers, target))
    outputs = [problem.sublayers[mlp.members[-1]].name for mlp in mlps]
    return Choice(ranks, {o: w for o, w, mlp in zip(outputs, widths, mlps, strict=True) if w < mlp.neurons})


def mlp_curves(problem: RankProblem, ranked: bool) -> list[MlpCurves]:
    """What every MLP loses by width and rank, from the cache; with `ranked` its linears may be factored."""
    places = {s.name: k for k, s in enumerate(problem.sublayers)}
    found = []
    for first, mlp in problem.mlps:
        prefix = first.name.removesuffix(first.path)
        members = tuple(places[prefix + path] for path in (*mlp.inputs, mlp.output))
        shapes = tuple(problem.sublayers[k].shape for k in members)
        spectra = (problem.spectra_by_width(first.layer, path) for path in (*mlp.inputs, mlp.output))
        removal = problem.elimination(first.layer)[f"{mlp.output}.removal_losses"]
        widths = (*spectrum_widths(shapes[-1][1]), shapes[-1][1])
        form, allowed = problem.settings.factors, problem.settings.allowed_ranks
        found.append(MlpCurves(members, shapes, mlp.fused, removal, widths, tuple(spectra), form, ranked, allowed))
    return found


def one_width(problem: RankProblem, target: float) -> Choice:
    """The same width everywhere, a multiple of --width_multiple, and linears in one piece: a stock checkpoint.

    Raises:
        HiSVDError: MLPs of several widths, or a budget that does not hold one multiple.
    """
    mlps, sublayers, multiple = mlp_curves(problem, ranked=False), problem.sublayers, problem.settings.width_multiple
    layers = {first.layer for first, _ in problem.mlps}
    if len({mlp.neurons for mlp in mlps}) != 1 or len(layers) != problem.cache.num_layers:
        raise HiSVDError(
            "--export plain gives every MLP the same width, and those of this model have different ones; choose "
            "another --export."
        )
    neurons, budget = mlps[0].neurons, budget_of(sublayers, target)
    fixed = sum(s.size for s in sublayers)
    per_neuron = sum(m * n for mlp in mlps for m, n in mlp.shapes_at(1))
    least = fixed - (neurons - min(multiple, neurons)) * per_neuron
    what = f"--export plain with --width_multiple {multiple}: the attention and MLPs of that width"
    refuse_below(least, sublayers, target, what)
    width = int((budget - fixed) // per_neuron) + neurons
    width = neurons if width >= neurons else width // multiple * multiple
    outputs = [sublayers[mlp.members[-1]].name for mlp in mlps]
    ranks = [s.full_rank for s in sublayers]
    for mlp in mlps:
        for member, shape in zip(mlp.members, mlp.shapes_at(width), strict=True):
            ranks[member] = min(shape)
    return Choice(ranks, dict.fromkeys(outputs, width) if width < neurons else {})


MOVES: dict[str, Callable[[RankProblem, float], Choice]] = {
    "both": both_moves,
    "low_rank": low_rank_alone,
    "neurons": neurons_alone,
}
