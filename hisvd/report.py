"""The only author of hisvd.json: how a plan and its result are recorded, printed and described on the model card."""

import math
import re
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hisvd.calibration_cache import CalibrationCache
from hisvd.component.experts import kind_of
from hisvd.compression_figures import acting_settings
from hisvd.exports import EXPORTS
from hisvd.factor_forms import FORMS, coded_modules
from hisvd.integer_codes import CODES, SCALE
from hisvd.planning import Plan
from hisvd.settings import CompressionSettings
from hisvd.shape_utils import PLAIN_BYTES, Sublayer
from hisvd.sparse_int6 import COLUMNS, FORMAT_NAME, USER_ALIAS
from hisvd.tables import table
from hisvd.utils.checksums import CHECKSUMS, REPORT, checksums
from hisvd.utils.files import read_json
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.save_utils import PREDICTED, ModelWriter, is_pt

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
INT6_KEYS = ("packed_weight", "metadata", "scales")
# The last parts of names of tensors that do not show how many parameters they hold; of these, the plan says it.
CODE_KEYS = (*CODES, SCALE, *INT6_KEYS)


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


def finished_report(writer: ModelWriter, checkpoint: Checkpoint, found: dict[str, dict]) -> tuple[dict, dict[str, str]]:
    """The plan's report with what the shards actually hold, and the forms of the weights in codes by their names.

    `found` is what is added to it: what the quality gate, or the tuning, says.
    """
    stored = writer.stored_tensors()
    report = writer.plan | found
    stored_codes = coded_modules(stored)
    codes = writer.coded_modules(checkpoint, stored_codes)
    sparse = [name for name, form in stored_codes.items() if form == "int6"]
    kept, left_out = int6_values([name for name, form in codes.items() if form == "int6"], report["sublayers"])
    report["linear_numbers_after"] -= left_out
    report["linear_kept"] = report["linear_numbers_after"] / report["linear_numbers_before"]
    plain = (
        shape for name, (dtype, shape) in stored.items() if name.rpartition(".")[2] not in CODE_KEYS and dtype != "I32"
    )
    report["model_numbers_after"] = kept + sum(math.prod(shape) for shape in plain)  # permutations are no parameters
    report["model_numbers_after"] += sum(row["numbers"] for row in report["sublayers"] if "dtype" in row)
    report["model_kept"] = report["model_numbers_after"] / report["model_numbers_before"]
    report["weight_bytes_after"] = sum(path.stat().st_size for path in writer.weight_files())
    if not is_pt(writer.output):  # that has checksums of its own
        report[CHECKSUMS] = checksums(writer.weight_files())
    report["bits_per_number"] = 8 * report["weight_bytes_after"] / report["model_numbers_before"]
    if sparse:
        report["int6"] = int6_figures(sparse, {name: math.prod(shape) for name, (_, shape) in stored.items()})
    return report, codes


def int6_values(codes: Collection[str], rows: list[dict]) -> tuple[int, int]:
    """How many values the INT6 weights `codes` keep and leave out, padding aside; `rows` are those of the plan."""
    by_name, kept, total = {row["name"]: row for row in rows}, 0, 0
    for code in codes:
        row = by_name.get(code) or by_name[code.rpartition(".")[0]]
        size = math.prod(row.get("stored_shape", row["shape"]))
        if row["name"] != code:
            inner = row["rank"] * row.get("stored_shape", row["shape"])[1]
            size = inner if code.endswith(f".{FORMS[row['form']].inner}") else row["numbers"] - inner
        kept, total = kept + size // 2, total + size
    return kept, total - kept


def int6_figures(codes: Collection[str], sizes_in_files: dict[str, int]) -> dict:
    """What hisvd.json says about the INT6 weights `codes`, from the sizes of all tensors in the files.

    Bits are per weight of those linears, padding columns included.
    """
    sizes = {part: sum(sizes_in_files[f"{name}.{part}"] for name in codes) for part in INT6_KEYS}
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


LEGEND = "A number is the rank of a linear's factors; dense: it is not factored."


