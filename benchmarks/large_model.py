"""Time and memory of the whole chain on a random-weight Llama, beside what `calibrate.py --dry_run` estimates.

    python benchmarks/large_model.py --tokenizer models/smollm2-135m                                # 1.2 B, on the CPU
    python benchmarks/large_model.py --tokenizer … --shape llama-7b --nsamples 32 --seqlen 2048 --device cuda

calibrate.py with gradients of all sequences, compress.py to 0.8, evaluate.py of both models. `--layers` builds fewer
layers than the shape has: memory does not depend on their number, time and disk do. With `--work_dir` a run that was
killed resumes at the first program whose figures are not in the JSON file.
"""

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
from common import Usage, measured, random_llama

from hisvd.estimates import shapes_of
from hisvd.stage_estimates import RunSizes, estimated_stages
from hisvd.tables import table
from hisvd.utils.files import check_writable_file, make_folder, write_json
from hisvd.utils.model_utils import (
    Checkpoint,
    empty_model,
    open_checkpoint,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)

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
    with ExitStack() as stack:
        folder = make_folder(work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory())))
        model, cache, result = folder / "model", folder / f"m_n{nsamples}_s{seqlen}_with_hessian", folder / "out"
        if not model.exists():
            random_llama(model, tokenizer, **SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}))
        where, sizes = ["--model_path", model, "--device", device], ["--nsamples", nsamples, "--seqlen", seqlen]
        made = ["--model_name", "m", "--output_dir", folder, "--dataset", dataset, "--grad_nsamples", nsamples]
        goal = ["--calib_cache", cache, "--save_model", result, "--target_compression", 0.8, "--update", update]
        programs = {"calibrate": ("calibrate.py", *where, *sizes, *made), "compress": ("compress.py", *where, *goal)}
        for row, path in (("original", model), ("compressed", result)):
            text = ["--datasets", "python-docs", *sizes, "--device", device]
            evaluate = ("evaluate.py", "--model_path", path, *text)
            programs[f"evaluate {row}, bfloat16"] = (*evaluate, "--dtype", "bfloat16")
            programs[f"evaluate {row}, offloaded"] = (*evaluate, "--offload_folder", folder)
        makes = {"calibrate": [cache], "compress": [result, result.with_name("out.partial")]}
        used = run_missing(programs, makes, json_path, resume=bool(work_dir))
        checkpoint = open_checkpoint(str(model))
        click.echo(f"checkpoint: {checkpoint.count_bytes() / 2**30:.2f} GiB")
        click.echo(report(used, estimates(checkpoint, nsamples, seqlen, device)))


def run_missing(
    programs: dict[str, tuple], makes: dict[str, list[Path]], json_path: Path, resume: bool
) -> dict[str, Usage]:
    """Run the programs and note in the JSON file what each took; with `resume` those that it lists are not run again.

    What a killed one has left of the folders it `makes` goes first: a program is measured from its start.
    """
    used = {}
    if resume and json_path.exists():
        used = {name: Usage(**usage) for name, usage in json.loads(json_path.read_text()).items()}
    check_writable_file(json_path)
    for name, arguments in programs.items():
        if name not in used:
            for left in makes.get(name, []):
                shutil.rmtree(left, ignore_errors=True)
            used[name] = measured(*arguments)
            write_json(json_path, {n: vars(usage) for n, usage in used.items()})
    return used


def estimates(checkpoint: Checkpoint, nsamples: int, seqlen: int, device: str) -> dict[str, float]:
    """Estimated bytes of memory of the programs, one decoder layer at a time."""
    stored = stored_dtype(checkpoint.config)
    sizes = RunSizes(nsamples, nsamples, seqlen, resolve_dtype("auto", resolve_device(device), stored), stored)
    forward, backward, compression, _, evaluation = estimated_stages(shapes_of(empty_model(checkpoint.config)), sizes)
    return {
        "calibrate": max(forward.memory, backward.memory),
        "compress": compression.memory,
        "evaluate original, offloaded": evaluation.memory,
    }


def report(used: dict[str, Usage], estimated: dict[str, float]) -> str:
    """The table."""
    rows = []
    for name, usage in used.items():
        guess = f"{estimated[name] / 2**30:.2f}" if name in estimated else ""
        rows.append([name, f"{usage.seconds:.0f}", f"{usage.resident / 2**30:.2f}", guess, f"{usage.gpu / 2**30:.2f}"])
    return table(["program", "seconds", "peak RSS, GiB", "estimated, GiB", "peak GPU, GiB"], rows)


if __name__ == "__main__":
    main()
