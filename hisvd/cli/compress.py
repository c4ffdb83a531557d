"""compress.py: model + calibration cache + budget → compressed model."""

import math
from pathlib import Path

import click

from hisvd.calibration_cache import CalibrationCache, check_same_model, open_finished_cache
from hisvd.cli.common import activation_budget_option, device_option, program, say
from hisvd.cli.compress_report import int6_summary, plan_report, rank_table, size_summary, summary, write_reports
from hisvd.compression import compress, plan_ranks
from hisvd.errors import HiSVDError
from hisvd.estimates import stream_bytes
from hisvd.int6_gate import export_within
from hisvd.rank_metrics import RANK_METRICS
from hisvd.refinement import MODULATIONS
from hisvd.shape_utils import is_dense
from hisvd.sparse_int6 import COLUMNS
from hisvd.utils import distributed
from hisvd.utils.files import check_disk
from hisvd.utils.model_utils import Checkpoint, open_checkpoint, resolve_device
from hisvd.utils.save_utils import ModelWriter, is_pt, output_path

NOT_SETTINGS = (
    "model_path",
    "calib_cache",
    "target_compression",
    "plan_only",
    "save_model",
    "json_path",
    "activation_budget_gb",
    "device",
)
# Settings that do not bear on the ranks.
NOT_FOR_PLAN = ("whitening", "factors", "update", "export", "int6_mode", "quality_gate_delta")


def parse_delta(text: str) -> float | None:
    """The bound of the quality gate as a fraction; None for `none`.

    Raises:
        HiSVDError: it is neither `none` nor a number of at least 0.
    """
    try:
        delta = None if text == "none" else float(text)
    except ValueError:
        delta = -1.0
    if delta is not None and not 0 <= delta < math.inf:
        raise HiSVDError(
            f"--quality_gate_delta '{text}' is neither a number of at least 0 nor none; 0.025 allows the perplexity "
            "to rise by 2.5 %."
        )
    return delta


def parse_targets(text: str) -> list[float]:
    """The comma-separated targets, each in (0, 1].

    Raises:
        HiSVDError: one is no number or out of range.
    """
    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError:
        raise HiSVDError(f"--target_compression '{text}' is no number or comma-separated list of numbers.") from None
    for target in targets:
        if not 0 < target <= 1:
            raise HiSVDError(
                f"--target_compression {target:g} is outside (0, 1]; 0.8 keeps 80 % of the decoder's linear weights."
            )
    return list(dict.fromkeys(targets))