def rank_table(plan: Plan, sublayers: list[Sublayer]) -> str:
    """Ranks and integers as a table: a row for decoder layers that are alike, a column per type; for experts the
    smallest and largest.

    Where neurons are removed, a last column says how many the MLPs keep. A line below names layers without changes.
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

    layers: dict[tuple[str, ...], list[int]] = {}  # those alike share a row
    for i in range(1 + sublayers[-1].layer):
        cells = [cell(found.get((i, t), [])) for t in types]
        layers.setdefault((*cells, *([neurons(i) or "all"] if plan.shapes else [])), []).append(i)
    unchanged = layers.pop(next((row for row in layers if {*row} <= {"dense", "all", ""}), ()), [])
    titles = ["layer", *(t.rpartition(".")[2] for t in types), *(["neurons"] if plan.shapes else [])]
    lines = [table(titles, [[ranges(numbers), *row] for row, numbers in layers.items()]), LEGEND] if layers else []
    return "\n".join([*lines, *([f"Unchanged: all linears of {layers_called(unchanged)}"] if unchanged else [])])


def ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs cut short: "0–3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def layers_called(numbers: list[int]) -> str:
    """ "layer 7" or "layers 0–3, 7"."""
    return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


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
    planned = report["linear_numbers_planned"]
    if planned > after:
        line += f"; {planned:,} before INT6 left out half of the values of {report['int6']['weights']} weights"
    elif planned < after:
        line += f"; multiplied back from {planned:,} factored parameters (--export dense)"
    return line


def size_summary(report: dict) -> str:
    """One line about the whole model."""
    return (
        f"Whole model: {report['model_numbers_after']:,} of {report['model_numbers_before']:,} parameters "
        f"({report['model_kept']:.1%}), {report['weight_bytes_after']:,} of {report['weight_bytes_before']:,} bytes "
        f"({report['bits_per_number']:.2f} bits per parameter of the original)"
    )


def search_summary(report: dict) -> str:
    """What the search for the smallest model within a bound found."""
    found = report["quality_search"]
    before, after = (
        found["perplexities"]["original"],
        found["perplexities"][f"made_{100 * report['target_compression']:g}p"],
    )
    return (
        f"Perplexity on held-out text {before:.2f} → {after:.2f} ({after / before - 1:+.1%}, at most "
        f"{found['max_ppl_increase']:+.1%} were allowed; {found['tokens']} tokens)"
    )


def int6_summary(report: dict, sublayers: list[Sublayer]) -> str:
    """What the INT6 export stored, what the quality gate said, and which linears it let through."""
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
        lines += exported_linears(gate["exported"], sublayers)
    return "\n".join(lines)


def exported_linears(exported: list[str], sublayers: list[Sublayer]) -> list[str]:
    """A line for every sublayer type with the layers in which it was exported."""
    layers: dict[str, list[int]] = {}
    for s in sublayers:
        if s.name in exported:
            layers.setdefault(kind_of(s.path), []).append(s.layer)
    return [f"  {kind} of {layers_called(sorted(set(numbers)))}" for kind, numbers in layers.items()]


def model_card(report: dict, original: Path) -> str:
    """README.md of a compressed folder; `original` is the folder of the model that was compressed."""
    source = report["source_model"]
    short = original.resolve().name if Path(source).name in ("", "..") else Path(source).name
    name = source if HUB_ID.fullmatch(source) and not Path(source).exists() else short
    settings = "\n".join(f"| {key} | {value} |" for key, value in acting_settings(report["settings"]).items())
    entries = ModelCardData(
        base_model=name,
        **license_of(original),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hisvd", "low-rank", "compression"],
    )
    how = "" if "tuning" in report else "without training "
    needs = "  # the package hisvd must be installed" if EXPORTS[report["settings"]["export"]].needs_hisvd else ""
    content = f"""---
{entries.to_yaml()}
---
# {short}, {report["linear_kept"]:.1%} of its linear weights

Compressed {how}by HiSVD {version("hisvd")} from `{name}`; the original's license applies.

```python
from transformers import AutoModelForCausalLM{needs}

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
    return str(ModelCard(content))


def license_of(original: Path) -> dict[str, Any]:
    """The license that a model's card or else its config.json names, as entries of a card."""
    entries = read_json(original / "config.json")
    with suppress(Exception):  # no card, or whatever a damaged one raises
        entries |= ModelCard.load(original / "README.md").data.to_dict()
    return {key: entries[key] for key in ("license", "license_name", "license_link") if entries.get(key)}
