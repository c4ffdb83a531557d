"""The only author of hisvd.json: how a plan and its result are recorded, printed and described on the model card."""

import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hisvd.calibration_cache import CalibrationCache
from hisvd.component.experts import kind_of
from hisvd.exports import EXPORTS
from hisvd.factor_forms import coded_modules
from hisvd.integer_codes import CODES, SCALE
from hisvd.plan import Plan
from hisvd.settings import CompressionSettings
from hisvd.shape_utils import PLAIN_BYTES, Sublayer
from hisvd.sparse_int6 import COLUMNS, FORMAT_NAME, USER_ALIAS
from hisvd.tables import table
from hisvd.utils.save_utils import PREDICTED, REPORT, ModelWriter

# Parameters per element of these dtypes: permutations and metadata hold none, a byte of INT6 holds 4/3 values.
PARAMETERS_PER_ENTRY = {"I32": 0, "U8": 4 / 3}
INTEGER_KEYS = (*CODES, SCALE)  # the last parts of names of tensors that the plan's parameters are stored in


def plan_report(cache: CalibrationCache, plan: Plan, settings: CompressionSettings) -> dict:
    """Everything that is decided before the first matrix is factored; `settings` are resolved."""
    rows = [
        {
            "name": s.name,
            "shape": list(s.shape),
            **({"stored_shape": list(plan.shape(s))} if plan.shape(s) != s.shape else {}),
            "form": "dense" if plan.is_dense(s) else plan.form_of(s),
            "rank": plan.ranks[s.name],
            "numbers": plan.parameters_of(s),
            **({"dtype": plan.dtypes[s.name]} if s.name in plan.dtypes else {}),
        }
        for s in cache.sublayers
    ]
    before = sum(s.size for s in cache.sublayers)
    planned = sum(plan.parameters_of(s) for s in cache.sublayers)
    after = before if EXPORTS[settings.export].multiply else planned
    return {
        "format_version": 1,
        "hisvd_version": version("hisvd"),
        "source_model": str(cache.options.get("model_path")),
        "source_fingerprint": cache.identity["model"],
        "target_compression": plan.target,
        "settings": vars(settings).copy(),
        "calibration": {**cache.options, **cache.identity},
        "linear_numbers_before": before,
        "linear_numbers_planned": planned,
        "linear_numbers_after": after,
        "linear_kept": after / before,
        **(bytes_of(plan, cache.sublayers) if settings.budget == "bytes" else {}),
        **({PREDICTED: prediction(plan)} if plan.predicted_loss else {}),
        "by_type": parameters_by_type(plan, cache.sublayers),
        "sublayers": rows,
    }


def prediction(plan: Plan) -> dict[str, Any]:
    """What the plan is predicted to add to the mean loss, in nats per token: in all, and by decoder layer."""
    return {"total": sum(sum(layer.values()) for layer in plan.predicted_loss), "by_layer": plan.predicted_loss}


def bytes_of(plan: Plan, sublayers: list[Sublayer]) -> dict[str, Any]:
    """The bytes of the linear weights in 16 bits and as they are stored, and how many linears are in which dtype."""
    before, after = sum(PLAIN_BYTES * s.size for s in sublayers), sum(plan.bytes_of(s) for s in sublayers)
    dtypes = Counter(plan.dtypes.get(s.name, "16 bits") for s in sublayers)
    return {"linear_bytes_before": before, "linear_bytes_after": after, "linear_dtypes": dict(dtypes)}


def parameters_by_type(plan: Plan, sublayers: list[Sublayer]) -> dict[str, dict[str, int]]:
    """Where the parameters of every sublayer type go: those `before`, those `removed_with_neurons`, those
    `saved_by_factors` of what is left, and those `stored`."""
    found: dict[str, dict[str, int]] = {}
    for s in sublayers:
        narrow, stored = math.prod(plan.shape(s)), plan.parameters_of(s)
        row = {"before": s.size, "removed_with_neurons": s.size - narrow, "saved_by_factors": narrow - stored}
        total = found.setdefault(kind_of(s.path), dict.fromkeys([*row, "stored"], 0))
        for key, value in (row | {"stored": stored}).items():
            total[key] += value
    return found


