"""What the three programs share: error messages, common options, tables."""

import functools
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from tqdm import tqdm

from hisvd.errors import HiSVDError
from hisvd.settings import (
    DTYPES,
    CalibrationSettings,
    CompressionSettings,
    EvaluationSettings,
    Resources,
    StudySettings,
)
from hisvd.utils import distributed
from hisvd.utils.data_utils import default_data_dir

Settings = TypeVar("Settings", CalibrationSettings, CompressionSettings, EvaluationSettings, Resources, StudySettings)


class _BesideBars(logging.Handler):
    """Writes to standard error without breaking into a progress bar's line."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), sys.stderr)


def program(function: Callable) -> Callable:
    """Turn HiSVDError into one sentence and exit code 2, Ctrl-C into exit code 130; several processes end together."""

    beside_bars = _BesideBars()

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        for library in ("transformers", "lm_eval"):
            logging.getLogger(library).setLevel(logging.ERROR)
        logging.getLogger("hisvd").addHandler(beside_bars)
        try:
            distributed.join()
            function(*args, **kwargs)
            distributed.leave()
        except HiSVDError as error:
            stop(f"Error: {error}", 2)
        except OSError as error:
            stop(f"Error: {error.filename or 'a file'}: {error.strerror or error}.", 2)
        except KeyboardInterrupt:
            stop("Interrupted; run the same command again to resume where it stopped.", 130)
        except Exception as error:
            if distributed.count() == 1:
                raise  # click and the interpreter print it
            if isinstance(error, click.ClickException):
                error.show()
                distributed.fail(error.exit_code)
            stop(traceback.format_exc().rstrip(), 1)
        finally:
            logging.getLogger("hisvd").removeHandler(beside_bars)

    return wrapper


def stop(message: str, code: int) -> NoReturn:
    """Print `message` on standard error and end with `code`."""
    click.echo(message, err=True)
    distributed.fail(code)


def device_option(function: Callable) -> Callable:
    """--device."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps …; auto: an accelerator if there is one.",
    )(function)


def dtype_option(function: Callable) -> Callable:
    """--dtype."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="Compute dtype; auto: float32 on the CPU, else the checkpoint's.",
    )(function)


def activation_budget_option(function: Callable) -> Callable:
    """--activation_budget_gb."""
    return click.option(
        "--activation_budget_gb",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Hidden states up to this size are read from memory, larger ones from the files that always hold them.",
    )(function)


def data_dir_option(function: Callable) -> Callable:
    """--data_dir."""
    return click.option(
        "--data_dir",
        default=default_data_dir,
        show_default="HISVD_DATA_DIR or data",
        help="Folder in which local copies of the data sets are looked for.",
    )(function)


def report_option(function: Callable) -> Callable:
    """--report."""
    return click.option(
        "--report",
        type=click.Path(path_type=Path),
        help="Also write a page of tables and figures to this folder (needs matplotlib).",
    )(function)


def settings_from(options: Mapping[str, Any], cls: type[Settings], **others: Any) -> Settings:
    """The settings dataclass `cls` made of the options that have its fields' names, and of `others`."""
    return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options}, **others)


def comma_separated(text: str) -> list[str]:
    """The parts of a comma-separated option that are not blank."""
    return [part.strip() for part in text.split(",") if part.strip()]


def say(text: str) -> None:
    """Print, in the first of several processes."""
    if distributed.is_first():
        click.echo(text)
