"""calibrate.py: measure a model's input second moments once, into a cache that compress.py reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hisvd.choices import SAMPLINGS
from hisvd.cli.common import check_json, command, program, say, settings_from, write_figures
from hisvd.cli.options import (
    Program,
    activation_budget_option,
    data_dir_option,
    device_option,
    dtype_option,
    expert,
    not_empty,
    option,
    output_options,
    path_option,
)

if TYPE_CHECKING:
    from hisvd.calibration_cache import CalibrationCache
    from hisvd.estimates import Estimate
    from hisvd.settings import CalibrationSettings, Resources

EXAMPLES = """
hisvd calibrate --model_path /models/Llama-2-7b-hf --model_name llama-7b
hisvd calibrate --model_path M --model_name small --dataset mine.txt --nsamples 32 --seqlen 512
hisvd calibrate --model_path M --model_name x --dry_run
"""


@click.command("calibrate", cls=Program, examples=EXAMPLES, short_help="Measure a model on text, once.")
@path_option("--model_path", required=True, help="Model folder with safetensors, or a Hub id.")
@option("--model_name", required=True, callback=not_empty, help="Name of the model, part of the cache folder's name.")
@option("--nsamples", type=click.IntRange(1), default=256, help="Calibration sequences.")
@option("--seqlen", type=click.IntRange(2), default=2048, help="Tokens per sequence.")
@path_option(
    "--dataset",
    default="wikitext2",
    help="wikitext2, c4, ptb, python-docs, a file or a folder of texts or chats; or several with weights: "
    "c4=3,mine.txt=1.",
)
@path_option("--output_dir", default="calibration_cache", help="Folder that holds the caches.")
@option("--dry_run", is_flag=True, help="Print what this run and compress.py need, from config.json alone, and stop.")
@device_option
@data_dir_option
@expert(
    "--sampling",
    type=click.Choice(SAMPLINGS),
    default="random",
    help="Windows drawn at random with the seed, or the first ones.",
)
@expert("--seed", default=3, help="Seed of the random windows.")
@expert(
    "--gradients/--no_gradients",
    default=True,
    help="Also measure second moments of the output gradients (two-sided whitening, loss allocation).",
)
@expert("--grad_nsamples", type=click.IntRange(1), default=64, help="Gradients use the first N calibration sequences.")
@expert("--batch_size", type=click.IntRange(1), help="Sequences per forward pass.", show_default="about 4096 tokens")
@activation_budget_option
@dtype_option
@output_options
@program
def main(**options: Any) -> None:
    """Run calibration text through the model, one decoder layer in memory at a time.

    Started again after an interruption, the same command resumes at the first missing layer.
    """
    from hisvd.estimates import estimate
    from hisvd.settings import CalibrationSettings, Resources

    settings, resources = settings_from(options, CalibrationSettings), settings_from(options, Resources)
    check_json(options["json_path"])
    if options["dry_run"]:
        needs = estimate(options["model_path"], settings, resources)
        say(estimate_table(needs))
        write_figures(options["json_path"], estimate_figures(needs))
    else:
        measure(options, settings, resources)


def measure(options: dict[str, Any], settings: "CalibrationSettings", resources: "Resources") -> None:
    """Make the cache, and print and write what it holds."""
    from hisvd.calibration import calibrate
    from hisvd.calibration_cache import MANIFEST, cache_folder, read_cache
    from hisvd.utils.data_utils import file_safe

    name, model = file_safe(options["model_name"]), options["model_path"]
    folder = cache_folder(options["output_dir"], name, settings.nsamples, settings.seqlen)
    finished = (folder / MANIFEST).exists() and read_cache(folder).complete
    figures = cache_figures(calibrate(model, folder, settings, resources))
    if finished:
        say(f"{folder} is already complete: nothing to do.", always=True)
    else:
        read = f"{figures['layers']} layers on {figures['tokens']} tokens of {settings.dataset}"
        say(f"Calibration of {read}: {folder}", always=True)
    write_figures(options["json_path"], figures)
    goal = {"target_compression": 0.8, "save_model": Path("compressed_models", f"{name}_80p")}
    say(f"Next: {command('compress', model_path=model, calib_cache=folder, **goal)}")


def cache_figures(cache: "CalibrationCache") -> dict:
    """What a finished cache holds, for a JSON file."""
    sizes = {key: cache.identity[key] for key in ("nsamples", "seqlen")}
    return {
        "cache": str(cache.folder),
        "model": str(cache.options.get("model_path")),
        "layers": cache.num_layers,
        "linears": len(cache.sublayers),
        "tokens": sizes["nsamples"] * sizes["seqlen"],
        **sizes,
        "dataset": cache.options.get("dataset"),
        "gradients": cache.has_gradients,
    }


def estimate_table(needs: "Estimate") -> str:
    """A table of memory, disk and time per stage, under a line that describes the run."""
    from hisvd.tables import table

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


def estimate_figures(needs: "Estimate") -> dict:
    """The same figures for a JSON file."""
    return {
        "model_type": needs.model_type,
        "numbers": needs.shapes.parameters,
        "layers": len(needs.shapes.layers),
        "nsamples": needs.sizes.nsamples,
        "grad_nsamples": needs.sizes.grad_nsamples,
        "seqlen": needs.sizes.seqlen,
        "device": str(needs.device),
        "dtype": str(needs.sizes.compute),
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
