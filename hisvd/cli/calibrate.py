"""calibrate.py: measure a model's input second moments once, into a cache that compress.py reads."""

from pathlib import Path

import click
import torch
from transformers import PreTrainedConfig

from hisvd.calibration import Calibration, open_or_create_cache
from hisvd.calibration_cache import cache_folder
from hisvd.cli.common import activation_budget_option, data_dir_option, device_option, dtype_option, program, say, table
from hisvd.errors import HiSVDError
from hisvd.estimates import activation_bytes, cache_bytes, estimated_stages, measured_rates, shapes_of
from hisvd.settings import CalibrationSettings
from hisvd.utils import distributed
from hisvd.utils.data_utils import (
    CALIBRATION_SPLIT,
    calibration_tokens,
    default_batch_size,
    file_safe,
    leading_bos,
    load_text,
    token_fingerprint,
    tokenize,
)
from hisvd.utils.files import check_disk, check_writable_file, write_json
from hisvd.utils.model_utils import (
    empty_model,
    load_tokenizer,
    local_folder,
    open_checkpoint,
    read_config,
    resolve_device,
    resolve_dtype,
)
from hisvd.utils.streaming import StreamedModel


@click.command()
@click.option("--model_path", required=True, help="Model folder with safetensors, or a Hub id.")
@click.option("--model_name", required=True, help="Name of the model in the cache folder's name.")
@click.option("--nsamples", type=click.IntRange(1), default=256, show_default=True, help="Calibration sequences.")
@click.option("--seqlen", type=click.IntRange(2), default=2048, show_default=True, help="Tokens a sequence.")
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
@click.option("--batch_size", type=click.IntRange(1), help="Sequences a forward  [default: about 4096 tokens]")
@click.option("--output_dir", default="calibration_cache", show_default=True, help="Where caches are kept.")
@click.option(
    "--dry_run", is_flag=True, help="Print what this run and compress.py need, from config.json alone, and stop."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the dry run's figures here.")
@activation_budget_option
@device_option
@dtype_option
@program
def main(
    model_path: str,
    model_name: str,
    nsamples: int,
    seqlen: int,
    dataset: str,
    data_dir: str,
    sampling: str,
    seed: int,
    gradients: bool,
    grad_nsamples: int,
    batch_size: int | None,
    output_dir: str,
    dry_run: bool,
    json_path: Path | None,
    activation_budget_gb: float,
    device: str,
    dtype: str,
) -> None:
    """Run calibration text through the model, one decoder layer in memory at a time.

    Started again after an interruption, the same command goes on at the first missing layer.
    """
    torch_device = resolve_device(device)
    sizes = {"nsamples": nsamples, "grad_nsamples": min(grad_nsamples, nsamples) * gradients, "seqlen": seqlen}
    if dry_run:
        tell_needs(read_config(local_folder(model_path, ["config.json"])), sizes, torch_device, dtype, json_path)
        return
    checkpoint = open_checkpoint(model_path)
    torch_dtype = resolve_dtype(dtype, torch_device, checkpoint.config.dtype or torch.bfloat16)
    tokenizer = load_tokenizer(checkpoint.folder)
    ids = tokenize(load_text(dataset, CALIBRATION_SPLIT, data_dir), tokenizer)
    text_settings = CalibrationSettings(nsamples, seqlen, dataset, data_dir, sampling, seed)
    tokens, held_out = calibration_tokens(ids, text_settings, leading_bos(checkpoint.config, tokenizer))
    identity = {
        "model": checkpoint.fingerprint(),
        "data": token_fingerprint(tokens),
        "held_out": token_fingerprint(held_out),
        **sizes,
        "dtype": str(torch_dtype),
    }
    options = {"model_path": model_path, "dataset": dataset, "sampling": sampling, "seed": seed}
    folder = cache_folder(output_dir, file_safe(model_name), nsamples, seqlen)
    num_layers = checkpoint.config.get_text_config().num_hidden_layers
    if nsamples < distributed.count() or (gradients and grad_nsamples < distributed.count()):
        raise HiSVDError(
            f"--nsamples {nsamples} and --grad_nsamples {grad_nsamples} must give each of the {distributed.count()} "
            "processes a sequence; raise them, or start fewer processes."
        )
    with distributed.first_alone():
        cache = open_or_create_cache(folder, identity, options, num_layers)
        cache.write_tokens(tokens, held_out)
    if cache.complete:
        say(f"{folder} is complete already: nothing to do.")
    else:
        batch_size = batch_size or default_batch_size(seqlen)
        streamed = StreamedModel(checkpoint, batch_size, torch_device, torch_dtype, 1e9 * activation_budget_gb)
        if distributed.is_first():
            shapes = shapes_of(streamed.skeleton)
            needed = cache_bytes(shapes, gradients) + activation_bytes(shapes, **sizes, compute=torch_dtype)
            check_disk([folder], needed, "Calibration")
        distributed.wait()
        Calibration(streamed, tokens, cache).run()
    distributed.wait()
    if distributed.is_first():
        cache.remove_activations()
    say(f"Calibration of {num_layers} layers on {tokens.numel()} tokens of {dataset}: {folder}")


def tell_needs(
    config: PreTrainedConfig, sizes: dict[str, int], device: torch.device, dtype: str, json_path: Path | None
) -> None:
    """Print memory, disk and time of calibrate.py and of compress.py to one target with its default settings."""
    stored = config.dtype or torch.bfloat16
    compute = resolve_dtype(dtype, device, stored)
    shapes = shapes_of(empty_model(config))
    fast, slow = measured_rates(device, compute)
    stages = []
    for stage in estimated_stages(shapes, **sizes, compute=compute, stored=stored):
        seconds = stage.flops / fast + stage.flops_of_decompositions / slow
        stages.append({"stage": stage.name, "memory_bytes": stage.memory, "disk_bytes": stage.disk, "seconds": seconds})
    say(
        f"{config.model_type}, {shapes.numbers:,} numbers in {len(shapes.layers)} layers and around them; "
        f"{sizes['nsamples']} × {sizes['seqlen']} tokens, gradients of {sizes['grad_nsamples']}; "
        f"{fast / 1e9:,.0f} GFLOP/s in {compute}, {slow / 1e9:,.0f} in decompositions, as measured now on {device}"
    )
    rows = [
        [s["stage"], f"{s['memory_bytes'] / 2**30:.1f}", f"{s['disk_bytes'] / 1e9:.1f}", f"{s['seconds'] / 3600:.2f}"]
        for s in stages
    ]
    say(table(["stage", "memory GiB", "disk GB", "hours"], rows))
    if json_path:
        figures = {"numbers": shapes.numbers, **sizes, "flops_a_second": [fast, slow], "stages": stages}
        write_json(check_writable_file(json_path), figures)


if __name__ == "__main__":
    main()
