"""The page about compressed models, or plans: where the budget went, what was cut, and what that is predicted to cost.

Its tables and figures are made of what `compression_figures.drawn_of` collects alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hisvd.calibration_cache import CalibrationCache
from hisvd.compression_figures import SPECTRUM, drawn_of
from hisvd.planning import opened_cache
from hisvd.utils.files import write_json
from hisvd.utils.html_report import (
    COLORS,
    FAINT,
    INK,
    add_scale,
    draw_map,
    drawing,
    escaped,
    figure,
    paragraph,
    short_names,
    shortened,
    table,
    write_page,
)
from hisvd.utils.save_utils import PREDICTED

MOST_LABELLED = 40  # layers: in maps of more, cells have no room for numbers
LOSSES = {"low_rank": "low rank", "neurons": "removed neurons", "rounding": "rounding"}


def compression_report(reports: Sequence[dict], cache: str | Path | CalibrationCache, folder: str | Path) -> Path:
    """Write a page of tables and figures about compressed models: `compress.html`, and its figures, `compress.json`.

    Args:
        reports: What hisvd.json says of each: `CompressedModel.report`, the content of the file, or what
            `compress.py --plan_only --json` writes of a plan.
        cache: The calibration cache that they were planned from, or its folder.
        folder: Where to write; existing files of these names are replaced.

    Returns:
        The page.

    Raises:
        HiSVDError: the cache is missing, unfinished, damaged or of another model; or the folder cannot be written.

    Example:
        >>> import hisvd
        >>> (small,) = hisvd.compress("models/llama-7b", "caches/llama-7b", "models/drawn", 0.8)
        >>> hisvd.compression_report([small.report], "caches/llama-7b", "report").name
        'compress.html'
    """
    cache, folder = opened_cache(cache), Path(folder)
    drawn = [drawn_of(report, cache) for report in reports]
    title = f"Compression of {short_names([drawn[0]['summary']['source_model']])[0]}" if drawn else "Compression"
    links = " · ".join(f'<a href="#target-{i}">{escaped(heading(d["summary"]))}</a>' for i, d in enumerate(drawn, 1))
    parts = [f"<p>{links}</p>\n"] if len(drawn) > 1 else []
    for number, one in enumerate(drawn, 1):
        parts.append(f'<h2 id="target-{number}">{escaped(heading(one["summary"]))}</h2>\n')
        parts += section(one, f"f{number}")
    path = write_page(folder / "compress.html", title, parts)
    write_json(folder / "compress.json", drawn)
    return path


def heading(summary: dict) -> str:
    """The title of a target's section."""
    what = "bytes of the linear weights" if "linear_bytes_after" in summary else "linear parameters"
    return f"Target {summary['target_compression']:g} of the {what}"


def section(drawn: dict, name: str) -> list[str]:
    """Tables and figures of one target; `name` starts the names of its figures."""
    parts = [summary_table(drawn), type_table(drawn["by_type"])]
    parts += ["<h3>Where the budget went</h3>\n", rank_figure(drawn["map"], name)]
    if drawn["widths"]:
        parts.append(width_figure(drawn["widths"], name))
    else:
        parts.append(paragraph("All MLPs keep all of their hidden neurons."))
    parts += [depth_figure(drawn["map"], name), "<h3>What was cut off</h3>\n"]
    parts.append(spectrum_figure(drawn["spectra"], SPECTRUM[drawn["settings"]["whitening"]][1], name))
    parts.append("<h3>What it is predicted to cost</h3>\n")
    if drawn[PREDICTED]:
        parts.append(loss_figure(drawn[PREDICTED], name))
    else:
        parts.append(
            paragraph("There is no prediction: it needs a cache with gradients, two-sided whitening, and no INT6.")
        )
    rows = [*drawn["settings"].items()]
    parts += ["<h3>Settings</h3>\n", table(["setting", "value"], rows, "The settings that had a say.", "text")]
    return parts


