"""Time and memory of the whole chain on a random-weight Llama, beside what `calibrate.py --dry_run` estimates.

    python benchmarks/large_model.py --tokenizer models/smollm2-135m                                # 1.2 B, on the CPU
    python benchmarks/large_model.py --tokenizer … --shape llama-7b --nsamples 32 --seqlen 2048 --device cuda

calibrate.py with gradients of all sequences, compress.py to 0.8, evaluate.py of both models. `--layers` builds fewer
layers than the shape has: memory does not depend on their number, time and disk do.
"""

import tempfile
from pathlib import Path

import click
import torch
from common import Usage, measured, random_llama

from hisvd.cli.common import table
from hisvd.estimates import estimated_stages, shapes_of
from hisvd.utils.files import write_json
from hisvd.utils.model_utils import Checkpoint, empty_model, open_checkpoint, resolve_device, resolve_dtype

SHAPES = {
    "smollm2-360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}


@click.command()
@click.option("--tokenizer", required=True, help="A model folder whose tokenizer is used.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tinyllama", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Decoder layers  [default: the shape's]")
@click.option("--nsamples", default=8, show_default=True)
@click.option("--seqlen", default=512, show_default=True)
@click.option("--update", default="sequential", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--dataset", default="python-docs", show_default=True)
@click.option("--work_dir", type=click.Path(path_type=Path), help="Where the files lie  [default: a temporary folder]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/large_model.json")
def main(
    tokenizer: str,
    shape: str,
    layers: int | None,
    nsamples: int,
    seqlen: int,
    update: str,
    device: str,
    dataset: str,
    work_dir: Path | None,
    json_path: Path,
) -> None:
    """Build the checkpoint, run the three programs, print what each took."""
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        folder = Path(name)
        model, result = folder / "model", folder / "out"
        random_llama(model, tokenizer, **SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}))
        where = ["--model_path", model, "--device", device]
        sizes = ["--nsamples", nsamples, "--seqlen", seqlen]
        cache = ["--model_name", "m", "--output_dir", folder, "--dataset", dataset, "--grad_nsamples", nsamples]
        used = {"calibrate": measured("calibrate.py", *where, *sizes, *cache)}
        goal = ["--calib_cache", folder / f"m_n{nsamples}_s{seqlen}_with_hessian", "--save_model", result]
        used["compress"] = measured("compress.py", *where, *goal, "--target_compression", 0.8, "--update", update)
        text = ["--datasets", "python-docs", *sizes, "--device", device]
        for row, path in (("evaluate original", model), ("evaluate compressed", result)):
            used[f"{row}, bfloat16"] = measured("evaluate.py", "--model_path", path, *text, "--dtype", "bfloat16")
            used[f"{row}, offloaded"] = measured("evaluate.py", "--model_path", path, *text, "--offload_folder", folder)
        checkpoint = open_checkpoint(str(model))
        report(used, estimates(checkpoint, nsamples, seqlen, device), checkpoint.count_bytes(), json_path)


def estimates(checkpoint: Checkpoint, nsamples: int, seqlen: int, device: str) -> dict[str, float]:
    """Estimated bytes of memory of calibrate.py and compress.py."""
    shapes, stored = shapes_of(empty_model(checkpoint.config)), checkpoint.config.dtype
    compute = resolve_dtype("auto", resolve_device(device), stored or torch.bfloat16)
    sizes = {"nsamples": nsamples, "grad_nsamples": nsamples, "seqlen": seqlen}
    forward, backward, compression, _ = estimated_stages(shapes, **sizes, compute=compute, stored=stored)
    return {"calibrate": max(forward.memory, backward.memory), "compress": compression.memory}


def report(used: dict[str, Usage], estimated: dict[str, float], checkpoint_bytes: int, json_path: Path) -> None:
    """Print and save the table."""
    rows = []
    for name, usage in used.items():
        guess = f"{estimated[name] / 2**30:.2f}" if name in estimated else ""
        rows.append([name, f"{usage.seconds:.0f}", f"{usage.resident / 2**30:.2f}", guess, f"{usage.gpu / 2**30:.2f}"])
    click.echo(f"checkpoint: {checkpoint_bytes / 2**30:.2f} GiB")
    click.echo(table(["program", "seconds", "peak RSS, GiB", "estimated, GiB", "peak GPU, GiB"], rows))
    json_path.parent.mkdir(parents=True, exist_ok=True)
    figures = {name: vars(usage) | {"estimated": estimated.get(name)} for name, usage in used.items()}
    write_json(json_path, {"checkpoint_bytes": checkpoint_bytes, **figures})


if __name__ == "__main__":
    main()
