"""What the benchmarks share: run the programs as a user would."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hisvd.calibration_cache import cache_folder
from hisvd.utils.save_utils import output_path

ROOT = Path(__file__).parents[1]


def run(program: str, *arguments: object) -> None:
    """Run one of the programs; its progress bars stay visible, its tables do not."""
    subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True)
class Usage:
    """What a program took: seconds, and bytes at the peak of its resident set and on the GPU."""

    seconds: float
    resident: int
    gpu: int


def measured(program: str, *arguments: object) -> Usage:
    """Run one of the programs to its end."""
    start, gpu = time.monotonic(), [0]
    process = subprocess.Popen([sys.executable, ROOT / program, *map(str, arguments)], stdout=subprocess.DEVNULL)
    done = threading.Event()
    watch = threading.Thread(target=_watch_gpu, args=(process.pid, gpu, done))
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    watch.join()
    if status:
        raise click.ClickException(f"{program} failed")
    return Usage(time.monotonic() - start, usage.ru_maxrss * 1024, gpu[0])


def _watch_gpu(pid: int, peak: list[int], done: threading.Event) -> None:
    """Note the most that the process has of the GPU's memory, as the driver says twice a second."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    while torch.cuda.is_available() and not done.wait(0.5):
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        used = [int(m) for p, m in (line.split(",") for line in lines) if int(p) == pid and m.strip().isdigit()]
        peak[0] = max([peak[0], *(megabytes * 2**20 for megabytes in used)])


def random_llama(folder: Path, tokenizer: str, **shape: int | bool) -> None:
    """Write a random-weight Llama in bfloat16, with shards of 500 MB and the tokenizer of another model.

    In a process of its own: a child's peak starts at the resident set of the process that forks it.
    """
    builder = get_context("spawn").Process(target=_write_llama, args=(folder, tokenizer, shape))
    builder.start()
    builder.join()


def _write_llama(folder: Path, tokenizer: str, shape: dict) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), **shape, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    words.save_pretrained(folder)


def calibrated(model_path: str, dataset: str, work_dir: Path, nsamples: int, grad_nsamples: int) -> Path:
    """The cache of the first nsamples x 512 tokens of `dataset` in `work_dir`, made or finished where it is not."""
    where = ["--model_path", model_path, "--model_name", "benchmark", "--output_dir", work_dir, "--dataset", dataset]
    size = ["--nsamples", nsamples, "--grad_nsamples", grad_nsamples, "--seqlen", 512, "--sampling", "first"]
    run("calibrate.py", *where, *size)
    return cache_folder(str(work_dir), "benchmark", nsamples, 512)


def compressed(model_path: str, cache: Path, output: Path, targets: list[str], options: str) -> list[Path]:
    """Folders of the model compressed to several targets; existing ones are kept."""
    outputs = [output_path(str(output), float(target), several=True) for target in targets]
    if not all(path.exists() for path in outputs):
        where = ["--model_path", model_path, "--calib_cache", cache, "--save_model", output]
        run("compress.py", *where, "--target_compression", ",".join(targets), *options.split())
    return outputs


def file_name(method: str) -> str:
    """A method's name as the name of a file."""
    return method.replace(", ", "_").replace(" ", "-").replace("+", "and")