def finished_report(writer: ModelWriter, gate: dict | None) -> tuple[dict, dict[str, str]]:
    """The plan's report with what the shards actually hold, and the forms of the weights in codes by stored names.

    `gate` is what the quality gate says about its choice.
    """
    stored = writer.stored_tensors()
    report = dict(writer.plan)
    if gate:
        report["quality_gate"] = gate
    codes = coded_modules(stored)
    counted = {name: entry for name, entry in stored.items() if name.rpartition(".")[2] not in INTEGER_KEYS}
    report["model_numbers_after"] = sum(
        round(math.prod(shape) * PARAMETERS_PER_ENTRY.get(dtype, 1)) for dtype, shape in counted.values()
    )
    # Only the plan says what padding there is in integers.
    report["model_numbers_after"] += sum(row["numbers"] for row in report["sublayers"] if "dtype" in row)
    report["model_kept"] = report["model_numbers_after"] / report["model_numbers_before"]
    report["weight_bytes_after"] = sum(path.stat().st_size for path in writer.shard_files())
    report["bits_per_number"] = 8 * report["weight_bytes_after"] / report["model_numbers_before"]
    sparse = {name for name, form in codes.items() if form == "int6"}
    if sparse:
        report["int6"] = int6_figures(sparse, {name: math.prod(shape) for name, (_, shape) in stored.items()})
    return report, codes


def int6_figures(codes: set[str], sizes_in_files: dict[str, int]) -> dict:
    """What hisvd.json says about the INT6 weights `codes`, from the sizes of all tensors in the files.

    Bits are per weight of those linears, padding columns included.
    """
    sizes = {
        part: sum(sizes_in_files[f"{name}.{part}"] for name in codes)
        for part in ("packed_weight", "metadata", "scales")
    }
    weights = COLUMNS * sizes["metadata"]
    payload, metadata = 8 * sizes["packed_weight"] / weights, 32 * sizes["metadata"] / weights
    return {
        "format": FORMAT_NAME,
        "user_alias": USER_ALIAS,
        "weights": len(codes),
        "bits_per_stored_value": 6,
        "pair_sparsity": 0.5,
        "payload_bits_per_weight": payload,
        "metadata_bits_per_weight": metadata,
        "total_bits_per_weight": payload + metadata + 32 * sizes["scales"] / weights,
    }


def rank_table(plan: Plan, sublayers: list[Sublayer]) -> str:
    """Ranks and integers as a table: a row per decoder layer, a column per type; for experts the smallest and largest.

    Where neurons are removed, a last column says how many the MLPs keep.
    """
    types = list(dict.fromkeys(kind_of(s.path) for s in sublayers))
    found: dict[tuple[int, str], list[Sublayer]] = {}
    for s in sublayers:
        found.setdefault((s.layer, kind_of(s.path)), []).append(s)

    def ends(texts: list[str]) -> str:
        return "–".join(dict.fromkeys([*texts[:1], *texts[-1:]]))

    def cell(members: list[Sublayer]) -> str:
        return ends([storage(s) for s in sorted(members, key=lambda s: plan.ranks[s.name])])

    def storage(s: Sublayer) -> str:
        rank, dtype = "dense" if plan.is_dense(s) else str(plan.ranks[s.name]), plan.dtypes.get(s.name)
        return rank if dtype is None else dtype if rank == "dense" else f"{rank} {dtype}"

    def neurons(layer: int) -> str:
        inner = (s for s in sublayers if s.layer == layer and plan.shape(s)[1] != s.in_features)
        return ends([f"{plan.shape(s)[1]} of {s.in_features}" for s in sorted(inner, key=lambda s: plan.shape(s)[1])])

    rows: list[list[Any]] = [[i, *(cell(found.get((i, t), [])) for t in types)] for i in range(1 + sublayers[-1].layer)]
    titles = ["layer", *(t.rpartition(".")[2] for t in types)]
    if plan.shapes:
        titles.append("neurons")
        rows = [[*row, neurons(row[0]) or "all"] for row in rows]
    return table(titles, rows)


