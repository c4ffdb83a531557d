"""compress.py: model + calibration cache + budget → compressed model."""

from pathlib import Path
from typing import Any

import click

from hisvd.allocations import ALLOCATIONS, CLUSTERINGS
from hisvd.calibration_cache import CalibrationCache, open_finished_cache
from hisvd.cli.common import activation_budget_option, device_option, program, report_option, say, settings_from
from hisvd.compression import CompressedModel, compress
from hisvd.compression_page import compression_report
from hisvd.errors import HiSVDError
from hisvd.exports import EXPORTS, LINEAR_DTYPES
from hisvd.factor_forms import FORMS
from hisvd.moves import MOVES
from hisvd.plan import checked_targets, plan
from hisvd.rank_metrics import RANK_METRICS
from hisvd.refinement import MODULATIONS
from hisvd.report import int6_summary, parameter_table, plan_report, rank_table, size_summary, summary
from hisvd.settings import INT6_MODES, CompressionSettings, Resources
from hisvd.updates import UPDATES
from hisvd.utils.files import check_writable_file, write_json
from hisvd.utils.html_report import check_report
from hisvd.whitening_svd import WHITENINGS

TARGET_OPTIONS = {"target_compression": "parameters", "target_bytes": "bytes"}


def parse_delta(text: str) -> float | None:
    """The bound of the quality gate as a fraction; None for `none`.

    Raises:
        HiSVDError: it is neither `none` nor a number.
    """
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise HiSVDError(
            f"--quality_gate_delta '{text}' is neither a number of at least 0 nor none; 0.025 allows the perplexity "
            "to rise by 2.5 %."
        ) from None


def parse_targets(option: str, text: str) -> list[float]:
    """The comma-separated targets that an option names, each in (0, 1].

    Raises:
        HiSVDError: one is not a number or is out of range.
    """
    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError:
        raise HiSVDError(f"--{option} '{text}' is not a number or a list of numbers such as 0.8,0.6.") from None
    return checked_targets(targets, option)


def budget_from(options: dict[str, Any]) -> list[float]:
    """The targets of the one option that sets them; `options` gets the budget that it stands for.

    Raises:
        HiSVDError: none or both are set, or a target is not a share.
    """
    given = [name for name in TARGET_OPTIONS if options[name]]
    if len(given) != 1:
        raise HiSVDError(
            "Pass either --target_compression (a share of the linear parameters, such as 0.8) or --target_bytes (a "
            "share of their bytes in 16 bits, such as 0.4)."
        )
    options["budget"] = TARGET_OPTIONS[given[0]]
    return parse_targets(given[0], options[given[0]])


