"""What compress.py says and saves about a plan and its result."""

from importlib.metadata import version
from pathlib import Path

from hisvd.calibration_cache import CalibrationCache
from hisvd.cli.common import table
from hisvd.component.experts import kind_of
from hisvd.shape_utils import Sublayer, is_dense, stored_parameters
from hisvd.utils.files import check_writable_file, write_json


def plan_report(cache: CalibrationCache, target: float, ranks: list[int], settings: dict) -> dict:
    """Everything that is decided before the first matrix is factored, as it is saved in hisvd.json."""
    form = settings["factors"]
    rows = [
        {
            "name": s.name,
            "shape": list(s.shape),
            "form": "dense" if is_dense(r, s.shape, form) else form,
            "rank": r,
            "numbers": stored_parameters(r, s.shape, form),
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
    types = list(dict.fromkeys(kind_of(s.path) for s in cache.sublayers))
    found: dict[tuple[int, str], list[Sublayer]] = {}
    rank_in = {}
    for s, r in zip(cache.sublayers, ranks, strict=True):
        found.setdefault((s.layer, kind_of(s.path)), []).append(s)
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
