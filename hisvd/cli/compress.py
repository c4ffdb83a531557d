"""compress.py: model + calibration cache + budget → compressed model."""

from typing import TYPE_CHECKING, Any

import click

from hisvd import choices
from hisvd.cli.common import check_json, program, say, settings_from, write_figures
from hisvd.cli.options import (
    Program,
    activation_budget_option,
    device_option,
    expert,
    option,
    output_options,
    path_option,
    report_option,
)
from hisvd.errors import HiSVDError

if TYPE_CHECKING:
    from hisvd.calibration_cache import CalibrationCache
    from hisvd.settings import CompressionSettings

TARGET_OPTIONS = {"target_compression": "parameters", "target_bytes": "bytes"}
STAGES, INT6 = "Options of --allocation hisvd", "Options of --export int6"
EXAMPLES = """
hisvd compress --model_path M --calib_cache C --target_compression 0.8 --save_model OUT
hisvd compress --model_path M --calib_cache C --target_bytes 0.4 --save_model OUT.pt
hisvd compress --model_path M --calib_cache C --max_ppl_increase 0.05 --save_model OUT
hisvd compress --calib_cache C --target_compression 0.8,0.6 --plan_only
"""


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
    from hisvd.planning import checked_targets

    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError:
        raise HiSVDError(f"--{option} '{text}' is not a number or a list of numbers such as 0.8,0.6.") from None
    return checked_targets(targets, option)


def budget_from(options: dict[str, Any]) -> list[float]:
    """The targets of the one option that sets them; `options` gets the budget that it stands for.

    There are none with --max_ppl_increase.

    Raises:
        HiSVDError: none or several are set, or a target is not a share.
    """
    given = [name for name in TARGET_OPTIONS if options[name]]
    within = options["max_ppl_increase"] is not None
    if len(given) + within != 1:
        raise HiSVDError(
            "Pass one of --target_compression (a share of the linear parameters, such as 0.8), --target_bytes (a share "
            "of their bytes in 16 bits, such as 0.4) and --max_ppl_increase (0.05 lets the perplexity rise by 5 %)."
        )
    if within and options["plan_only"]:
        raise HiSVDError(
            "--max_ppl_increase measures models, so it does not go with --plan_only; leave one of them out."
        )
    if within:
        return []
    options["budget"] = TARGET_OPTIONS[given[0]]
    return parse_targets(given[0], options[given[0]])


