"""What compress.py prints of plans and of finished models."""

from shlex import quote

from hisvd.cache_defaults import resolved
from hisvd.calibration_cache import CalibrationCache
from hisvd.cli.common import command, say
from hisvd.compression import CompressedModel
from hisvd.exports import EXPORTS
from hisvd.planning import plan
from hisvd.report import (
    int6_summary,
    parameter_table,
    plan_report,
    rank_table,
    search_summary,
    size_summary,
    summary,
)
from hisvd.settings import CompressionSettings
from hisvd.utils.data_utils import EVALUATION_SPLIT


def print_plans(cache: CalibrationCache, targets: list[float], settings: CompressionSettings) -> list[dict]:
    """Print the ranks that every target would get; returns the figures."""
    reports = []
    for p in plan(cache, targets, settings):
        reports.append(plan_report(cache, p, resolved(settings, cache)))
        say(f"{rank_table(p, cache.sublayers)}\n\n{parameter_table(reports[-1])}\n{summary(reports[-1])}")
    return reports


def print_model(model: CompressedModel, cache: CalibrationCache) -> dict:
    """Print the ranks and sizes of a finished model; returns its figures."""
    say(f"{rank_table(model.plan, cache.sublayers)}\n\n{parameter_table(model.report)}")
    say(f"{summary(model.report)}\n{size_summary(model.report)}")
    if EXPORTS[model.report["settings"]["export"]].encode:
        say(int6_summary(model.report, cache.sublayers))
    if "quality_search" in model.report:
        say(search_summary(model.report))
    if "tuning" in model.report:
        figures = model.report["tuning"]
        say(
            f"Tuning the {model.report['settings']['refine']}: divergence from the original's predictions on held-out "
            f"text {figures['divergence_before']:.4f} → {figures['divergence_after']:.4f} nats per token"
            + ("" if figures["kept"] else ", so that they were left as they were")
        )
    say(f"Saved to {model.path}", always=True)
    return model.report


def next_steps(original: str, model: CompressedModel) -> str:
    """What can be done with a finished model, a line each; a named data set has a split of its own to evaluate on."""
    dataset = model.report["calibration"].get("dataset")
    texts = f" --datasets {dataset}" if dataset in EVALUATION_SPLIT else ""
    needs = " (hisvd must be installed)" if EXPORTS[model.report["settings"]["export"]].needs_hisvd else ""
    lines = [f"Next: {command('evaluate', model_path=original)} --model_path {quote(str(model.path))}{texts}"]
    if model.path.suffix == ".pt":
        return f"{lines[0]}\nIn Python: hisvd.load({str(model.path)!r})"
    folder = quote(str(model.path))
    lines.append(f"Serve it (pip install 'transformers[serving]'): transformers serve {folder}")
    lines.append(f"Talk to it then, in another terminal: transformers chat {folder}")
    loading = f'AutoModelForCausalLM.from_pretrained({str(model.path)!r}, dtype="auto")'
    return "\n".join([*lines, f"In Python: transformers.{loading}{needs}"])
