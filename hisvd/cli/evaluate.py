"""evaluate.py: perplexity, speed and memory of original and compressed models, and the attention-residual study."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hisvd.cli.attention_study import check_plot, draw_studies, study_model, study_tables
from hisvd.cli.common import (
    comma_separated,
    data_dir_option,
    device_option,
    dtype_option,
    program,
    report_option,
    say,
    settings_from,
)
from hisvd.errors import HiSVDError
from hisvd.evaluation import Texts, compared_speeds, evaluate_texts, load_texts
from hisvd.evaluation_page import evaluation_report
from hisvd.settings import EvaluationSettings, Resources
from hisvd.tables import table
from hisvd.utils import distributed
from hisvd.utils.data_utils import PROTOCOLS
from hisvd.utils.files import check_writable_file, write_json
from hisvd.utils.html_report import check_report
from hisvd.utils.sample_utils import PROMPTS
from hisvd.utils.task_utils import main_metric

STUDY_OPTIONS = ("layers", "d_r", "n_blocks", "calib_blocks", "plot")
PERPLEXITY_OPTIONS = ("nsamples", "speed", "reference", "offload_folder", "tasks", "task_limit", "report", "prompts")


@click.command()
@click.option(
    "--model_path",
    "model_paths",
    multiple=True,
    required=True,
    help="Model folder, .pt file of compress.py or Hub id; repeat it to compare models in one table.",
)
@click.option("--datasets", default="wikitext2", show_default=True, help="Comma-separated names or text files.")
@data_dir_option
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOLS)),
    default="default",
    show_default=True,
    help="svd-llm: with the tokenizer's special tokens, as in published tables; default: text alone.",
)
@click.option("--seqlen", type=click.IntRange(2), help="Tokens per window  [default: 2048, or the model's limit]")
@click.option("--nsamples", type=click.IntRange(1), help="Only the first N windows of each data set.")
@click.option(
    "--offload_folder",
    type=click.Path(path_type=Path),
    help="Perplexity with one decoder layer in memory at a time; hidden states are kept in this folder meanwhile.",
)
@click.option("--speed", is_flag=True, help="Also measure prefill, decoding, time to first token and peak memory.")
@click.option("--reference", help="Model beside which --speed measures  [default: the first original row]")
@click.option(
    "--tasks",
    default="",
    callback=lambda context, option, value: tuple(comma_separated(value)),
    help="Also score these tasks of lm-evaluation-harness: comma-separated names or .yaml files.",
)
@click.option("--task_limit", type=click.IntRange(1), help="Only the first N documents of each task.")
@click.option(
    "--attention_residual",
    is_flag=True,
    help="Instead, study whether attention on --layers is one value vector plus a small correction.",
)
@click.option("--layers", help="Study: comma-separated decoder layers, from 0  [default: the last quarter]")
@click.option("--d_r", help="Study: dimensions of the residual to keep  [default: 1,2,4,8,16,32]")
@click.option(
    "--n_blocks", type=click.IntRange(1), default=30, show_default=True, help="Study: windows to evaluate on."
)
@click.option(
    "--calib_blocks", type=click.IntRange(1), default=4, show_default=True, help="Study: earlier windows, for bases."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Study: draw spectra and ΔPPL to this image.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
@report_option
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Continue this text by 40 tokens with every model; repeatable.  [default: with --report three fixed ones]",
)
@device_option
@dtype_option
@click.pass_context
@program
def main(context: click.Context, **options: Any) -> None:
    """Print one table of perplexities (and speeds and task scores) of one or more models, or study their attention."""
    check_combination(context, options["attention_residual"])
    if options["report"] and not options["offload_folder"]:
        options["prompts"] = options["prompts"] or PROMPTS
    settings, json_path, plot = settings_from(options, EvaluationSettings), options["json_path"], options["plot"]
    if json_path:
        check_writable_file(json_path)
    if plot:
        check_plot(plot)
    check_report(options["report"])
    texts = load_texts(comma_separated(options["datasets"]), settings)
    results = []
    for result in (study_models if options["attention_residual"] else evaluate_models)(texts, options):
        results.append(result)
        if json_path and distributed.is_first():
            write_json(json_path, results)
    if not options["attention_residual"]:
        say(result_table(results))
    if settings.speed:
        speeds = compared_speeds(options["model_paths"], texts, settings, settings_from(options, Resources))
        results = [{**result, "speed": figures} for result, figures in zip(results, speeds, strict=True)]
        say(f"\n{speed_table(results)}")
        if json_path and distributed.is_first():
            write_json(json_path, results)
    if plot and distributed.is_first():
        draw_studies(results, plot)
    if options["report"] and distributed.is_first():
        evaluation_report(results, options["report"])


def check_combination(context: click.Context, study: bool) -> None:
    """Refuse options of the study without it, and options of perplexities with it.

    Raises:
        HiSVDError: one was given.
    """
    rule = "cannot be combined with" if study else "needs"
    for option in context.command.params:
        given = context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if given and option.name in (PERPLEXITY_OPTIONS if study else STUDY_OPTIONS):
            raise HiSVDError(f"{option.opts[0]} {rule} --attention_residual.")


def evaluate_models(texts: Texts, options: dict[str, Any]) -> Iterator[dict]:
    """The figures of one model after another."""
    for model in options["model_paths"]:
        settings, resources = settings_from(options, EvaluationSettings), settings_from(options, Resources)
        yield evaluate_texts(model, texts, settings, resources)


def study_models(texts: Texts, options: dict[str, Any]) -> Iterator[dict]:
    """The study of one model after another; its tables are printed as soon as they are ready."""
    for model in options["model_paths"]:
        result = study_model(model, texts, options)
        for name, study in result["attention_residual"].items():
            say(study_tables(model, name, study) + "\n")
        yield result


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
            *(f"{f['perplexity']:.2f}" if f["perplexity"] < 1e5 else f"{f['perplexity']:.2e}" for f in figures),
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
    measured = [(result["model"], result["speed"]) for result in results]
    reference = next((figures["reference"] for _, figures in measured if "reference" in figures), None)
    if reference and all("reference" in figures for _, figures in measured):  # it is not a row
        measured.insert(0, (reference["model"], reference))
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


if __name__ == "__main__":
    main()