def summary_table(drawn: dict) -> str:
    """What is left of the model."""
    s = drawn["summary"]

    def part(after: str, before: str) -> str:
        return f"{s[after]:,} of {s[before]:,} ({s[after] / s[before]:.2%})"

    rows = [["Target", f"{s['target_compression']:g}"]]
    rows.append(["Linear parameters kept", part("linear_numbers_after", "linear_numbers_before")])
    if s["linear_numbers_planned"] != s["linear_numbers_after"]:
        rows.append(["Linear parameters before the export", f"{s['linear_numbers_planned']:,}"])
    if "linear_bytes_after" in s:
        rows.append(["Bytes of the linear weights", part("linear_bytes_after", "linear_bytes_before")])
        rows.append(["Linears by type of number", ", ".join(f"{n} in {t}" for t, n in s["linear_dtypes"].items())])
    forms = [f"{count} {'in one piece' if form == 'dense' else form}" for form, count in drawn["linears"].items()]
    rows.append(["Linears by form", ", ".join(forms)])
    if "weight_bytes_after" in s:
        rows.append(["Parameters of the whole model", part("model_numbers_after", "model_numbers_before")])
        rows.append(["Bytes of the weight files", part("weight_bytes_after", "weight_bytes_before")])
        rows.append(["Bits per parameter of the original", f"{s['bits_per_number']:.2f}"])
    if drawn[PREDICTED]:
        rows.append(["Predicted increase of the mean loss", f"{drawn[PREDICTED]['total']:.4f} nats per token"])
    text = drawn["calibration"]
    rows.append(["Calibrated on", f"{text['nsamples']} × {text['seqlen']} tokens of {text['dataset']}"])
    rows.append(["Original", s["source_model"]])
    finished = "weight_bytes_after" in s
    caption = "What is left of the model." if finished else "What the plan leaves of the model; nothing is saved yet."
    return table([], rows, caption, "text")


def type_table(by_type: dict[str, dict[str, int]]) -> str:
    """Where the parameters of every sublayer type went."""
    keys = ("before", "removed_with_neurons", "saved_by_factors", "stored")
    rows = [
        [kind, *(f"{row[key]:,}" for key in keys), f"{row['stored'] / row['before']:.1%}"]
        for kind, row in by_type.items()
    ]
    header = ["sublayer type", "parameters", "removed with neurons", "saved by factors", "stored", "kept"]
    return table(header, rows, "Where the parameters of every sublayer type went, over all layers.")


def rank_figure(found: dict, name: str) -> str:
    """The kept share of every linear, and its rank."""
    caption = (
        f"Share of the {found['unit']} that each linear keeps (colour), by decoder layer from left to right. Numbers "
        "are the ranks of factors (in a mixture of experts, medians over the experts); a dot is a linear in one "
        "piece, and int8 or int4 one that is stored in such integers."
    )
    if len(found["kept"][0]) > MOST_LABELLED:
        caption = f"Share of the {found['unit']} that each linear keeps, by decoder layer from left to right."
    low, high = ends(found)
    alt = f"Map of {len(found['types'])} sublayer types by decoder layer: kept shares from {low:.0%} to {high:.0%}."
    return map_figure(found, f"{name}-ranks", caption, alt)


def width_figure(found: dict, name: str) -> str:
    """The width of every MLP."""
    caption = (
        "Share of the hidden neurons that each MLP keeps (colour), and how many those are. The MLPs are named by the "
        "linears that read these neurons."
    )
    low, high = ends(found)
    alt = f"Map of the MLPs by decoder layer: between {low:.0%} and {high:.0%} of the hidden neurons stay."
    return map_figure(found, f"{name}-widths", caption, alt)


def ends(found: dict) -> tuple[float, float]:
    """The smallest and the largest share of a map."""
    shares = [share for line in found["kept"] for share in line if share is not None]
    return min(shares), max(shares)


def top_of(found: dict) -> float:
    """Where the scale of a map's shares ends: the largest, rounded up to a tenth."""
    return math.ceil(10 * ends(found)[1] - 1e-9) / 10


def map_figure(found: dict, name: str, caption: str, alt: str) -> str:
    """A map of types (from top to bottom) by decoder layer."""
    layers, types = len(found["kept"][0]), [shortened(kind) for kind in found["types"]]
    texts = found["texts"] if layers <= MOST_LABELLED else [[""] * layers for _ in types]
    with drawing(1, 1, (11, 0.7 + 0.33 * max(2, len(types)))) as (canvas, (axes,)):
        draw_map(axes, found["kept"], texts, top_of(found))
        axes.set_yticks(range(len(types)), types)
        axes.set_xticks(range(0, layers, 1 if layers <= MOST_LABELLED else 5))
        add_scale(canvas, axes, "kept", top_of(found))
        return figure(canvas, name, caption, alt)


