"""What the programs share: messages, exit codes, settings from options.

Nothing here imports PyTorch before a program runs, so that help and usage errors come at once.
"""

import functools
import json
import logging
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from hisvd.errors import HiSVDError

if TYPE_CHECKING:
    from hisvd.settings import CalibrationSettings, CompressionSettings, EvaluationSettings, Resources, StudySettings

    Settings = TypeVar(
        "Settings", CalibrationSettings, CompressionSettings, EvaluationSettings, Resources, StudySettings
    )
STDOUT = Path("-")


class _BesideBars(logging.Handler):
    """Writes to standard error without breaking into a progress bar's line."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), sys.stderr)


def program(function: Callable) -> Callable:
    """Turn HiSVDError into one sentence and exit code 2, Ctrl-C into exit code 130; several processes end together.

    The options --quiet and --verbose, where a program has them, become the argument `progress`.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        quiet, verbose = kwargs.pop("quiet", None), kwargs.pop("verbose", None)
        if quiet is not None:
            kwargs["progress"] = not quiet
        try:
            if quiet and verbose:
                raise HiSVDError("--quiet and --verbose contradict each other; leave one of them out.")
            from hisvd.utils import distributed
            from hisvd.utils.progress import progress_shown

            with messages(bool(quiet), bool(verbose)), progress_shown(not quiet):
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
            processes = _processes()
            if processes is None or processes.count() == 1:
                raise  # click and the interpreter print it
            if isinstance(error, click.ClickException):
                error.show()
                processes.fail(error.exit_code)
            stop(traceback.format_exc().rstrip(), 1)

    return wrapper


@contextmanager
def messages(quiet: bool, verbose: bool) -> Iterator[None]:
    """Within the context, print what is logged: warnings; with `quiet` errors; with `verbose` all, and other libraries'
    warnings."""
    from transformers.utils import logging as transformers_logging

    ours, handler = logging.getLogger("hisvd"), _BesideBars()
    before = ours.level
    transformers_logging.set_verbosity(logging.WARNING if verbose else logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.WARNING if verbose else logging.ERROR)
    ours.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
    ours.addHandler(handler)
    libraries = " ".join(f"{name} {version(name)}" for name in ("hisvd", "torch", "transformers"))
    ours.info("%s, Python %s: %s", libraries, platform.python_version(), shlex.join(sys.argv))
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)


def _processes() -> Any:
    """The module hisvd.utils.distributed; None while it is not imported, for example after Ctrl-C in the middle."""
    return sys.modules.get("hisvd.utils.distributed")


def stop(message: str, code: int) -> NoReturn:
    """Print `message` on standard error and end with `code`."""
    click.echo(message, err=True)
    if _processes() is not None:
        _processes().fail(code)
    sys.exit(code)


def settings_from(options: Mapping[str, Any], cls: "type[Settings]", **others: Any) -> "Settings":
    """The settings dataclass `cls` made of the options that have its fields' names, and of `others`."""
    return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options}, **others)


def comma_separated(text: str) -> list[str]:
    """The parts of a comma-separated option that are not blank."""
    return [part.strip() for part in text.split(",") if part.strip()]


def say(text: str, always: bool = False) -> None:
    """Print, in the first of several processes; with --quiet only what is `always` said.

    It goes to standard error where standard output is for the JSON.
    """
    options = click.get_current_context().params
    if _processes().is_first() and (always or not options.get("quiet")):
        click.echo(text, err=options.get("json_path") == STDOUT)


def check_json(path: Path | None) -> None:
    """Make sure that --json can be written, before long work starts.

    Raises:
        HiSVDError: it cannot.
    """
    from hisvd.utils.files import check_writable_file

    if path is not None and path != STDOUT:
        check_writable_file(path)


def write_figures(path: Path | None, figures: Any, last: bool = True) -> None:
    """Write what --json asks for, in the first of several processes; standard output gets the `last` version alone."""
    from hisvd.utils.files import write_json

    if path is None or not _processes().is_first():
        return
    if path != STDOUT:
        write_json(path, figures)
        if last:
            say(f"Figures written to {path}", always=True)
    elif last:
        click.echo(json.dumps(figures, indent=2))


def command(name: str, **options: object) -> str:
    """A program's command line, to be shown: `python NAME.py` in the checkout, else `hisvd NAME`."""
    started_in_checkout = Path(sys.argv[0]).name in ("calibrate.py", "compress.py", "evaluate.py")
    words = ["python", f"{name}.py"] if started_in_checkout else ["hisvd", name]
    return shlex.join([*words, *(str(word) for key, value in options.items() for word in (f"--{key}", value))])
