"""Calibration text from several sources, each with a share of the windows."""

import math
import os

from hisvd.errors import HiSVDError


def weighted_sources(dataset: str) -> dict[str, float]:
    """The sources that `--dataset` names and their weights, which sum to 1: NAME, or NAME=2,FILE=1 (1 by default).

    The name of a file or folder that exists stands for it alone, whatever signs it holds.

    Raises:
        HiSVDError: a weight is not a positive number, or a source is named twice.
    """
    # Not Path.exists, which raises where a list is longer than any name of a file.
    parts = [dataset] if os.path.exists(dataset) else [part.strip() for part in dataset.split(",") if part.strip()]
    sources: dict[str, float] = {}
    for part in parts or [dataset]:
        name, _, text = (part, "", "") if os.path.exists(part) else part.rpartition("=")
        name, weight = (name, _weight(text)) if name and text else (part, 1.0)
        if not 0 < weight < math.inf:
            raise HiSVDError(f"--dataset {part!r} has no positive weight; write NAME=2,FILE=1, say.")
        if name in sources:
            raise HiSVDError(f"--dataset names {name!r} twice; name it once, with the sum of the weights.")
        sources[name] = weight
    total = sum(sources.values())
    return {name: weight / total for name, weight in sources.items()}


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def shared_out(count: int, shares: list[float]) -> list[int]:
    """`count` in whole numbers by `shares`, which sum to 1: rounded down, what is left to the largest remainders."""
    parts = [math.floor(count * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: parts[i] - count * shares[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def interleaved(counts: list[int]) -> list[int]:
    """An order for the windows of all sources, one source after the other: every stretch of it holds the same mix."""
    places = [(k + 0.5) / count for count in counts for k in range(count)]
    return sorted(range(len(places)), key=places.__getitem__)