@click.command()
@click.option("--model_path", help="The folder or Hub id that was calibrated.  [required unless --plan_only]")
@click.option("--calib_cache", required=True, help="Cache folder of calibrate.py (X or X.pkl).")
@click.option("--target_compression", help="Share of the linear weights to keep: 0.8, or 0.8,0.6,…")
@click.option(
    "--target_bytes",
    help="Instead: share of the bytes that the linear weights take in 16 bits, such as 0.4; besides ranks and widths, "
    "16 bits, int8 or int4 are chosen for every linear.",
)
@click.option("--rank_method", type=click.Choice(list(RANK_METRICS)), default="stable", show_default=True)
@click.option("--alpha", default=1.0, show_default=True, help="Stage 1: exponent of the rank density; 0 is uniform.")
@click.option("--modulation", type=click.Choice(list(MODULATIONS)), default="logarithmic", show_default=True)
@click.option(
    "--lwe_strength",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Stage 2: strength of the modulation; 0 leaves Stage 1 as it is.",
)
@click.option("--tail_redundancy_weight", type=click.FloatRange(0), default=1.0, show_default=True)
@click.option(
    "--cluster_by",
    type=click.Choice(list(CLUSTERINGS)),
    default="type",
    show_default=True,
    help="Stage 2 clusters: a sublayer type, or a type within a run of similar adjacent layers.",
)
@click.option(
    "--allocation",
    type=click.Choice(list(ALLOCATIONS)),
    help="[default: loss where the cache has gradients, else hisvd]",
)
@click.option(
    "--whitening",
    type=click.Choice(list(WHITENINGS)),
    help="[default: two_sided where the cache has gradients, else input]",
)
@click.option(
    "--moves",
    type=click.Choice(list(MOVES)),
    default=None,
    help="low_rank: factor linears; neurons: remove hidden neurons of the MLPs; both: weigh one against the other.  "
    "[default: both where the cache knows what neurons are worth, else low_rank]",
)
@click.option("--factors", type=click.Choice(list(FORMS)), default="pivoted", show_default=True)
@click.option(
    "--update",
    type=click.Choice(list(UPDATES)),
    default="sequential",
    show_default=True,
    help="sequential: fit every layer to the outputs of the compressed layers below it (runs the text again); "
    "none: decompose each matrix once for all targets, which is quicker.",
)
@click.option(
    "--linear_dtype",
    type=click.Choice(LINEAR_DTYPES),
    help="What linear weights, factors or not, are stored in: int8 with a scale per row, int4 with one per 32 columns, "
    "both fitted to the calibration inputs.  [default: the checkpoint's]",
)
@click.option(
    "--export",
    type=click.Choice(list(EXPORTS)),
    default="none",
    show_default=True,
    help="int6: every linear weight in the INT6 2:4 pairwise sparse format; "
    "dense: multiply the factors back, so that any tool loads the result; "
    "plain: remove neurons alone, as many in every MLP, for a smaller checkpoint that any tool loads.",
)
@click.option(
    "--rank_multiple",
    type=int,
    help="Ranks, and widths of narrower MLPs, are multiples of this, as kernels and quantizers like them.  "
    "[default: with the loss allocation 8, and 32 for weights in integers, where every linear has at least 128 inputs "
    "and outputs; else 1]",
)
@click.option(
    "--min_saving",
    type=float,
    help="A linear is factored only where that saves at least this share of its parameters, since two products and a "
    "permutation take longer than one product of the same size.  [default: with the loss allocation 0.05, where every "
    "linear has at least 128 inputs and outputs; else 0]",
)
@click.option(
    "--width_multiple",
    default=64,
    show_default=True,
    help="plain: the MLPs' common width is a multiple of this.",
)
@click.option(
    "--int6_mode",
    type=click.Choice(INT6_MODES),
    default="calibrated",
    show_default=True,
    help="INT6: pairs and values fitted to the calibration inputs, or by the plain format rule.",
)
@click.option(
    "--quality_gate_delta",
    default="0.025",
    show_default=True,
    help="INT6: export as many linears as raise the perplexity on held-out calibration text by at most this fraction; "
    "none: export all.",
)
@click.option("--plan_only", is_flag=True, help="Print the rank table from the cache alone and stop.")
@click.option("--save_model", help="X.pt, or a folder.  [required unless --plan_only]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
@report_option
@activation_budget_option
@device_option
@click.pass_context
@program
def main(context: click.Context, **options: Any) -> None:
    """Compress a model to a share of its linear weights, without training."""
    for name in () if options["plan_only"] else ("model_path", "save_model"):
        if not options[name]:
            raise click.MissingParameter(ctx=context, param_hint=f"--{name}", param_type="option")
    targets = budget_from(options)
    options["quality_gate_delta"] = parse_delta(options["quality_gate_delta"])
    settings, json_path = settings_from(options, CompressionSettings), options["json_path"]
    if json_path:
        check_writable_file(json_path)
    check_report(options["report"])
    cache = open_finished_cache(options["calib_cache"])
    if options["plan_only"]:
        reports = print_plans(cache, targets, settings)
    else:
        where = (options["model_path"], cache, options["save_model"])
        models = compress(*where, targets, settings, settings_from(options, Resources))
        reports = [print_model(model, cache) for model in models]
    if json_path and reports:
        write_json(json_path, reports)
    if options["report"] and reports:
        compression_report(reports, cache, options["report"])


def print_plans(cache: CalibrationCache, targets: list[float], settings: CompressionSettings) -> list[dict]:
    """Print the ranks that every target would get; returns the figures."""
    reports = []
    for p in plan(cache, targets, settings):
        reports.append(plan_report(cache, p, settings.resolved(cache)))
        say(f"{rank_table(p, cache.sublayers)}\n\n{parameter_table(reports[-1])}\n{summary(reports[-1])}")
    return reports


def print_model(model: CompressedModel, cache: CalibrationCache) -> dict:
    """Print the ranks and sizes of a finished model; returns its figures."""
    say(f"{rank_table(model.plan, cache.sublayers)}\n\n{parameter_table(model.report)}")
    say(f"{summary(model.report)}\n{size_summary(model.report)}")
    if EXPORTS[model.report["settings"]["export"]].encode:
        say(int6_summary(model.report))
    say(f"Saved to {model.path}")
    return model.report


if __name__ == "__main__":
    main()
