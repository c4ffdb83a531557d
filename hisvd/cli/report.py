"""hisvd report: the pages of finished models and of written figures, without measuring anything again."""

from pathlib import Path
from typing import Any

import click

from hisvd.cli.common import program, say
from hisvd.cli.options import OUTPUT, Program, option, path_option, talk_options
from hisvd.errors import HiSVDError

EXAMPLES = """
hisvd report --figures results.json --report pages
hisvd report --model_path OUT_80p --model_path OUT_60p --calib_cache C --report pages
"""


@click.command("report", cls=Program, examples=EXAMPLES, short_help="Draw pages of what is already there.")
@option(
    "--figures",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file that evaluate.py --json wrote; repeat it to draw several in one page.",
)
@option(
    "--model_path",
    "model_paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A compressed folder or .pt file; repeat it to draw several in one page.",
)
@path_option(
    "--calib_cache", help="The cache that the compressed models were planned from.  [required with --model_path]"
)
@option(
    "--report",
    required=True,
    type=click.Path(path_type=Path),
    group=OUTPUT,
    help="Write evaluate.html, compress.html or both to this folder (needs matplotlib).",
)
@talk_options
@program
def main(**options: Any) -> None:
    """Draw the pages of evaluate.py --report and compress.py --report of what is already there."""
    from hisvd.compression_page import compression_report
    from hisvd.evaluation_page import evaluation_report, read_results
    from hisvd.utils.html_report import check_report

    figures, models, cache = options["figures"], options["model_paths"], options["calib_cache"]
    if bool(models) != bool(cache) or not (figures or models):
        raise HiSVDError(
            "Pass --figures (what evaluate.py --json wrote), or --model_path (compressed models) together with "
            "--calib_cache, or all three."
        )
    check_report(options["report"])
    pages = []
    if figures:
        pages.append(evaluation_report(read_results(figures), options["report"]))
    if models:
        pages.append(compression_report([report_of(model) for model in models], cache, options["report"]))
    for page in pages:
        say(f"Page written to {page}", always=True)


def report_of(model: Path) -> dict:
    """What the hisvd.json of a compressed model says.

    Raises:
        HiSVDError: there is none, or one of an older version that lacks what is drawn.
    """
    from hisvd.compression_figures import DRAWN_SCHEMA
    from hisvd.schema import check
    from hisvd.utils.save_utils import saved_report

    report = saved_report(model)
    if report is None:
        raise HiSVDError(f"{model} is not a model that compress.py wrote; pass its folder or its .pt file.")
    check(report, DRAWN_SCHEMA, f"hisvd.json in {model}")
    return report