def parameter_table(report: dict) -> str:
    """Where the parameters of every sublayer type went, in percent of those before."""
    titles = ["type", "parameters", "removed with neurons", "saved by factors", "stored"]
    rows = []
    for kind, row in report["by_type"].items():
        shares = (row[key] / row["before"] for key in ("removed_with_neurons", "saved_by_factors", "stored"))
        rows.append([kind, f"{row['before']:,}", *(f"{share:.1%}" for share in shares)])
    return table(titles, rows)


def summary(report: dict) -> str:
    """One line about the linear weights."""
    before, after = report["linear_numbers_before"], report["linear_numbers_after"]
    how = ", ".join(report["settings"][key] for key in ("allocation", "moves", "whitening", "factors"))
    line = f"Target {report['target_compression']:g} ({how}): {after:,} of {before:,} linear parameters kept"
    line += f" ({after / before:.3%})"
    if "linear_bytes_after" in report:
        bits, total = report["linear_bytes_after"], report["linear_bytes_before"]
        counts = ", ".join(f"{count} in {dtype}" for dtype, count in report["linear_dtypes"].items())
        line += f", {bits:,} of {total:,} bytes ({bits / total:.3%}; linears: {counts})"
    if report["linear_numbers_planned"] != after:
        line += f"; multiplied back from {report['linear_numbers_planned']:,} factored parameters (--export dense)"
    return line


def size_summary(report: dict) -> str:
    """One line about the whole model."""
    return (
        f"Whole model: {report['model_numbers_after']:,} of {report['model_numbers_before']:,} parameters "
        f"({report['model_kept']:.1%}), {report['weight_bytes_after']:,} of {report['weight_bytes_before']:,} bytes "
        f"({report['bits_per_number']:.2f} bits per parameter of the original)"
    )


def int6_summary(report: dict) -> str:
    """What the INT6 export stored, and what the quality gate said."""
    figures, gate = report.get("int6"), report.get("quality_gate")
    lines = ["INT6: no weight was exported."]
    if figures:
        bits = figures["total_bits_per_weight"]
        lines = [f"INT6 ({figures['user_alias']}): {figures['weights']} weights, {bits:.3f} bits per weight"]
    if gate:
        lines.append(
            f"Quality gate {gate['delta']:g}: {len(gate['exported'])} of "
            f"{len(gate['exported']) + len(gate['not_exported'])} linears exported, perplexity on held-out text "
            f"{gate['perplexity_before']:.2f} → {gate['perplexity_after']:.2f} ({gate['tokens']} tokens)"
        )
    return "\n".join(lines)


def model_card(report: dict) -> str:
    """README.md of a compressed folder."""
    settings = "\n".join(f"| {key} | {value} |" for key, value in report["settings"].items())
    return f"""---
library_name: transformers
tags: [hisvd, low-rank, compression]
---
# {Path(report["source_model"]).name}, {report["linear_kept"]:.1%} of its linear weights

Compressed without training by HiSVD {version("hisvd")} from `{report["source_model"]}`; the original's license applies.

```python
from transformers import AutoModelForCausalLM  # the package hisvd must be installed

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```

Parameters in the decoder's linear weights: {report["linear_numbers_after"]:,} of {report["linear_numbers_before"]:,};
in the whole model: {report["model_numbers_after"]:,} of {report["model_numbers_before"]:,}.

| setting | value |
| --- | --- |
{settings}

Calibrated on {report["calibration"]["nsamples"]} × {report["calibration"]["seqlen"]} tokens of
{report["calibration"]["dataset"]}. The ranks of all sublayers are in `{REPORT}`.
"""
