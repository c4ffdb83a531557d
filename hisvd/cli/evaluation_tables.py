"""The tables of evaluate.py."""

from pathlib import Path

from hisvd.evaluation_figures import perplexity_text, with_reference
from hisvd.tables import table
from hisvd.utils.task_utils import main_metric

MEANING = (
    "Perplexity says among how many equally likely tokens a model in effect chooses the next one: lower is better, and "
    "the closer to the original's the less was lost."
)


def result_table(results: list[dict]) -> str:
    """The figures as a table, one row per model, and which text they were measured on."""
    names, tasks = list(results[0]["perplexity"]), task_columns(results[0].get("tasks", {}))
    header = [
        "model",
        "linear kept",
        "file MB",
        *(f"ppl {Path(name).stem}" for name in names),
        *(["tokens scored"] if names else []),
    ]
    rows = []
    for result in results:
        figures = [result["perplexity"][name] for name in names]
        row = [
            Path(result["model"]).name,
            f"{result['linear_kept']:.2%}",
            f"{result['weight_file_bytes'] / 1e6:.1f}",
            *(perplexity_text(f["perplexity"]) for f in figures),
            *(["/".join(str(f["tokens_scored"]) for f in figures)] if names else []),
        ]
        row += [f"{result['tasks'][name][metric]:.4f}" for name, metric in tasks]
        rows.append(row)
    header += [f"{name} {metric}" for name, metric in tasks]
    if not names:
        return table(header, rows)
    documents = "/".join(map(str, results[0]["documents"].values()))
    return f"{table(header, rows)}\nProtocol {results[0]['protocol']}; documents read: {documents}"


SPEED_COLUMNS = {  # figure → (title, unit, decimals)
    "prefill_tokens_per_s": ("prefill tok/s", 1, 0),
    "prefill_tokens_per_s_batch_8": ("batch 8", 1, 0),
    "decode_tokens_per_s": ("decode tok/s", 1, 1),
    "decode_tokens_per_s_batch_8": ("batch 8", 1, 1),
    "time_to_first_token_s": ("first token s", 1, 2),
    "loading_peak_bytes": ("loading MB", 1e6, 0),
    "running_peak_bytes": ("running MB", 1e6, 0),
}


def speed_table(results: list[dict]) -> str:
    """Speed and peak memory as a table, with the ratios to the reference, and what they mean."""
    measured, reference = with_reference([(result["model"], result["speed"]) for result in results])
    rows = [speed_row(name, figures) for name, figures in measured]
    tokens = results[0]["speed"]["prompt_tokens"]
    lines = [
        table(["model", *(title for title, _, _ in SPEED_COLUMNS.values())], rows),
        f"Prompt of {tokens} tokens; batch 8: its eighths. Memory: peaks of what the model adds to the process.",
    ]
    if reference:
        turns = results[0]["speed"]["took_turns"]
        how = "in turns" if turns else "one after the other, since memory does not hold all at once"
        lines.append(
            f"x: relative to {Path(reference['model']).name}, measured {how}; above 1 is faster for speeds and the "
            "first token, below 1 is less for memory."
        )
    return "\n".join(lines)


def speed_row(name: str, figures: dict) -> list[str]:
    """A model's name, and its figures with their ratios."""
    row = [Path(name).name]
    for key, (_, unit, decimals) in SPEED_COLUMNS.items():
        ratio = f" ({figures['ratios'][key]:.2f}x)" if key in figures.get("ratios", {}) else ""
        row.append(f"{figures[key] / unit:.{decimals}f}{ratio}" if key in figures else "-")
    return row


def task_columns(tasks: dict[str, dict]) -> list[tuple[str, str]]:
    """(task, metric) of the table's columns: every task or group, without the members of groups that have a score."""
    metrics = {name: main_metric(figures) for name, figures in tasks.items()}
    return [
        (name, metric)
        for name, metric in metrics.items()
        if metric is not None and metrics.get(tasks[name].get("subtask_of", "")) is None
    ]