def unless_plan_only(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse to run without an option that only --plan_only can do without."""
    if not value and not context.params.get("plan_only"):
        raise click.MissingParameter(ctx=context, param=option)
    return value


@click.command("compress", cls=Program, examples=EXAMPLES, short_help="Write a smaller model, within a budget.")
@path_option(
    "--model_path",
    callback=unless_plan_only,
    help="The folder or Hub id that was calibrated.  [required unless --plan_only]",
)
@path_option("--calib_cache", required=True, help="Cache folder of calibrate.py (X or X.pkl).")
@option("--target_compression", help="Share of the linear weights to keep: 0.8, or 0.8,0.6,…")
@option(
    "--target_bytes",
    help="Instead: share of the bytes that the linear weights take in 16 bits, such as 0.4; besides ranks and widths, "
    "16 bits, int8 or int4 are chosen for every linear.",
)
@option(
    "--max_ppl_increase",
    type=float,
    help="Instead: the smallest model whose perplexity on held-out calibration text rises by at most this fraction, "
    "such as 0.05; it is searched for with --update none and then made as asked.",
)
@path_option("--save_model", callback=unless_plan_only, help="X.pt, or a folder.  [required unless --plan_only]")
@option("--plan_only", is_flag=True, is_eager=True, help="Print the rank table from the cache alone and stop.")
@option(
    "--update",
    type=click.Choice(choices.UPDATES),
    default="sequential",
    help="sequential: fit every layer to the outputs of the compressed layers below it (runs the text again); "
    "none: decompose each matrix once for all targets, which is quicker.",
)
@option(
    "--refine",
    type=click.Choice(choices.REFINEMENTS),
    default="none",
    help="After compression, train a part of the model to predict what the original does on the calibration text. "
    "norms: the gains of the layers' norms; weights: these and the layers' linear weights.",
)
@option(
    "--export",
    type=click.Choice(choices.EXPORTS),
    default="none",
    help="int6: every linear weight in the INT6 2:4 pairwise sparse format; "
    "dense: multiply the factors back, so that any tool loads the result; "
    "plain: remove neurons alone, as many in every MLP, for a smaller checkpoint that any tool loads.",
)
@option(
    "--linear_dtype",
    type=click.Choice(choices.LINEAR_DTYPES),
    help="What linear weights, factors or not, are stored in: int8 with a scale per row, int4 with one per 32 columns, "
    "both fitted to the calibration inputs.",
    show_default="the checkpoint's",
)
@device_option
@expert(
    "--allocation",
    type=click.Choice(choices.ALLOCATIONS),
    help="How ranks are chosen: loss (least estimated loss), hisvd (Stages 1 and 2) or uniform (the same share "
    "everywhere).",
    show_default="loss where the cache has gradients, else hisvd",
)
@expert(
    "--whitening",
    type=click.Choice(choices.WHITENINGS),
    help="The metric in which factors are optimal: two_sided (inputs and gradients), input or none (plain SVD).",
    show_default="two_sided where the cache has gradients, else input",
)
@expert(
    "--moves",
    type=click.Choice(choices.MOVES),
    help="low_rank: factor linears; neurons: remove hidden neurons of the MLPs; both: weigh one against the other.",
    show_default="both where the cache knows what neurons are worth, else low_rank",
)
@expert(
    "--factors",
    type=click.Choice(choices.FORMS),
    default="pivoted",
    help="How factors of rank r are stored: pivoted (packed, r(m+n−r) parameters) or svd (r(m+n)).",
)
@expert(
    "--rank_multiple",
    type=int,
    help="Ranks, and widths of narrower MLPs, are multiples of this, as kernels and quantizers like them.",
    show_default="with the loss allocation on linears of at least 128 × 128: 8, or 32 for integers; else 1",
)
@expert(
    "--min_saving",
    type=float,
    help="A linear is factored only where that saves at least this share of its parameters, since two products and a "
    "permutation take longer than one product of the same size.",
    show_default="with the loss allocation on linears of at least 128 × 128: 0.05; else 0",
)
@expert("--width_multiple", default=64, help="--export plain: the MLPs' common width is a multiple of this.")
@activation_budget_option
@option(
    "--rank_method",
    type=click.Choice(choices.RANK_METRICS),
    default="stable",
    group=STAGES,
    help="Stage 1: which rank of a weight decides its share.",
)
@option("--alpha", default=1.0, group=STAGES, help="Stage 1: exponent of the rank density; 0 is uniform.")
@option(
    "--modulation",
    type=click.Choice(choices.MODULATIONS),
    default="logarithmic",
    group=STAGES,
    help="Stage 2: how a redundancy score becomes a factor on the share.",
)
@option(
    "--lwe_strength",
    type=click.FloatRange(0),
    default=1.0,
    group=STAGES,
    help="Stage 2: strength of the modulation; 0 leaves Stage 1 as it is.",
)
@option(
    "--tail_redundancy_weight",
    type=click.FloatRange(0),
    default=1.0,
    group=STAGES,
    help="Stage 2: factor on the score; 0 leaves Stage 1 as it is.",
)
@option(
    "--cluster_by",
    type=click.Choice(choices.CLUSTERINGS),
    default="type",
    group=STAGES,
    help="Stage 2 clusters: a sublayer type, or a type within a run of similar adjacent layers.",
)
@option(
    "--int6_mode",
    type=click.Choice(choices.INT6_MODES),
    default="calibrated",
    group=INT6,
    help="Pairs and values fitted to the calibration inputs, or by the plain format rule.",
)
@option(
    "--quality_gate_delta",
    default="0.025",
    group=INT6,
    help="Export as many linears as raise the perplexity on held-out calibration text by at most this fraction; "
    "none: export all.",
)
@report_option
@output_options
@program
def main(**options: Any) -> None:
    """Compress a model to a share of its linear weights; nothing is trained without --refine."""
    from hisvd.calibration_cache import open_finished_cache
    from hisvd.cli.compression_tables import print_plans
    from hisvd.compression_page import compression_report
    from hisvd.settings import CompressionSettings
    from hisvd.utils.html_report import check_report

    targets = budget_from(options)
    options["quality_gate_delta"] = parse_delta(options["quality_gate_delta"])
    settings = settings_from(options, CompressionSettings)
    check_json(options["json_path"])
    check_report(options["report"])
    cache = open_finished_cache(options["calib_cache"])
    if options["plan_only"]:
        reports = print_plans(cache, targets, settings)
    else:
        reports = make_models(cache, targets, settings, options)
    write_figures(options["json_path"], reports)
    if options["report"] and reports:
        say(f"Page written to {compression_report(reports, cache, options['report'])}", always=True)


def make_models(
    cache: "CalibrationCache", targets: list[float], settings: "CompressionSettings", options: dict[str, Any]
) -> list[dict]:
    """Compress to the targets, or as far as --max_ppl_increase allows; returns the figures that are printed."""
    from hisvd.cli.compression_tables import next_steps, print_model
    from hisvd.compression import compress
    from hisvd.quality_search import compress_within
    from hisvd.settings import Resources

    where, resources = (options["model_path"], cache, options["save_model"]), settings_from(options, Resources)
    if targets:
        models = compress(*where, targets, settings, resources)
    else:
        models = compress_within(*where, options["max_ppl_increase"], settings, resources)
    reports = [print_model(model, cache) for model in models]
    if models:  # in the first of several processes
        say(next_steps(options["model_path"], models[0]))
    return reports


if __name__ == "__main__":
    main()
