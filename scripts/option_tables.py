"""Write docs/options.md from the options of all programs: `python scripts/option_tables.py`."""

from pathlib import Path

import click

from hisvd.cli.options import OUTPUT
from hisvd.cli.programs import main as hisvd_command

BAR = r"\|"  # inside a table
PAGE = Path(__file__).parents[1] / "docs" / "options.md"
INTRODUCTION = """# Options

This page is written by `scripts/option_tables.py` from the programs themselves; `hisvd compress -h` shows the same.
`hisvd compress`, `hisvd-compress`, `python -m hisvd compress` and, in a checkout, `python compress.py` are the same
program. The same holds for calibrate and evaluate.

- Dashes may stand for the underscores in an option's name: `--model-path` is `--model_path`.
- "–" stands for no default: the option does nothing unless it is given.
- A bad value ends a program with one sentence and exit code 2, Ctrl-C with exit code 130. A run that was stopped
  resumes when the same command is started again ([running.md](running.md)).
- Where standard error is no terminal, lines take the place of progress bars: one for every stage, and one a minute with
  the count in long stages.
"""


def page() -> str:
    """The text of docs/options.md."""
    parts = [INTRODUCTION]
    for name, command in hisvd_command.commands.items():
        context = click.Context(command, info_name=f"hisvd {name}", **command.context_settings)
        groups: dict[str, list[click.Option]] = {}
        for option in command.get_params(context):
            assert isinstance(option, click.Option)
            groups.setdefault(getattr(option, "group", OUTPUT), []).append(option)
        parts.append(f"## {name}\n\n{' '.join(str(command.help).split())}\n")
        parts += [table(f"{name}: {title}", options, context) for title, options in groups.items()]
    return "\n".join(parts)


def table(title: str, options: list[click.Option], context: click.Context) -> str:
    """The options of one group under their title."""
    head = "| option | values | default | meaning |\n| --- | --- | --- | --- |"
    return "\n".join([f"### {title}\n", head, *(row(option, context) for option in options), ""])


def row(option: click.Option, context: click.Context) -> str:
    """One line of a table."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    default = option.get_help_extra(context).get("default", "off" if option.is_flag else "–")
    several = "; may be repeated" if option.multiple else ""
    cells = [names, values(option) + several, "required" if option.required else default.strip("()"), option.help or ""]
    return f"| {' | '.join(cell.replace('|', BAR).replace('  [', ' [') for cell in cells)} |"


def values(option: click.Option) -> str:
    """What may stand behind an option's name."""
    kind = option.type
    if option.is_flag:
        return "no value"
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        return f"{noun(kind)}, at least {kind.min}"
    return noun(kind)


def noun(kind: click.ParamType) -> str:
    """The kind of a value in a word or two."""
    if isinstance(kind, click.types.IntParamType):
        return "whole number"
    if isinstance(kind, click.types.FloatParamType):
        return "number"
    return "path" if isinstance(kind, click.Path) else "text"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
