"""Options that the programs share, and how their help pages look."""

from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from hisvd.choices import DTYPES

HELP_NAMES: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
COMMON, EXPERT, OUTPUT = "Common options", "Expert options", "Output"


class Option(click.Option):
    """An option that shows its default and belongs to a `group` of the help page."""

    def __init__(self, *args: Any, group: str = COMMON, **kwargs: Any) -> None:
        super().__init__(*args, **{"show_default": True, **kwargs})
        self.group = group


class Program(click.Command):
    """A command whose help page has its options in groups and `examples` at the end; `--a-b` is the same as `--a_b`."""

    def __init__(self, *, examples: str, **kwargs: Any) -> None:
        super().__init__(context_settings=HELP_NAMES, **kwargs)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with names of options in either spelling."""
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        try:
            return super().parse_args(ctx, [_with_underscores(word, known) for word in args])
        except click.NoSuchOption as error:
            others = _programs_with(error.option_name)
            where = f" It belongs to {' and '.join(others)}." if others else ""
            raise click.NoSuchOption(error.option_name, error.message + where, error.possibilities, ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options for every group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                groups.setdefault(getattr(parameter, "group", OUTPUT), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=28)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are."""
        with formatter.section("Examples"):
            for line in self.examples.strip().splitlines():
                formatter.write(f"  {line}\n")


def _with_underscores(word: str, known: set[str]) -> str:
    """`--model-path=X` as `--model_path=X`. click's token_normalize_func would change choices, too."""
    name, equals, value = word.partition("=")
    name = f"--{name[2:].replace('-', '_')}"
    return f"{name}{equals}{value}" if word.startswith("--") and name in known else word


def _programs_with(name: str) -> list[str]:
    """The programs that have an option of this name, in either spelling."""
    from hisvd.cli.programs import main

    name = f"--{name[2:].replace('-', '_')}"
    return [
        f"hisvd {program}" for program, command in main.commands.items() if any(name in p.opts for p in command.params)
    ]


def names_of_files(context: click.Context, option: click.Parameter, start: str) -> list[CompletionItem]:
    """Lets the shell complete what may be a path."""
    return [CompletionItem(start, type="file")]


option = partial(click.option, cls=Option)
expert = partial(option, group=EXPERT)
path_option = partial(option, shell_complete=names_of_files)  # also a Hub id, or the name of a data set


def together(*options: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda function: reduce(lambda decorated, add: add(decorated), reversed(options), function)


def not_empty(context: click.Context, option: click.Parameter, value: str) -> str:
    """Refuse an empty text."""
    if not value:
        raise click.BadParameter("it is empty.", ctx=context, param=option)
    return value


device_option = option("--device", default="auto", help="cpu, cuda, cuda:1, mps …; auto: an accelerator if any.")
dtype_option = expert(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    help="Compute dtype; auto: float32 on the CPU, else the checkpoint's.",
)
activation_budget_option = expert(
    "--activation_budget_gb",
    type=click.FloatRange(0),
    default=0.0,
    help="Hidden states up to this size are read from memory, larger ones from the files that always hold them.",
)
data_dir_option = path_option(
    "--data_dir",
    group=EXPERT,
    envvar="HISVD_DATA_DIR",
    default="data",
    show_default="HISVD_DATA_DIR or data",
    help="Folder in which local copies of the data sets are looked for.",
)
report_option = option(
    "--report",
    type=click.Path(path_type=Path),
    group=OUTPUT,
    help="Also write a page of tables and figures to this folder (needs matplotlib).",
)
talk_options = together(
    option("--quiet", "-q", is_flag=True, group=OUTPUT, help="Print errors and the path written, nothing else."),
    option("--verbose", "-v", is_flag=True, group=OUTPUT, help="Also print what is logged, and others' warnings."),
    click.version_option(package_name="hisvd", cls=Option, group=OUTPUT),
)
output_options = together(
    option(
        "--json",
        "json_path",
        type=click.Path(path_type=Path),
        group=OUTPUT,
        help="Also write the figures to this file; -: to standard output, and all text to standard error.",
    ),
    talk_options,
)
