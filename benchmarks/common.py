"""What the benchmarks share: run the programs as a user would."""

import subprocess
import sys
from pathlib import Path

from hisvd.calibration_cache import cache_folder
from hisvd.utils.save_utils import output_path

ROOT = Path(__file__).parents[1]


def run(program: str, *arguments: object) -> None:
    """Run one of the programs; its progress bars stay visible, its tables do not."""
    subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


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
