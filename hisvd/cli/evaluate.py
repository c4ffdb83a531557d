"""evaluate.py: perplexity, speed and memory of original and compressed models, and the attention-residual study."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hisvd.choices import PROTOCOLS
from hisvd.cli.common import check_json, comma_separated, program, say, settings_from, write_figures
from hisvd.cli.options import (
    OUTPUT,
    Program,
    data_dir_option,
    device_option,
    dtype_option,
    expert,
    option,
    output_options,
    path_option,
    report_option,
)
from hisvd.errors import HiSVDError

if TYPE_CHECKING:
    from hisvd.evaluation import Texts

SPEED, TASKS, STUDY = "Speed and memory", "Tasks", "Study of attention"
STUDY_OPTIONS = ("layers", "d_r", "n_blocks", "calib_blocks", "plot")
PERPLEXITY_OPTIONS = (
    "nsamples",
    "speed",
    "reference",
    "offload_folder",
    "tasks",
    "task_limit",
    "verify",
    "report",
    "prompts",
)
EXAMPLES = """
hisvd evaluate --model_path M --model_path OUT --datasets wikitext2,c4 --speed --json results.json
hisvd evaluate --model_path OUT --datasets mine.txt --offload_folder /tmp/states
hisvd evaluate --model_path M --attention_residual --layers 27,28,29 --plot study.png
"""


@click.command("evaluate", cls=Program, examples=EXAMPLES, short_help="Measure perplexity, speed, memory and tasks.")
@path_option(
    "--model_path",
    "model_paths",
    multiple=True,
    required=True,
    help="Model folder, .pt file of compress.py or Hub id; repeat it to compare models in one table.",
)
@path_option("--datasets", default="wikitext2", help="Comma-separated names or text files.")
@option("--seqlen", type=click.IntRange(2), help="Tokens per window.", show_default="2048, or the model's limit")
@option("--nsamples", type=click.IntRange(1), help="Only the first N windows of each data set.", show_default="all")
@device_option
@data_dir_option
@expert(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="default",
    help="svd-llm: with the tokenizer's special tokens, as in published tables; default: text alone.",
)
@expert(
    "--offload_folder",
    type=click.Path(path_type=Path),
    help="Perplexity with one decoder layer in memory at a time; hidden states are kept in this folder meanwhile.",
)
@dtype_option
@option(
    "--speed", is_flag=True, group=SPEED, help="Also measure prefill, decoding, time to first token and peak memory."
)
@path_option(
    "--reference", group=SPEED, help="Model beside which --speed measures.", show_default="the first original row"
)
@option(
    "--tasks",
    default="",
    show_default=False,
    callback=lambda context, option, value: tuple(comma_separated(value)),
    group=TASKS,
    help="Also score these tasks of lm-evaluation-harness: comma-separated names or .yaml files.",
)
@option(
    "--task_limit",
    type=click.IntRange(1),
    group=TASKS,
    help="Only the first N documents of each task.",
    show_default="all",
)
@option("--verify", is_flag=True, help="First compare the weight files of compressed models with their checksums.")
@option(
    "--attention_residual",
    is_flag=True,
    group=STUDY,
    help="Instead, study whether attention on --layers is one value vector plus a small correction.",
)
@option("--layers", group=STUDY, help="Comma-separated decoder layers, from 0.", show_default="the last quarter")
@option("--d_r", group=STUDY, help="Dimensions of the residual to keep.", show_default="1,2,4,8,16,32")
@option("--n_blocks", type=click.IntRange(1), default=30, group=STUDY, help="Windows to evaluate on.")
@option("--calib_blocks", type=click.IntRange(1), default=4, group=STUDY, help="Earlier windows, for bases.")
@option("--plot", type=click.Path(path_type=Path), group=STUDY, help="Draw spectra and ΔPPL to this image.")
@report_option
@option(
    "--prompt",
    "prompts",
    multiple=True,
    group=OUTPUT,
    help="Continue this text by 40 tokens with every model; repeatable.",
    show_default="with --report three fixed ones",
)
@output_options
@click.pass_context
@program
def main(context: click.Context, **options: Any) -> None:
    """Print one table of perplexities (and speeds and task scores) of one or more models, or study their attention."""
    from hisvd.cli.evaluation_tables import MEANING, result_table
    from hisvd.evaluation import load_texts
    from hisvd.settings import EvaluationSettings

    study = options["attention_residual"]
    check_combination(context, study)
    check_outputs(options)
    settings, json_path = settings_from(options, EvaluationSettings), options["json_path"]
    texts = load_texts(comma_separated(options["datasets"]), settings)
    results = []
    for result in (study_models if study else evaluate_models)(texts, options):
        results.append(result)
        write_figures(json_path, results, last=False)
    if not study:
        say(result_table(results))
    if settings.speed:
        results = with_speeds(results, texts, options)
    if not study and texts:
        say(MEANING)
    draw(results, options)
    write_figures(json_path, results)


def check_outputs(options: dict[str, Any]) -> None:
    """Make sure that everything can be written, before long work starts; a page needs prompts, which `options` gets.

    Raises:
        HiSVDError: something cannot.
    """
    from hisvd.cli.attention_study import check_plot
    from hisvd.utils.html_report import check_report
    from hisvd.utils.sample_utils import PROMPTS

    if options["report"] and not options["offload_folder"]:
        options["prompts"] = options["prompts"] or PROMPTS
    check_json(options["json_path"])
    check_report(options["report"])
    if options["plot"]:
        check_plot(options["plot"])


def draw(results: list[dict], options: dict[str, Any]) -> None:
    """Draw what --plot and --report ask for, in the first of several processes."""
    from hisvd.cli.attention_study import draw_studies
    from hisvd.evaluation_page import evaluation_report
    from hisvd.utils import distributed

    if options["plot"] and distributed.is_first():
        draw_studies(results, options["plot"])
        say(f"Saved to {options['plot']}", always=True)
    if options["report"] and distributed.is_first():
        say(f"Page written to {evaluation_report(results, options['report'])}", always=True)


def check_combination(context: click.Context, study: bool) -> None:
    """Refuse options of the study without it, and options of perplexities with it.

    Raises:
        HiSVDError: one was given.
    """
    rule = "cannot be combined with" if study else "needs"
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if given and parameter.name in (PERPLEXITY_OPTIONS if study else STUDY_OPTIONS):
            raise HiSVDError(f"{parameter.opts[0]} {rule} --attention_residual.")


def evaluate_models(texts: "Texts", options: dict[str, Any]) -> Iterator[dict]:
    """The figures of one model after another."""
    from hisvd.evaluation import evaluate_texts
    from hisvd.settings import EvaluationSettings, Resources

    for model in options["model_paths"]:
        settings, resources = settings_from(options, EvaluationSettings), settings_from(options, Resources)
        yield evaluate_texts(model, texts, settings, resources)


def with_speeds(results: list[dict], texts: "Texts", options: dict[str, Any]) -> list[dict]:
    """The figures of all models with their speeds, which are printed."""
    from hisvd.cli.evaluation_tables import speed_table
    from hisvd.evaluation import compared_speeds
    from hisvd.settings import EvaluationSettings, Resources

    settings, resources = settings_from(options, EvaluationSettings), settings_from(options, Resources)
    speeds = compared_speeds(options["model_paths"], texts, settings, resources)
    results = [{**result, "speed": figures} for result, figures in zip(results, speeds, strict=True)]
    say(f"\n{speed_table(results)}")
    return results


def study_models(texts: "Texts", options: dict[str, Any]) -> Iterator[dict]:
    """The study of one model after another; its tables are printed as soon as they are ready."""
    from hisvd.cli.attention_study import study_model, study_tables

    for model in options["model_paths"]:
        result = study_model(model, texts, options)
        for name, study in result["attention_residual"].items():
            say(study_tables(model, name, study) + "\n")
        yield result


if __name__ == "__main__":
    main()