def depth_figure(found: dict, name: str) -> str:
    """The kept share of every type by depth."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with drawing(1, 1, (11, 3.2)) as (canvas, (axes,)):
        for i, (kind, shares) in enumerate(zip(found["types"], found["kept"], strict=True)):
            present = [(layer, share) for layer, share in enumerate(shares) if share is not None]
            style = "-" if i < len(COLORS) else "--"
            axes.plot(
                *zip(*present, strict=True), style, marker="o", markersize=3, linewidth=1.2, label=shortened(kind)
            )
        for line in axes.lines:
            line.set(markersize=3, linewidth=1.2)
        axes.set(xlabel="decoder layer", ylabel=f"{found['unit']} kept", ylim=(0, 1.04 * top_of(found)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(True)
        canvas.legend(loc="outside right center")
        caption = f"The same shares by depth: what each sublayer type keeps of its {found['unit']} in every layer."
        low, high = ends(found)
        alt = f"Lines of the kept share by decoder layer, one for each of {len(found['types'])} types, "
        return figure(canvas, f"{name}-depth", caption, f"{alt}between {low:.0%} and {high:.0%}.")


def spectrum_figure(drawn: list[dict], matrix: str, name: str) -> str:
    """Singular values of some sublayers, and where they were cut."""
    from matplotlib.ticker import FuncFormatter

    columns = min(4, len(drawn))
    lines = -(-len(drawn) // columns)
    with drawing(lines, columns, (11, 0.4 + 2.1 * lines)) as (canvas, axes):
        for axis, spectrum in zip(axes, drawn, strict=False):
            rank, places, values = spectrum["rank"], spectrum["places"], spectrum["values"]
            axis.plot(places, values, color=COLORS[0], linewidth=1.4)
            if rank is not None:
                axis.axvspan(rank, max(places), color=FAINT, alpha=0.15, linewidth=0)
                axis.axvline(rank, color=COLORS[1], linewidth=1.2, linestyle="--")
            said = "in one piece" if rank is None else f"rank {rank}"
            axis.set_title(f"{shortened(spectrum['type'].rpartition('.')[2], 20)}, layer {spectrum['layer']}: {said}")
            axis.set(yscale="log", xlim=(0, max(places)))
            axis.set_ylim(max(min((v for v in values if v > 0), default=1e-3) / 1.5, 1e-5), 1.5)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(True)
        for axis in axes[len(drawn) :]:
            axis.set_visible(False)
        canvas.supxlabel("singular value, from the largest", fontsize=9, color=INK)
        canvas.supylabel("relative to the largest", fontsize=9, color=INK)
        caption = (
            f"Singular values of {matrix}, from the calibration cache, of one sublayer of each type: W is the original "
            "weight, H the second moment of its inputs, and F that of its output gradients. What lies to the right of "
            "the dashed line was cut off. Where neurons were removed as well, fewer singular values were there to cut."
        )
        cuts = ", ".join(f"{d['name']} {'whole' if d['rank'] is None else 'at rank ' + str(d['rank'])}" for d in drawn)
        return figure(canvas, f"{name}-spectra", caption, f"Falling curves of singular values with their cuts: {cuts}.")


def loss_figure(predicted: dict[str, Any], name: str) -> str:
    """The predicted loss by layer and cause."""
    from matplotlib.ticker import MaxNLocator

    layers = predicted["by_layer"]
    causes = {key: [layer[key] for layer in layers] for key in LOSSES if any(layer[key] for layer in layers)}
    with drawing(1, 1, (11, 3)) as (canvas, (axes,)):
        base = [0.0] * len(layers)
        for i, (key, values) in enumerate(causes.items()):
            axes.bar(range(len(layers)), values, bottom=base, label=LOSSES[key], color=COLORS[i], width=0.8)
            base = [below + value for below, value in zip(base, values, strict=True)]
        axes.set(xlabel="decoder layer", ylabel="nats per token", xlim=(-0.6, len(layers) - 0.4))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        if causes:
            canvas.legend(loc="outside right center")
        caption = (
            f"Predicted increase of the mean loss by decoder layer, {predicted['total']:.4f} nats per token in all. It "
            "is the second-order estimate that the allocation goes by, on the calibration text and before the update, "
            "which makes up for part of it; on other text the increase differs."
        )
        largest = max(range(len(base)), key=base.__getitem__)
        alt = f"Bars of the predicted loss by decoder layer; the highest is layer {largest} with {base[largest]:.4f}."
        return figure(canvas, f"{name}-loss", caption, alt)
