"""Tasks of lm-evaluation-harness: the package lm_eval, an optional extra that is imported only where it is needed."""

import functools
import importlib.util
import io
import numbers
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hisvd.errors import HiSVDError, first_line
from hisvd.utils.progress import is_progress_shown

REQUESTS_AT_ONCE = 16
MAIN_METRICS = ("acc_norm", "acc")  # what the table shows where a task has them, else its first metric


@functools.cache
def load_tasks(names: tuple[str, ...]) -> Any:
    """lm_eval's TaskManager, after every task has been loaded once: a name that lm_eval knows, or a .yaml file.

    Raises:
        HiSVDError: lm_eval is not installed, a task is unknown, or its data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HiSVDError(
            "--tasks needs lm-evaluation-harness (the package lm_eval), which is not installed; run "
            "pip install 'hisvd[tasks]'."
        )
    from lm_eval.tasks import TaskManager

    files = [name for name in names if Path(name).suffix in (".yaml", ".yml")]
    for name in files:
        if not Path(name).is_file():
            raise HiSVDError(f"--tasks: there is no file {name}; give a task's name or its .yaml file.")
    manager = TaskManager(include_defaults=len(files) < len(names))  # reads all of lm_eval's tasks: many seconds
    for name in names:
        if name not in files and name not in manager.task_index:
            raise HiSVDError(
                f"--tasks '{name}' is unknown; `lm_eval ls tasks` lists the names, and a task of your own is given as "
                "its .yaml file."
            )
        try:
            with _quiet():
                manager.load([name])
        except Exception as error:  # tasks run code of their own, and data sets raise types of their own
            raise HiSVDError(f"--tasks: {name} cannot be loaded: {first_line(error)}") from None
    return manager


def task_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: tuple[str, ...], limit: int | None
) -> dict[str, dict]:
    """Score a model on tasks, as lm_eval does with the first `limit` documents of each (None: all).

    Returns a dict per task, and per group: its metrics with their standard errors ("acc", "acc_stderr" …; a filter
    other than "none" stays in the name), "samples" and "shots" (examples in the prompt); with "subtask_of" for the
    members of a group.

    Raises:
        HiSVDError: a task cannot be loaded or run, or the tokenizer has no token that a text can start with.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise HiSVDError(
            "--tasks needs a tokenizer with a BOS or EOS token, and the model's has neither; set eos_token in its "
            "tokenizer_config.json."
        )
    manager = load_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=REQUESTS_AT_ONCE)
            found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    except ValueError as error:  # lm_eval's own refusals, such as of tasks that run the code a model writes
        raise HiSVDError(f"--tasks {','.join(tasks)} cannot be run: {first_line(error)}") from None
    groups = {child: group for group, children in found["group_subtasks"].items() for child in children}
    figures = {}
    for name, metrics in found["results"].items():
        row = {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if "," in key and isinstance(value, numbers.Real)
        }
        samples = found["n-samples"].get(name, {}).get("effective")
        row |= {} if samples is None else {"samples": samples}
        row |= {"shots": found["n-shot"][name]} if name in found["n-shot"] else {}
        row |= {"subtask_of": groups[name]} if name in groups else {}
        figures[name] = row
    return figures


def main_metric(figures: dict[str, Any]) -> str | None:
    """The metric of a task's figures that stands for it in a table; None for a group without metrics of its own."""
    others = ("samples", "shots", "subtask_of")
    metrics = [key for key in figures if key not in others and "_stderr" not in key]
    return next((key for key in (*MAIN_METRICS, *metrics) if key in figures), None)


def _quiet() -> AbstractContextManager:
    """lm_eval's bars cannot be switched off, so nothing reaches standard error where none are to be shown."""
    return nullcontext() if is_progress_shown() else redirect_stderr(io.StringIO())
