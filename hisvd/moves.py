"""The choices of --moves: from the spectra in the cache to the width of every MLP and the rank of every linear."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from hisvd.allocations import ALLOCATIONS, RankProblem, guard_at
from hisvd.byte_budget import SIZE_ALONE, Curves, least_loss_storages, storages_at
from hisvd.errors import HiSVDError
from hisvd.factor_forms import form_in
from hisvd.integer_codes import INTEGERS
from hisvd.neurons import spectrum_widths
from hisvd.rank_allocation import Allowed, budget_of, rank_curve, refuse_below
from hisvd.shape_utils import PLAIN_BYTES, Storage
from hisvd.width_allocation import MlpCurves, least_parameters, loss_widths_and_ranks

if TYPE_CHECKING:  # the settings take their choices from this module
    from hisvd.settings import CompressionSettings


class Choice(NamedTuple):
    """`ranks` of all sublayers in order; `widths`, by the name of the output linear, of the MLPs that lose neurons.

    `dtypes`, by name, of the linears for which a budget in bytes chooses integers.
    """

    ranks: list[int]
    widths: dict[str, int]
    dtypes: Mapping[str, str] = MappingProxyType({})


def low_rank_alone(problem: RankProblem, target: float) -> Choice:
    """Ranks by the rule of --allocation; every MLP keeps its neurons."""
    if problem.settings.budget == "bytes":
        return _least_loss(problem, target, ranked=True, narrow=False)
    assert problem.settings.allocation is not None  # resolved
    return Choice(ALLOCATIONS[problem.settings.allocation](problem, target), {})


def both_moves(problem: RankProblem, target: float) -> Choice:
    """The widths and ranks that add the least loss."""
    return _least_loss(problem, target, ranked=True, narrow=True)


def neurons_alone(problem: RankProblem, target: float) -> Choice:
    """The widths that add the least loss; every linear stays in one piece."""
    return _least_loss(problem, target, ranked=False, narrow=True)


def _least_loss(problem: RankProblem, target: float, ranked: bool, narrow: bool) -> Choice:
    """With `ranked` linears may be factored, with `narrow` neurons removed; bytes are saved by integers too."""
    sublayers, settings = problem.sublayers, problem.settings
    guard = guard_at(target, settings)
    what = f"--moves {settings.moves}: the least that it can leave"
    if settings.budget == "bytes":
        menu = storages(settings)
        several = [curves_of(problem, [storage] * len(sublayers), ranked, narrow, guard) for storage in menu]
        refuse_below(storages_at(several, SIZE_ALONE).size, sublayers, target, what, PLAIN_BYTES)
        budget = budget_of(sublayers, target, PLAIN_BYTES)
        chosen = [menu[place] for place in least_loss_storages(several, budget)]
    else:
        budget = budget_of(sublayers, target)
        chosen = [Storage(settings.factors)] * len(sublayers)
    curves = curves_of(problem, chosen, ranked, narrow, guard)
    refuse_below(least_parameters(*curves), sublayers, target, what, chosen[0].per_weight)
    widths, ranks = loss_widths_and_ranks(*curves, budget)
    outputs = [sublayers[mlp.members[-1]].name for mlp in curves.mlps]
    return Choice(
        ranks,
        {o: w for o, w, mlp in zip(outputs, widths, curves.mlps, strict=True) if w < mlp.neurons},
        {s.name: storage.dtype for s, storage in zip(sublayers, chosen, strict=True) if storage.dtype},
    )


def storages(settings: "CompressionSettings") -> list[Storage]:
    """The storages of a linear among which a budget in bytes chooses, those of the most bits first."""
    return [Storage(form_in(settings.factors, dtype), dtype, in_bytes=True) for dtype in (None, *INTEGERS)]


def curves_of(
    problem: RankProblem, chosen: Sequence[Storage], ranked: bool, narrow: bool, guard: float = 0.0
) -> Curves:
    """The choices of all linears, each in the storage `chosen` for it; see _least_loss and allocations.guard_at."""
    allowed, spectra = problem.settings.allowed_ranks, problem.singular_values("two_sided_singular_values")
    mlps = mlp_curves(problem, ranked, chosen, guard) if narrow else []
    members = {member for mlp in mlps for member in mlp.members}
    others = [
        None
        if k in members
        else rank_curve(sigma, s.shape, storage, allowed if ranked else Allowed(s.full_rank), problem.noise(s, storage))
        for k, (s, sigma, storage) in enumerate(zip(problem.sublayers, spectra, chosen, strict=True))
    ]
    return Curves(others, mlps)


def mlp_curves(problem: RankProblem, ranked: bool, chosen: Sequence[Storage], guard: float = 0.0) -> list[MlpCurves]:
    """What every MLP loses by width and rank, from the cache; see curves_of."""
    places = {s.name: k for k, s in enumerate(problem.sublayers)}
    found = []
    for first, mlp in problem.mlps:
        prefix = first.name.removesuffix(first.path)
        members = tuple(places[prefix + path] for path in (*mlp.inputs, mlp.output))
        sublayers, own = [problem.sublayers[k] for k in members], tuple(chosen[k] for k in members)
        neurons = sublayers[-1].in_features
        found.append(
            MlpCurves(
                members,
                shapes=tuple(s.shape for s in sublayers),
                fused=mlp.fused,
                removal=problem.removal_losses(first.layer, mlp.output, guard),
                widths=(*spectrum_widths(neurons), neurons),
                spectra=tuple(problem.spectra_by_width(first.layer, path) for path in (*mlp.inputs, mlp.output)),
                storages=own,
                ranked=ranked,
                allowed=problem.settings.allowed_ranks,
                noises=tuple(problem.noise(s, storage) for s, storage in zip(sublayers, own, strict=True)),
            )
        )
    return found


def one_width(problem: RankProblem, target: float) -> Choice:
    """The same width everywhere, a multiple of --width_multiple, and linears in one piece: a stock checkpoint.

    Raises:
        HiSVDError: MLPs of several widths, or a budget that does not hold one multiple.
    """
    sublayers, multiple = problem.sublayers, problem.settings.width_multiple
    mlps = mlp_curves(problem, ranked=False, chosen=[Storage(problem.settings.factors)] * len(sublayers))
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