@click.command()
@click.option("--model_path", help="The folder or Hub id that was calibrated.  [required unless --plan_only]")
@click.option("--calib_cache", required=True, help="Cache folder of calibrate.py (X or X.pkl).")
@click.option("--target_compression", required=True, help="Share of the linear weights to keep: 0.8, or 0.8,0.6,…")
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
    type=click.Choice(["type", "type_depth"]),
    default="type",
    show_default=True,
    help="Stage 2 clusters: a sublayer type, or a type within a run of similar adjacent layers.",
)
@click.option(
    "--allocation",
    type=click.Choice(["hisvd", "loss", "uniform"]),
    help="[default: loss where the cache has gradients, else hisvd]",
)
@click.option(
    "--whitening",
    type=click.Choice(["two_sided", "input", "none"]),
    help="[default: two_sided where the cache has gradients, else input]",
)
@click.option("--factors", type=click.Choice(["pivoted", "svd"]), default="pivoted", show_default=True)
@click.option(
    "--update",
    type=click.Choice(["sequential", "none"]),
    default="sequential",
    show_default=True,
    help="sequential: fit every layer to what the compressed layers below deliver (runs the calibration text again); "
    "none: decompose each matrix once for all targets, quicker.",
)
@click.option(
    "--export",
    type=click.Choice(["none", "int6", "dense"]),
    default="none",
    show_default=True,
    help="int6: every linear weight in the INT6 2:4 pairwise sparse format; "
    "dense: multiply the factors back, so that any tool loads the result.",
)
@click.option(
    "--int6_mode",
    type=click.Choice(["calibrated", "magnitude"]),
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
@activation_budget_option
@device_option
@click.pass_context
@program
def main(context: click.Context, **options: object) -> None:
    """Compress a model to a share of its linear weights, without training."""
    settings = {key: value for key, value in options.items() if key not in NOT_SETTINGS}
    targets = parse_targets(options["target_compression"])
    cache = open_finished_cache(options["calib_cache"])
    settings["quality_gate_delta"] = parse_delta(options["quality_gate_delta"])
    settings["allocation"] = settings["allocation"] or ("loss" if cache.has_gradients else "hisvd")
    settings["whitening"] = settings["whitening"] or ("two_sided" if cache.has_gradients else "input")
    if settings["whitening"] == "two_sided" and not cache.has_gradients:
        raise HiSVDError(
            f"--whitening two_sided needs gradients, and {cache.folder} was made with --no_gradients; "
            "use --whitening input, or calibrate again with gradients."
        )
    if settings["export"] == "int6" and all(s.in_features < COLUMNS for s in cache.sublayers):
        raise HiSVDError(
            f"--export int6 finds nothing to store: no linear of this model has the {COLUMNS} inputs that the format "
            "needs; leave the option out."
        )
    plan_settings = {k: v for k, v in settings.items() if k not in NOT_FOR_PLAN}
    plans = plan_ranks(cache, targets, form=settings["factors"], **plan_settings)
    if options["plan_only"]:
        reports = [plan_report(cache, target, ranks, settings) for target, ranks in plans.items()]
        for target, report in zip(targets, reports, strict=True):
            say(rank_table(cache, plans[target], settings["factors"]))
            say(summary(report))
        write_reports(options["json_path"], reports)
        return
    for name in ("model_path", "save_model"):
        if not options[name]:
            raise click.MissingParameter(ctx=context, param_hint=f"--{name}", param_type="option")
    device = resolve_device(options["device"])
    checkpoint = open_checkpoint(options["model_path"])
    check_same_model(cache, checkpoint.fingerprint(), checkpoint.folder)

    if cache.identity["nsamples"] < distributed.count():
        raise HiSVDError(
            f"{cache.folder} holds {cache.identity['nsamples']} sequences, fewer than the {distributed.count()} "
            "processes; start at most as many."
        )
    writers = {}
    for target, ranks in plans.items():
        report = plan_report(cache, target, ranks, settings)
        report["model_numbers_before"] = checkpoint.count_numbers()
        report["weight_bytes_before"] = checkpoint.count_bytes()
        output = output_path(options["save_model"], target, several=len(targets) > 1)
        with distributed.first_alone():
            writers[target] = ModelWriter(output, report, cache.num_layers + 1, checkpoint.transposed)
    gated = settings["export"] == "int6" and settings["quality_gate_delta"] is not None
    if distributed.is_first():
        folders = [writer.folder for writer in writers.values()]
        check_disk(folders, needed_bytes(checkpoint, cache, settings, writers[targets[0]].output, len(targets)), "This")
    distributed.wait()
    compress(
        checkpoint,
        cache,
        plans,
        writers,
        form=settings["factors"],
        whitening=settings["whitening"],
        update=settings["update"],
        export="none" if gated else settings["export"],
        int6_mode=settings["int6_mode"],
        device=device,
        activation_budget=1e9 * options["activation_budget_gb"],
    )
    if not distributed.is_first():
        return  # the first process puts the shards together
    reports = []
    for target, writer in writers.items():
        if gated:
            delta, mode = settings["quality_gate_delta"], settings["int6_mode"]
            writer.plan["quality_gate"] = export_within(delta, checkpoint, cache, writer, mode, device)
        modules = {} if settings["export"] == "dense" else factored_modules(cache, plans[target], settings["factors"])
        reports.append(writer.finish(checkpoint, modules))
        say(rank_table(cache, plans[target], settings["factors"]))
        say(f"{summary(reports[-1])}\n{size_summary(reports[-1])}")
        if settings["export"] == "int6":
            say(int6_summary(reports[-1]))
        say(f"Saved to {writer.output}")
    write_reports(options["json_path"], reports)


def needed_bytes(
    checkpoint: Checkpoint, cache: CalibrationCache, settings: dict, output: Path, num_targets: int
) -> int:
    """Bytes on disk of all targets: their weights (a .pt file is made beside its shards), hidden states, INT6 codes."""
    models = num_targets + is_pt(output)
    streams = 0
    if settings["update"] == "sequential":
        tokens = cache.identity["nsamples"] * cache.identity["seqlen"]
        streams = stream_bytes(checkpoint.config.get_text_config().hidden_size, tokens, cache.dtype, num_targets)
    codes = settings["export"] == "int6"
    return int(checkpoint.count_bytes() * (models + 0.25 * codes * num_targets)) + streams


def factored_modules(cache: CalibrationCache, ranks: list[int], form: str) -> dict[str, dict]:
    """The table of factored modules for config.json."""
    return {
        s.name: {"form": form, "rank": r}
        for s, r in zip(cache.sublayers, ranks, strict=True)
        if not is_dense(r, s.shape, form)
    }


if __name__ == "__main__":
    main()
