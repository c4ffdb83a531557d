"""A plan: the rank of every sublayer for one target, decided before the first matrix is factored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hisvd.allocations import ALLOCATIONS, RankProblem
from hisvd.calibration_cache import CalibrationCache, open_finished_cache
from hisvd.errors import HiSVDError
from hisvd.settings import CompressionSettings
from hisvd.shape_utils import Sublayer, is_dense, stored_parameters


@dataclass(frozen=True)
class Plan:
    """The ranks that keep a share of the linear parameters.

    Attributes:
        target: The share of the decoder's linear parameters to keep, in (0, 1].
        form: How factors are stored, a key of FORMS.
        ranks: The rank of every linear by its name in the model; a rank at which factors save nothing leaves it as it
            is (`is_dense`).
    """

    target: float
    form: str
    ranks: dict[str, int]

    def is_dense(self, sublayer: Sublayer) -> bool:
        """Whether the sublayer stays a plain linear, because factors of its rank would save nothing."""
        return is_dense(self.ranks[sublayer.name], sublayer.shape, self.form)

    def parameters_of(self, sublayer: Sublayer) -> int:
        """Parameters stored for the sublayer's weight."""
        return stored_parameters(self.ranks[sublayer.name], sublayer.shape, self.form)

    def modules(self, sublayers: Sequence[Sublayer]) -> dict[str, dict]:
        """The table of factored modules for config.json: how to rebuild each from its name."""
        return {s.name: {"form": self.form, "rank": self.ranks[s.name]} for s in sublayers if not self.is_dense(s)}


def plan(
    cache: str | Path | CalibrationCache,
    targets: float | Sequence[float],
    settings: CompressionSettings = CompressionSettings(),
) -> list[Plan]:
    """Choose the rank of every linear for each target, in seconds, from the calibration cache alone.

    `hisvd.compress` with the same arguments follows the same plan.

    Args:
        cache: A finished cache, as `hisvd.calibrate` returns it, or its folder.
        targets: The shares of the decoder's linear parameters to keep, each in (0, 1]: one number or several.
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
    settings = settings.resolved(cache)
    assert settings.allocation is not None  # resolved
    problem, rule = RankProblem(cache, settings), ALLOCATIONS[settings.allocation]
    names = [s.name for s in problem.sublayers]
    return [
        Plan(target, settings.factors, dict(zip(names, rule(problem, target), strict=True)))
        for target in checked_targets(targets)
    ]


def opened_cache(cache: str | Path | CalibrationCache) -> CalibrationCache:
    """The cache itself, or the finished one in a folder.

    Raises:
        HiSVDError: there is none, or it is unfinished.
    """
    return cache if isinstance(cache, CalibrationCache) else open_finished_cache(str(cache))


def checked_targets(targets: float | Sequence[float]) -> list[float]:
    """The targets without repetitions, each in (0, 1].

    Raises:
        HiSVDError: one is not.
    """
    several = [targets] if isinstance(targets, (int, float)) else list(targets)
    for target in several:
        if not 0 < target <= 1:
            raise HiSVDError(
                f"--target_compression {target:g} is outside (0, 1]; 0.8 keeps 80 % of the decoder's linear weights."
            )
    return list(dict.fromkeys(several))
