"""Peak resident memory of calibrate.py and compress.py on random-weight Llamas of 4 and of 24 layers, side by side.

    python benchmarks/peak_memory.py --tokenizer models/smollm2-135m

The ratio shows whether memory grows with the number of layers (it must stay below 1.15).
"""

import os
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hisvd.cli.common import table
from hisvd.utils.files import write_json

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}


def peak_bytes(program: str, *arguments: object) -> int:
    """Run one of the programs and return its peak resident set."""
    process = subprocess.Popen([sys.executable, ROOT / program, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{program} failed")
    return usage.ru_maxrss * 1024


def build_checkpoint(folder: str, layers: int, tokenizer: str) -> None:
    """Write a random-weight Llama in bfloat16."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=len(words), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


@click.command()
@click.option("--tokenizer", required=True, help="A model folder whose tokenizer is used.")
@click.option("--nsamples", default=16, show_default=True)
@click.option("--seqlen", default=512, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/peak_memory.json")
def main(tokenizer: str, nsamples: int, seqlen: int, json_path: Path) -> None:
    """Build both checkpoints, run both programs on each, print peaks and ratios."""
    records = {"calibrate": {}, "compress": {}}
    for layers in (4, 24):
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own: a child's peak starts at the resident set of the process that forks it.
            builder = get_context("spawn").Process(target=build_checkpoint, args=(f"{folder}/model", layers, tokenizer))
            builder.start()
            builder.join()
            size = ["--nsamples", nsamples, "--seqlen", seqlen, "--dataset", "python-docs"]
            where = ["--model_path", f"{folder}/model", "--model_name", "m", "--output_dir", folder]
            records["calibrate"][layers] = peak_bytes("calibrate.py", *where, *size)
            cache = f"{folder}/m_n{nsamples}_s{seqlen}_with_hessian"
            goal = ["--calib_cache", cache, "--target_compression", "0.8,0.6", "--save_model", f"{folder}/out"]
            records["compress"][layers] = peak_bytes("compress.py", "--model_path", f"{folder}/model", *goal)
    rows = [[p, *(f"{r[n] / 2**20:.0f}" for n in (4, 24)), f"{r[24] / r[4]:.3f}"] for p, r in records.items()]
    click.echo(table(["program", "4 layers, MiB", "24 layers, MiB", "ratio"], rows))
    json_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(json_path, records)


if __name__ == "__main__":
    main()
