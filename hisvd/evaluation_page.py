"""The page about evaluated models: perplexity, size, speed, predictions, and what the models write.

It is made of the figures of `hisvd.evaluate` alone, which evaluate.json holds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hisvd.errors import HiSVDError
from hisvd.evaluation_figures import perplexity_text, speed_columns, task_columns, with_reference
from hisvd.schema import COUNT, NUMBER, OBJECT, SIZE, TEXT, Kind
from hisvd.utils.files import read_json, write_json
from hisvd.utils.html_report import (
    COLORS,
    FAINT,
    INK,
    MARKERS,
    drawing,
    figure,
    paragraph,
    short_names,
    shortened,
    table,
    write_page,
)
from hisvd.utils.sample_utils import NEW_TOKENS
from hisvd.utils.save_utils import PREDICTED

MOST_PANELS = 3  # beside each other
RESULT_SCHEMA = {  # what is drawn of a model's figures
    "model": TEXT,
    "source_model": Kind("a string or null", lambda v: v is None or isinstance(v, str)),
    "linear_numbers_dense": SIZE,
    "linear_kept": NUMBER,
    "weight_file_bytes": COUNT,
    "perplexity": {"*": {"perplexity": NUMBER, "nll": NUMBER, "tokens_scored": COUNT}},
    "documents": {"*": COUNT},
    "seqlen": COUNT,
    **dict.fromkeys(("protocol", "dtype", "device"), TEXT),
    "predicted_loss?": NUMBER,
    "samples?": [{"prompt": TEXT, "continuation": TEXT}],
    "speed?": {"prompt_tokens": COUNT, "ratios?": {"*": NUMBER}, "reference?": {"model": TEXT}},
    "tasks?": {"*": OBJECT},
}


def evaluation_report(results: Sequence[dict], folder: str | Path) -> Path:
    """Write a page of tables and figures about evaluated models: `evaluate.html`, and its figures, `evaluate.json`.

    Args:
        results: What `hisvd.evaluate` returns of each model, on the same texts.
        folder: Where to write; existing files of these names are replaced.

    Returns:
        The page.

    Raises:
        HiSVDError: the folder cannot be written.

    Example:
        >>> import hisvd
        >>> settings = hisvd.EvaluationSettings(nsamples=4, prompts=("Once upon a time",))
        >>> results = [hisvd.evaluate(m, ["wikitext2"], settings) for m in ("models/llama-7b", "models/small_80p")]
        >>> hisvd.evaluation_report(results, "report").name
        'evaluate.html'
    """
    names, texts = short_names([r["model"] for r in results]), list(results[0]["perplexity"]) if results else []
    parts = []
    if texts:
        parts += ["<h2>Perplexity and size</h2>\n", perplexity_table(results, names, texts)]
        parts.append(size_figure(results, names, texts))
        parts += ["<h2>Predicted and measured loss</h2>\n", *predictions(results, names, texts)]
    if any("tasks" in result for result in results):
        parts += ["<h2>Tasks</h2>\n", task_table(results, names)]
    if any("speed" in result for result in results):
        parts += ["<h2>Speed and memory</h2>\n", speed_table(results, names)]
    parts += ["<h2>What the models write</h2>\n", sample_table(results, names)]
    parts += ["<h2>Settings</h2>\n", settings_table(results, names)]
    what = f"{len(names)} models" if len(names) > 2 else " and ".join(names)
    path = write_page(Path(folder) / "evaluate.html", f"Evaluation of {shortened(what, 80)}", parts)
    write_json(path.with_name("evaluate.json"), list(results))
    return path


def read_results(files: Sequence[Path]) -> list[dict]:
    """The figures in files of `evaluate.py --json`, one after the other; a model with the same perplexities once.

    Raises:
        HiSVDError: a file cannot be read, holds something else, or figures on other texts, tasks or prompts than the
            first.
    """
    first: dict | None = None
    once: dict[tuple[str, str], dict] = {}
    for file in files:
        for result in read_json(file, [RESULT_SCHEMA]):
            first = first or result
            if what_on(result) != what_on(first):
                raise HiSVDError(
                    f"{file} has figures on other texts, tasks or prompts than {files[0]}; draw them apart."
                )
            once.setdefault((result["model"], str(result["perplexity"])), result)
    return list(once.values())


def what_on(result: dict) -> tuple:
    """The names of the texts and tasks that a model was measured on, and the prompts."""
    prompts = [sample["prompt"] for sample in result.get("samples", [])]
    return list(result["perplexity"]), list(result.get("tasks", {})), prompts


def is_original(result: dict) -> bool:
    """Whether the model is not a compressed one."""
    return result["source_model"] is None


def original_of(result: dict, results: Sequence[dict]) -> dict | None:
    """The figures of what a compressed model was made from: by name, else the only original, if its size fits."""
    originals = [other for other in results if is_original(other)]
    named = [other for other in originals if other["model"].rstrip("/") == result["source_model"].rstrip("/")]
    found = named or (originals if len(originals) == 1 else [])
    return next((o for o in found if o["linear_numbers_dense"] == result["linear_numbers_dense"]), None)


def perplexity_table(results: Sequence[dict], names: Sequence[str], texts: Sequence[str]) -> str:
    """Size and perplexities of every model."""
    header = ["model", "linear weights kept", "weight files, MB", *(f"perplexity on {t}" for t in short_names(texts))]
    rows = []
    for result, name in zip(results, names, strict=True):
        title = f"{name} (original)" if is_original(result) else name
        figures = [perplexity_text(result["perplexity"][text]["perplexity"]) for text in texts]
        rows.append([title, f"{result['linear_kept']:.2%}", f"{result['weight_file_bytes'] / 1e6:.1f}", *figures])
    return table(header, rows, "Perplexity of each model on each text (lower is better), and what its weights take.")


def size_figure(results: Sequence[dict], names: Sequence[str], texts: Sequence[str]) -> str:
    """Perplexity against bytes, a panel per text."""
    columns = min(MOST_PANELS, len(texts))
    lines = -(-len(texts) // columns)
    width = min(11.0, 3 + 3.6 * columns)
    with drawing(lines, columns, (width, 0.3 + 3.2 * lines)) as (canvas, axes):
        for axis, text, title in zip(axes, texts, short_names(texts), strict=False):
            for i, (result, name) in enumerate(zip(results, names, strict=True)):
                x, y = result["weight_file_bytes"] / 1e6, result["perplexity"][text]["perplexity"]
                original = is_original(result)
                label = f"{shortened(name)} (original)" if original else shortened(name)
                marker, size = ("*", 13) if original else (MARKERS[i % len(MARKERS)], 7)
                axis.plot(x, y, marker, markersize=size, color=COLORS[i % len(COLORS)], label=label)
                if original:
                    axis.axhline(y, color=COLORS[i % len(COLORS)], linewidth=0.8, linestyle=":")
            values = [result["perplexity"][text]["perplexity"] for result in results]
            if max(values) > 5 * min(values):
                axis.set_yscale("log")
            axis.margins(0.12)
            axis.set(xlabel="weight files, MB", ylabel="perplexity", title=shortened(title, 40))
            axis.grid(True)
        for axis in axes[len(texts) :]:
            axis.set_visible(False)
        canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        said = "; ".join(
            f"{name} {result['weight_file_bytes'] / 1e6:.1f} MB, "
            + ", ".join(perplexity_text(result["perplexity"][text]["perplexity"]) for text in texts)
            for result, name in zip(results, names, strict=True)
        )
        caption = (
            "Perplexity against the size of the weight files; further down and to the left is better. A star and a "
            "dotted line mark originals."
        )
        return figure(canvas, "size", caption, f"Points by megabytes and perplexity: {said}.")


def increases(results: Sequence[dict], texts: Sequence[str]) -> list[tuple[int, float, list[float]]]:
    """Place, predicted and, by text, measured increase of the mean loss of the models that both are known of."""
    found = []
    for i, result in enumerate(results):
        original = None if is_original(result) else original_of(result, results)
        if original is not None and PREDICTED in result:
            pairs = [(result["perplexity"][text]["nll"], original["perplexity"][text]["nll"]) for text in texts]
            found.append((i, result[PREDICTED], [after - before for after, before in pairs]))
    return found


def predictions(results: Sequence[dict], names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The table and the figure of predicted and measured increases, or why there are none."""
    found = increases(results, texts)
    if not found:
        return [
            paragraph(
                "Nothing to compare: this needs the original among the models, and compressed ones whose hisvd.json "
                "holds a prediction (two-sided whitening, no INT6)."
            )
        ]
    rows = [[names[i], f"{due:.4f}", *(f"{value:.4f}" for value in values)] for i, due, values in found]
    header = ["model", "predicted", *(f"measured on {name}" for name in short_names(texts))]
    caption = (
        "Increase of the mean loss over the original's, in nats per token. The prediction is the second-order estimate "
        "on the calibration text, of weights that no update has fitted."
    )
    with drawing(1, 1, (7, 3.8)) as (canvas, (axes,)):
        for j, name in enumerate(short_names(texts)):
            points = [(due, values[j]) for _, due, values in found]
            look: dict[str, Any] = {"color": COLORS[j % len(COLORS)], "label": shortened(name)}
            axes.plot(*zip(*points, strict=True), MARKERS[j % len(MARKERS)], **look)
        high = max(max(due, *values) for _, due, values in found) * 1.08
        low = min(0.0, *(value for _, _, values in found for value in values))
        axes.plot([0, high], [0, high], color=FAINT, linewidth=1, linestyle="--", label="as predicted")
        axes.set(xlim=(0, 1.15 * max(due for _, due, _ in found)), ylim=(low, high))
        for i, due, values in found:
            where: dict[str, Any] = {"textcoords": "offset points", "xytext": (5, 5), "fontsize": 7}
            axes.annotate(shortened(names[i], 18), (due, max(values)), color=INK, **where)
        axes.set(xlabel="predicted increase", ylabel="measured increase, nats per token")
        axes.grid(True)
        canvas.legend(loc="outside right center")
        below = "The same as points. Those above the dashed line lost more than predicted, those below it less."
        alt = "; ".join(f"{row[0]}: predicted {row[1]}, measured {', '.join(row[2:])}" for row in rows)
        drawn = figure(canvas, "predicted", below, f"Points of predicted and measured increase: {alt}.")
    return [table(header, rows, caption), drawn]


