"""The command `hisvd`: the three programs in one, and what has no program of its own."""

import click

from hisvd.cli import calibrate, compress, evaluate, report
from hisvd.cli.options import HELP_NAMES


@click.group("hisvd", context_settings=HELP_NAMES, commands=[calibrate.main, compress.main, evaluate.main, report.main])
@click.version_option(package_name="hisvd")
def main() -> None:
    """Compress Hugging Face language models without training: calibrate once, compress to any size, evaluate."""
