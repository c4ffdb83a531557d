"""What the benchmarks share.

Those that measure the library call its Python API. Those that measure memory and time of a process (peak_memory.py,
large_model.py) start the programs, because a peak belongs to the whole life of a process, imports included.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hisvd
from hisvd import CalibrationSettings, CompressionSettings, EvaluationSettings
from hisvd.calibration_cache import CalibrationCache, cache_folder
from hisvd.cli.common import comma_separated
from hisvd.utils.files import write_json

ROOT = Path(__file__).parents[1]
SEQLEN = 512  # tokens per window, of calibration and of evaluation
one_shot = partial(CompressionSettings, update="none")


@dataclass(frozen=True)
class Texts:
    """The options of a benchmark that calibrates once and evaluates models on several texts."""

    model_path: str
    calibration_text: str
    datasets: str
    nsamples: int
    grad_nsamples: int
    eval_nsamples: int
    work_dir: Path

    @property
    def names(self) -> list[str]:
        """The data sets to evaluate on."""
        return comma_separated(self.datasets)

    def calibrated(self) -> CalibrationCache:
        """See `calibrated`."""
        return calibrated(self.model_path, self.calibration_text, self.work_dir, self.nsamples, self.grad_nsamples)

    def evaluated(self, models: Sequence[str | Path], file: str) -> list[dict[str, float]]:
        """See `evaluated`; `file` is in the work folder."""
        return evaluated(models, self.names, self.eval_nsamples, self.work_dir / file)


def with_texts(work_dir: str) -> Callable[[Callable], Callable]:
    """Give a command the options of Texts, whose work folder is `work_dir` by default."""
    options = [
        click.option("--model_path", required=True),
        click.option("--calibration_text", required=True, help="A file or the name of a data set."),
        click.option("--datasets", required=True, help="Comma-separated files or names of data sets to evaluate on."),
        click.option("--nsamples", default=192, show_default=True),
        click.option("--grad_nsamples", default=48, show_default=True),
        click.option("--eval_nsamples", default=16, show_default=True),
        click.option("--work_dir", type=click.Path(path_type=Path), default=work_dir, show_default=True),
    ]
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


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


def calibrated(model: str, dataset: str, work_dir: Path, nsamples: int, grad_nsamples: int) -> CalibrationCache:
    """The cache of the first nsamples x 512 tokens of `dataset` in `work_dir`, made or finished where it is not."""
    settings = CalibrationSettings(
        nsamples=nsamples, seqlen=SEQLEN, dataset=dataset, sampling="first", grad_nsamples=grad_nsamples
    )
    return hisvd.calibrate(model, cache_folder(str(work_dir), "benchmark", nsamples, SEQLEN), settings)


def compressed(
    model: str, cache: CalibrationCache, output: Path, targets: list[float], settings: CompressionSettings
) -> list[Path]:
    """Folders of the model compressed to several targets; those that are there already are kept."""
    return [result.path for result in hisvd.compress(model, cache, output, targets, settings)]


def evaluated(models: Sequence[str | Path], datasets: list[str], nsamples: int, output: Path) -> list[dict[str, float]]:
    """Perplexities of the models by data set, on nsamples x 512 tokens of each; from `output` if it is there."""
    if not output.exists():
        settings = EvaluationSettings(seqlen=SEQLEN, nsamples=nsamples)
        write_json(output, [hisvd.evaluate(model, datasets, settings) for model in models])
    results = json.loads(output.read_text())
    return [{dataset: r["perplexity"] for dataset, r in result["perplexity"].items()} for result in results]


def file_name(method: str) -> str:
    """A method's name as the name of a file."""
    return method.replace(", ", "_").replace(" ", "-").replace("+", "and")