def task_table(results: Sequence[dict], names: Sequence[str]) -> str:
    """The main metric of every task, or of the group that it belongs to."""
    shown = task_columns(results[0]["tasks"])
    rows = [
        [name, *(f"{result['tasks'][task][metric]:.4f}" for task, metric in shown)]
        for result, name in zip(results, names, strict=True)
    ]
    header = ["model", *(f"{task} {metric}" for task, metric in shown)]
    return table(header, rows, "Scores of lm-evaluation-harness; higher is better for accuracies.")


def speed_table(results: Sequence[dict], names: Sequence[str]) -> str:
    """Speed and memory with their ratios to the reference, which is a row of its own if no model is it."""
    rows_of_models = [(name, result["speed"]) for name, result in zip(names, results, strict=True) if "speed" in result]
    measured, reference = with_reference(rows_of_models)
    caption = (
        f"A prompt of {measured[0][1]['prompt_tokens']} tokens, or its eighths as a batch of 8; medians. Memory: peaks "
        "of what the model adds to the process."
    )
    if reference:
        caption += (
            f" In brackets: relative to {short_names([reference['model']])[0]}; above 1 is faster, for memory below 1 "
            "is less."
        )
    return table(*speed_columns(measured), caption)


def sample_table(results: Sequence[dict], names: Sequence[str]) -> str:
    """What every model makes of every prompt, side by side."""
    written = [(name, result["samples"]) for name, result in zip(names, results, strict=True) if "samples" in result]
    if not written:
        return paragraph(
            "No text was generated: that needs evaluate.py --prompt or --report, without --offload_folder."
        )
    prompts = [sample["prompt"] for sample in written[0][1]]
    rows = [[prompt, *(samples[i]["continuation"] for _, samples in written)] for i, prompt in enumerate(prompts)]
    caption = f"Greedy continuations of at most {NEW_TOKENS} tokens, without a chat template."
    return table(["prompt", *(name for name, _ in written)], rows, caption, "text")


def settings_table(results: Sequence[dict], names: Sequence[str]) -> str:
    """How every model was measured."""
    rows = []
    for result, name in zip(results, names, strict=True):
        scored = ", ".join(
            f"{text}: {figures['tokens_scored']:,} tokens of {result['documents'][label]} documents"
            for text, (label, figures) in zip(
                short_names(list(result["perplexity"])), result["perplexity"].items(), strict=True
            )
        )
        source = result["source_model"]
        how = [result["protocol"], result["seqlen"], result["dtype"], result["device"]]
        rows.append([name, result["model"], "original" if source is None else f"from {source}", *how, scored])
    header = ["model", "path", "compressed", "protocol", "tokens per window", "dtype", "device", "scored"]
    return table(header, rows, "How the models were measured.", "text")
