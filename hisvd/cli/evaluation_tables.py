"""The tables of evaluate.py."""

from pathlib import Path

from hisvd.evaluation_figures import perplexity_text, speed_columns, task_columns, with_reference
from hisvd.tables import table

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


def speed_table(results: list[dict]) -> str:
    """Speed and peak memory as a table, with the ratios to the reference, and what they mean."""
    measured, reference = with_reference([(result["model"], result["speed"]) for result in results])
    tokens = results[0]["speed"]["prompt_tokens"]
    lines = [
        table(*speed_columns([(Path(name).name, figures) for name, figures in measured])),
        f"Prompt of {tokens} tokens; batch 8: its eighths. Memory: peaks of what the model adds to the process.",
    ]
    if reference:
        turns = results[0]["speed"]["took_turns"]
        how = "in turns" if turns else "one after the other, since memory does not hold all at once"
        lines.append(
            f"×: relative to {Path(reference['model']).name}, measured {how}; above 1 is faster for speeds and the "
            "first token, below 1 is less for memory."
        )
    return "\n".join(lines)
