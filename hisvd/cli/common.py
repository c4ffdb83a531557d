"""What the three programs share: error messages, common options, tables."""

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

from hisvd.errors import HiSVDError
from hisvd.settings import DTYPES
from hisvd.utils import distributed
from hisvd.utils.data_utils import default_data_dir

Settings = TypeVar("Settings")


def program(function: Callable) -> Callable:
    """Turn HiSVDError into one sentence and exit code 2, Ctrl-C into exit code 130."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            distributed.join()
            function(*args, **kwargs)
        except HiSVDError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(2)
        except OSError as error:
            click.echo(f"Error: {error.filename or 'a file'}: {error.strerror or error}.", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted; run the same command again to go on where it stopped.", err=True)
            sys.exit(130)
        finally:
            distributed.leave()

    return wrapper


def device_option(function: Callable) -> Callable:
    """--device."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps …; auto: an accelerator if any.",
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
        help="Hidden states up to this size are read from memory; past it, from the files that hold them in any case.",
    )(function)


def data_dir_option(function: Callable) -> Callable:
    """--data_dir."""
    return click.option(
        "--data_dir",
        default=default_data_dir,
        show_default="HISVD_DATA_DIR or data",
        help="Where local copies of the data sets are looked for.",
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


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded to their widest cell, the first flush left, the others flush right."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
