"""The attention-residual study of evaluate.py: its arguments, tables, verdict and plot."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hisvd.attention_residual import RECOVERED, STUDY_SEQLEN, attention_residual_study
from hisvd.cli.common import settings_from
from hisvd.errors import HiSVDError
from hisvd.evaluation import Texts, exhaustion_explained, tokens_for, weights_at, whole_model
from hisvd.settings import EvaluationSettings, Resources, StudySettings
from hisvd.tables import table
from hisvd.utils.files import atomic_path, check_writable_file
from hisvd.utils.model_utils import resolve_device


def whole_numbers(text: str | None, option: str) -> list[int] | None:
    """Comma-separated whole numbers; None for None.

    Raises:
        HiSVDError: one is not a whole number.
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise HiSVDError(f"{option} '{text}' is not a comma-separated list of whole numbers.") from None


def study_model(model: str, texts: Texts, options: Mapping[str, Any]) -> dict:
    """The attention-residual study of one model on each text, as it is printed and written.

    Raises:
        HiSVDError: the model cannot be loaded or studied, or a text or option does not fit it.
    """
    layers, d_r = (whole_numbers(options[name], f"--{name}") for name in ("layers", "d_r"))
    settings, resources = settings_from(options, EvaluationSettings), settings_from(options, Resources)
    with exhaustion_explained(model, None):
        path = weights_at(model)
        tokens = tokens_for(path, texts, settings, STUDY_SEQLEN)
        loaded = whole_model(path, resolve_device(resources.device), settings.dtype)
        studies = {}
        for name, ids in tokens.ids.items():
            study = replace(settings_from(options, StudySettings), seqlen=tokens.seqlen, bos=tokens.bos, source=name)
            studies[name] = attention_residual_study(loaded, ids, layers, d_r, study)
    return {
        "model": model,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype),
        "protocol": settings.protocol,
        "documents": {name: len(documents) for name, documents in texts.items()},
        "attention_residual": studies,
    }


def study_tables(model: str, dataset: str, study: dict) -> str:
    """Perplexities of the variants, the spectrum of every head, and the verdict."""
    baseline = study["baseline"]
    variants = [["baseline", "", f"{baseline:.3f}", "", ""]]
    for title, key in (("A top-1", "top_1"), ("B full (check)", "full")):
        variants.append([title, "", f"{study[key]:.3f}", f"{study[key] - baseline:+.3f}", ""])
    for row in study["low_rank"]:
        recovered = "" if row["recovered"] is None else f"{row['recovered']:.1%}"
        variants.append(["C low-rank", row["d_r"], f"{row['perplexity']:.3f}", f"{row['delta']:+.3f}", recovered])
    ranks = [row["d_r"] for row in study["low_rank"] if row["d_r"]]
    heads = []
    for head in study["heads"]:
        shares = [f"{head['cumulative_variance'][rank - 1]:.3f}" for rank in ranks]
        heads.append([f"{head['layer']}.{head['head']}", head["effective_dimension"], *shares])
    return "\n\n".join(
        [
            f"{Path(model).name} on {Path(dataset).name}: layers {', '.join(map(str, study['layers']))}, "
            f"{study['blocks']} blocks of {study['seqlen']} tokens, bases from {study['basis_blocks']} others",
            table(["variant", "d_r", "perplexity", "ΔPPL", "recovered"], variants),
            table(["layer.head", "effective dim", *(f"var {rank}" for rank in ranks)], heads),
            verdict(study),
        ]
    )


def verdict(study: dict) -> str:
    """One sentence: the smallest d_r that recovers 90 % of what top-1 loses, or the best reached."""
    if study["top_1"] <= study["baseline"]:
        return "Verdict: on these layers one value vector is enough: dropping the residuals costs no perplexity."
    loss = f"{study['top_1'] - study['baseline']:.3f}"
    if study["enough"] is not None:
        return f"Verdict: d_r = {study['enough']} recovers {RECOVERED:.0%} of the perplexity that top-1 loses ({loss})."
    best = max(study["low_rank"], key=lambda row: row["recovered"])
    return (
        f"Verdict: no d_r tried recovers {RECOVERED:.0%} of the perplexity that top-1 loses ({loss}); "
        f"the best is {best['recovered']:.1%} at d_r = {best['d_r']}."
    )


def check_plot(path: Path) -> None:
    """Refuse, before the work starts, a plot that could not be drawn at its end.

    Raises:
        HiSVDError: matplotlib is missing, or the file is not an image it can write, or cannot be written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise HiSVDError("--plot needs matplotlib; pip install matplotlib, or leave the option out.") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise HiSVDError(
            f"--plot {path} has no extension that matplotlib can write; use one of {', '.join(sorted(kinds))}."
        )
    check_writable_file(path)


def draw_studies(results: list[dict], path: Path) -> None:
    """One row per model and data set: cumulative variance by rank, one line per head; ΔPPL against d_r."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    studies = [
        (f"{Path(result['model']).name} on {Path(name).name}", study)
        for result in results
        for name, study in result["attention_residual"].items()
    ]
    figure, axes = pyplot.subplots(len(studies), 2, figsize=(11, 4.2 * len(studies)), squeeze=False)
    for (variance, loss), (title, study) in zip(axes, studies, strict=True):
        colors = {layer: f"C{i}" for i, layer in enumerate(study["layers"])}
        for head in study["heads"]:
            shares = [0.0, *head["cumulative_variance"]]
            label = f"layer {head['layer']}" if head["head"] == 0 else None
            variance.plot(shares, color=colors[head["layer"]], linewidth=0.8, label=label)
        variance.set(xlabel="rank", ylabel="cumulative variance of the residuals", title=title)
        variance.legend(fontsize=8)
        ranks, deltas = [row["d_r"] for row in study["low_rank"]], [row["delta"] for row in study["low_rank"]]
        loss.plot(ranks, deltas, "o-", label="C low-rank")
        loss.axhline(study["top_1"] - study["baseline"], color="C3", linestyle="--", label="A top-1")
        loss.axhline(0, color="black", linewidth=0.8)
        loss.set(xlabel="d_r", ylabel="ΔPPL", title=f"baseline {study['baseline']:.2f}")
        loss.set_xscale("symlog", base=2, linthresh=1)
        loss.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix.removeprefix("."))
    pyplot.close(figure)
