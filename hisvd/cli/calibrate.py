"""calibrate.py: measure a model's input second moments once, into a cache that compress.py reads."""

from pathlib import Path
from typing import Any

import click

from hisvd.calibration import calibrate
from hisvd.calibration_cache import MANIFEST, cache_folder, read_cache
from hisvd.cli.common import (
    activation_budget_option,
    data_dir_option,
    device_option,
    dtype_option,
    program,
    say,
    settings_from,
)
from hisvd.estimates import Estimate, estimate
from hisvd.settings import CalibrationSettings, Resources
from hisvd.tables import table
from hisvd.utils.data_utils import file_safe
from hisvd.utils.files import check_writable_file, write_json


@click.command()
@click.option("--model_path", required=True, help="Model folder with safetensors, or a Hub id.")
@click.option("--model_name", required=True, help="Name of the model, part of the cache folder's name.")
@click.option("--nsamples", type=click.IntRange(1), default=256, show_default=True, help="Calibration sequences.")
@click.option("--seqlen", type=click.IntRange(2), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--dataset", default="wikitext2", show_default=True, help="wikitext2, c4, ptb, python-docs or a file.")
@data_dir_option
@click.option(
    "--sampling",
    type=click.Choice(["random", "first"]),
    default="random",
    show_default=True,
    help="Windows drawn at random with the seed, or the first ones.",
)
@click.option("--seed", default=3, show_default=True, help="Seed of the random windows.")
@click.option(
    "--gradients/--no_gradients",
    default=True,
    show_default=True,
    help="Also measure second moments of the output gradients (two-sided whitening, loss allocation).",
)
@click.option(
    "--grad_nsamples",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Gradients use the first N calibration sequences.",
)
@click.option("--batch_size", type=click.IntRange(1), help="Sequences per forward pass  [default: about 4096 tokens]")
@click.option("--output_dir", default="calibration_cache", show_default=True, help="Folder that holds the caches.")
@click.option(
    "--dry_run", is_flag=True, help="Print what this run and compress.py need, from config.json alone, and stop."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the dry run's figures here.")
@activation_budget_option
@device_option
@dtype_option
@program
def main(**options: Any) -> None:
    """Run calibration text through the model, one decoder layer in memory at a time.

    Started again after an interruption, the same command resumes at the first missing layer.
    """
    settings, resources = settings_from(options, CalibrationSettings), settings_from(options, Resources)
    model, json_path = options["model_path"], options["json_path"]
    if options["dry_run"]:
        needs = estimate(model, settings, resources)
        say(estimate_table(needs))
        if json_path:
            write_json(check_writable_file(json_path), estimate_figures(needs))
        return
    name = file_safe(options["model_name"])
    folder = cache_folder(options["output_dir"], name, settings.nsamples, settings.seqlen)
    finished = (folder / MANIFEST).exists() and read_cache(folder).complete
    cache = calibrate(model, folder, settings, resources)
    if finished:
        say(f"{folder} is already complete: nothing to do.")
    tokens = settings.nsamples * settings.seqlen
    say(f"Calibration of {cache.num_layers} layers on {tokens} tokens of {settings.dataset}: {folder}")


def estimate_table(needs: Estimate) -> str:
    """A table of memory, disk and time per stage, under a line that describes the run."""
    sizes, rate = needs.sizes, needs.rates.products[needs.sizes.compute]
    title = (
        f"{needs.model_type}, {needs.shapes.parameters:,} parameters, {len(needs.shapes.layers)} decoder layers; "
        f"{sizes.nsamples} × {sizes.seqlen} tokens, gradients of {sizes.grad_nsamples} sequences; "
        f"{rate / 1e9:,.0f} GFLOP/s in {sizes.compute}, as measured now on {needs.device}"
    )
    rows = [
        [s.name, f"{s.memory / 2**30:.1f}", f"{s.disk / 1e9:.1f}", f"{needs.seconds(s) / 3600:.2f}"]
        for s in needs.stages
    ]
    return f"{title}\n{table(['stage', 'memory GiB', 'disk GB', 'hours'], rows)}"


def estimate_figures(needs: Estimate) -> dict:
    """The same figures for a JSON file."""
    return {
        "numbers": needs.shapes.parameters,
        "nsamples": needs.sizes.nsamples,
        "grad_nsamples": needs.sizes.grad_nsamples,
        "seqlen": needs.sizes.seqlen,
        "rates": {
            "products": {str(dtype): rate for dtype, rate in needs.rates.products.items()},
            "decompositions": {f"{name} {dtype} {n}": t for (name, dtype, n), t in needs.rates.decompositions.items()},
            "memory": needs.rates.memory,
            "disk": needs.rates.disk,
        },
        "stages": [
            {"stage": s.name, "memory_bytes": s.memory, "disk_bytes": s.disk, "seconds": needs.seconds(s)}
            for s in needs.stages
        ],
    }


if __name__ == "__main__":
    main()
