"""What the printed tables and the page about evaluated models share."""

from collections.abc import Sequence


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
