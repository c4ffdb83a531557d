"""What the printed tables and the page about evaluated models share."""

from collections.abc import Sequence
from typing import NamedTuple

from hisvd.utils.task_utils import main_metric


class Speed(NamedTuple):
    """How a figure of speed or memory is shown: in multiples of `unit`, with so many decimals."""

    title: str
    unit: float = 1
    decimals: int = 0


SPEEDS = {
    "prefill_tokens_per_s": Speed("prefill tok/s"),
    "prefill_tokens_per_s_batch_8": Speed("batch 8"),
    "decode_tokens_per_s": Speed("decode tok/s", decimals=1),
    "decode_tokens_per_s_batch_8": Speed("batch 8", decimals=1),
    "time_to_first_token_s": Speed("first token s", decimals=3),
    "loading_peak_bytes": Speed("loading MB", 1e6),
    "running_peak_bytes": Speed("running MB", 1e6),
}


def perplexity_text(value: float) -> str:
    """A perplexity as it is printed."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def with_reference(measured: Sequence[tuple[str, dict]]) -> tuple[list[tuple[str, dict]], dict | None]:
    """The (model, speed figures) of all rows, and the figures of the reference; None: there are no ratios.

    The reference is a row of its own, the first, if no model is it.
    """
    reference = next((figures["reference"] for _, figures in measured if "reference" in figures), None)
    if reference and all("reference" in figures for _, figures in measured):
        return [(reference["model"], reference), *measured], reference
    return list(measured), reference


def speed_columns(measured: Sequence[tuple[str, dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of (model, speed figures), with the ratios to the reference in brackets."""
    known = [key for key in SPEEDS if any(key in figures for _, figures in measured)]
    rows = [[name, *(speed_text(figures, key) for key in known)] for name, figures in measured]
    return ["model", *(SPEEDS[key].title for key in known)], rows


def speed_text(figures: dict, key: str) -> str:
    """One of a model's speed figures with its ratio; a dash where it was not measured."""
    if key not in figures:
        return "–"
    text = f"{figures[key] / SPEEDS[key].unit:.{SPEEDS[key].decimals}f}"
    return f"{text} ({figures['ratios'][key]:.2f}×)" if key in figures.get("ratios", {}) else text


def task_columns(tasks: dict[str, dict]) -> list[tuple[str, str]]:
    """(task, metric) of a table's columns: every task or group, without the members of groups that have a score."""
    metrics = {name: main_metric(figures) for name, figures in tasks.items()}
    return [
        (name, metric)
        for name, metric in metrics.items()
        if metric is not None and metrics.get(tasks[name].get("subtask_of", "")) is None
    ]
