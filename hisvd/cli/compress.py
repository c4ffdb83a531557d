"""compress.py: model + calibration cache + budget → compressed model."""

import math
from importlib.metadata import version
from pathlib import Path

import click

from hisvd.calibration_cache import CalibrationCache, check_same_model, open_finished_cache
from hisvd.cli.common import activation_budget_option, device_option, program, say, table
from hisvd.component.experts import kind_of
from hisvd.compression import compress, plan_ranks
from hisvd.errors import HiSVDError
from hisvd.int6_gate import export_within
from hisvd.rank_metrics import RANK_METHODS
from hisvd.refinement import MODULATIONS
from hisvd.shape_utils import Sublayer, is_dense, stored_numbers
from hisvd.sparse_int6 import COLUMNS
from hisvd.utils import distributed
from hisvd.utils.files import check_writable_file, write_json
from hisvd.utils.model_utils import open_checkpoint, resolve_device
from hisvd.utils.save_utils import ModelWriter, output_path

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
@click.option("--rank_method", type=click.Choice(RANK_METHODS), default="stable", show_default=True)
@click.option("--alpha", default=1.0, show_default=True, help="Stage 1: exponent of the rank density; 0 is uniform.")
@click.option("--modulation", type=click.Choice(MODULATIONS), default="logarithmic", show_default=True)
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

    if cache.identity["nsamples"] < distributed.size():
        raise HiSVDError(
            f"{cache.folder} holds {cache.identity['nsamples']} sequences, fewer than the {distributed.size()} "
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
    if distributed.rank() > 0:
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


def factored_modules(cache: CalibrationCache, ranks: list[int], form: str) -> dict[str, dict]:
    """The table of factored modules for config.json."""
    return {
        s.name: {"form": form, "rank": r}
        for s, r in zip(cache.sublayers, ranks, strict=True)
        if not is_dense(r, s.shape, form)
    }


def plan_report(cache: CalibrationCache, target: float, ranks: list[int], settings: dict) -> dict:
    """Everything that is decided before the first matrix is factored, as it is saved in hisvd.json."""
    form = settings["factors"]
    rows = [
        {
            "name": s.name,
            "shape": list(s.shape),
            "form": "dense" if is_dense(r, s.shape, form) else form,
            "rank": r,
            "numbers": stored_numbers(r, s.shape, form),
        }
        for s, r in zip(cache.sublayers, ranks, strict=True)
    ]
    before = sum(s.size for s in cache.sublayers)
    planned = sum(row["numbers"] for row in rows)
    after = before if settings["export"] == "dense" else planned
    return {
        "format_version": 1,
        "hisvd_version": version("hisvd"),
        "source_model": str(cache.options.get("model_path")),
        "source_fingerprint": cache.identity["model"],
        "target_compression": target,
        "settings": settings,
        "calibration": {**cache.options, **cache.identity},
        "linear_numbers_before": before,
        "linear_numbers_planned": planned,
        "linear_numbers_after": after,
        "linear_kept": after / before,
        "sublayers": rows,
    }


def rank_table(cache: CalibrationCache, ranks: list[int], form: str) -> str:
    """Ranks as a table: a row a decoder layer, a column a sublayer type; of experts the smallest and the largest."""
    types = list(dict.fromkeys(kind_of(s.type) for s in cache.sublayers))
    found: dict[tuple[int, str], list[Sublayer]] = {}
    rank_in = {}
    for s, r in zip(cache.sublayers, ranks, strict=True):
        found.setdefault((s.layer, kind_of(s.type)), []).append(s)
        rank_in[s.name] = r

    def cell(members: list[Sublayer]) -> str:
        ends = sorted(members, key=lambda s: rank_in[s.name])
        texts = ["dense" if is_dense(rank_in[s.name], s.shape, form) else str(rank_in[s.name]) for s in ends]
        return "–".join(dict.fromkeys([*texts[:1], *texts[-1:]]))

    rows = [[i, *(cell(found.get((i, t), [])) for t in types)] for i in range(cache.num_layers)]
    return table(["layer", *(t.rpartition(".")[2] for t in types)], rows)


def summary(report: dict) -> str:
    """One line about the linear weights."""
    before, after = report["linear_numbers_before"], report["linear_numbers_after"]
    how = ", ".join(report["settings"][key] for key in ("allocation", "whitening", "factors"))
    line = f"Target {report['target_compression']:g} ({how}): {after:,} of {before:,} linear numbers kept"
    line += f" ({after / before:.3%})"
    if report["linear_numbers_planned"] != after:
        line += f"; multiplied back from {report['linear_numbers_planned']:,} factored ones (--export dense)"
    return line


def size_summary(report: dict) -> str:
    """One line about the whole model."""
    return (
        f"Whole model: {report['model_numbers_after']:,} of {report['model_numbers_before']:,} numbers "
        f"({report['model_kept']:.1%}), {report['weight_bytes_after']:,} of {report['weight_bytes_before']:,} bytes "
        f"({report['bits_per_number']:.2f} bits a number of the original)"
    )


def int6_summary(report: dict) -> str:
    """What the INT6 export stored, and what the quality gate said."""
    figures, gate = report.get("int6"), report.get("quality_gate")
    lines = ["INT6: no weight was exported."]
    if figures:
        bits = figures["total_bits_per_weight"]
        lines = [f"INT6 ({figures['user_alias']}): {figures['weights']} weights, {bits:.3f} bits a weight"]
    if gate:
        lines.append(
            f"Quality gate {gate['delta']:g}: {len(gate['exported'])} of "
            f"{len(gate['exported']) + len(gate['not_exported'])} linears exported, perplexity on held-out text "
            f"{gate['perplexity_before']:.2f} → {gate['perplexity_after']:.2f} ({gate['tokens']} tokens)"
        )
    return "\n".join(lines)


def write_reports(path: Path | None, reports: list[dict]) -> None:
    """Write the figures as JSON, if a path was given."""
    if path:
        write_json(check_writable_file(path), reports)


if __name__ == "__main__":
    main()
