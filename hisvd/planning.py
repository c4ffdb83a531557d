"""A plan: the rank of every sublayer for one target, decided before the first matrix is factored."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hisvd.allocations import RankProblem
from hisvd.cache_defaults import resolved
from hisvd.calibration_cache import CalibrationCache, open_finished_cache
from hisvd.errors import HiSVDError
from hisvd.exports import EXPORTS
from hisvd.factor_forms import Shape, form_in, narrow_entry
from hisvd.integer_codes import INTEGERS
from hisvd.moves import MOVES, one_width
from hisvd.prediction import predicted_loss
from hisvd.settings import CompressionSettings
from hisvd.shape_utils import Sublayer, is_dense, stored_bytes, stored_parameters


@dataclass(frozen=True)
class Plan:
    """The ranks, and the neurons of MLPs, that keep a share of the linear parameters.

    Attributes:
        target: The share of the decoder's linear parameters to keep, or of their bytes in 16 bits, in (0, 1].
        form: How factors are stored, a key of FORMS; for weights in int4 see `form_of`.
        ranks: The rank of every linear by its name in the model; a rank at which factors save nothing leaves it as it
            is (`is_dense`).
        shapes: The shape of the weight, by the linear's name, where neurons are removed.
        dtypes: "int8" or "int4", by the linear's name, where weights are stored in integers.
        predicted_loss: By decoder layer, what "low_rank", "neurons" and "rounding" add to the mean loss on the
            calibration text without the update, in nats per token; empty where the cache or the settings allow no
            estimate.
    """

    target: float
    form: str
    ranks: dict[str, int]
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    predicted_loss: list[dict[str, float]] = field(default_factory=list)

    def shape(self, sublayer: Sublayer) -> Shape:
        """The shape of the sublayer's weight after the removal of neurons."""
        return self.shapes.get(sublayer.name, sublayer.shape)

    def form_of(self, sublayer: Sublayer) -> str:
        """How factors of the sublayer are stored."""
        return form_in(self.form, self.dtypes.get(sublayer.name))

    def changes(self, sublayer: Sublayer) -> bool:
        """Whether the sublayer's weight does not stay as it is, rounding aside."""
        return sublayer.name in self.shapes or not self.is_dense(sublayer)

    def is_dense(self, sublayer: Sublayer) -> bool:
        """Whether the sublayer stays a plain linear, because factors of its rank would save nothing."""
        return is_dense(self.ranks[sublayer.name], self.shape(sublayer), self.form_of(sublayer))

    def parameters_of(self, sublayer: Sublayer) -> int:
        """Parameters stored for the sublayer's weight."""
        return stored_parameters(self.ranks[sublayer.name], self.shape(sublayer), self.form_of(sublayer))

    def bytes_of(self, sublayer: Sublayer) -> int:
        """Bytes stored for the sublayer's weight, where what is not in integers is in 16 bits."""
        name, shape = sublayer.name, self.shape(sublayer)
        return stored_bytes(self.ranks[name], shape, self.form_of(sublayer), self.dtypes.get(name))

    def modules(self, sublayers: Sequence[Sublayer]) -> dict[str, dict]:
        """The table of changed modules for config.json: how to rebuild each from its name."""
        table = {}
        for s in filter(self.changes, sublayers):
            table[s.name] = narrow_entry(s.shape, self.shape(s))
            if not self.is_dense(s):
                table[s.name] |= {"form": self.form_of(s), "rank": self.ranks[s.name]}
        return table


def plan(
    cache: str | Path | CalibrationCache,
    targets: float | Sequence[float],
    settings: CompressionSettings = CompressionSettings(),
) -> list[Plan]:
    """Choose what becomes of every linear for each target, in seconds, from the calibration cache alone.

    `hisvd.compress` with the same arguments follows the same plan.

    Args:
        cache: A finished cache, as `hisvd.calibrate` returns it, or its folder.
        targets: The shares of the decoder's linear parameters to keep (with the budget "bytes", of their bytes in 16
            bits), each in (0, 1]: one number or several.
        settings: The allocation and its parameters, and the form of the factors.

    Returns:
        One plan per target, in the order of the targets without repetitions, each within its budget.

    Raises:
        HiSVDError: the cache is missing, unfinished or damaged; a target is out of range or too small for rank 1
            everywhere; or the settings need what the cache does not have.

    Example:
        >>> import hisvd
        >>> (plan,) = hisvd.plan("caches/llama-7b", 0.8)
        >>> plan.form
        'pivoted'
        >>> rank = plan.ranks["model.layers.0.self_attn.q_proj"]
    """
    cache = opened_cache(cache)
    settings = resolved(settings, cache)
    problem = RankProblem(cache, settings)
    assert settings.moves is not None  # resolved
    choose = one_width if EXPORTS[settings.export].stock else MOVES[settings.moves]
    names, plans = [s.name for s in problem.sublayers], []
    for target in checked_targets(targets):
        choice = choose(problem, target)
        ranks = dict(zip(names, choice.ranks, strict=True))
        dtypes = dict.fromkeys(names, settings.linear_dtype) if settings.linear_dtype in INTEGERS else choice.dtypes
        chosen = Plan(target, settings.factors, ranks, narrow_shapes(problem, choice.widths), dict(dtypes))
        plans.append(replace(chosen, predicted_loss=predicted_loss(problem, chosen)))
    return plans


def narrow_shapes(problem: RankProblem, widths: dict[str, int]) -> dict[str, Shape]:
    """The shapes, by sublayer name, of the MLPs that lose neurons; `widths` is by the names of their output linears."""
    shapes = {}
    for first, mlp in problem.mlps:
        members = {s.path: s for s in problem.cache.sublayers_of(first.layer)}
        width = widths.get(members[mlp.output].name)
        if width is not None:
            shapes[members[mlp.output].name] = (members[mlp.output].out_features, width)
            shapes |= {members[p].name: (mlp.fused * width, members[p].in_features) for p in mlp.inputs}
    return shapes


def opened_cache(cache: str | Path | CalibrationCache) -> CalibrationCache:
    """The cache itself, or the finished one in a folder.

    Raises:
        HiSVDError: there is none, or it is unfinished.
    """
    return cache if isinstance(cache, CalibrationCache) else open_finished_cache(str(cache))


def checked_targets(targets: float | Sequence[float], option: str = "target_compression") -> list[float]:
    """The targets without repetitions, each in (0, 1].

    Raises:
        HiSVDError: one is not.
    """
    several = [targets] if isinstance(targets, (int, float)) else list(targets)
    for target in several:
        if not 0 < target <= 1:
            raise HiSVDError(
                f"--{option} {target:g} is outside (0, 1]; 0.8 keeps 80 % of what the decoder's linear weights take."
            )
    return list(dict.fromkeys(several))
