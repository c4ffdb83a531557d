"""Time of calibration and compression, as ratios measured side by side in one run.

    python benchmarks/speed.py --model_path models/smollm2-135m --dataset data/wikitext2-test.txt

Calibration: the forward pass with moments and the gradient pass, each beside a bare forward pass of the layers over the
same tokens, and the share of the whole that decompositions take. Compression to 0.8 by `--whitening input` beside the
textbook way (SVD-LLM's: Cholesky factor of every input moment, its inverse, and the full SVD of every W L, all in
float64), both with the same ranks, and the perplexities of both; and six budgets beside one. Everything in the work
folder is made anew.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import click
import torch
from common import SEQLEN, compressed, one_shot
from transformers import AutoModelForCausalLM, AutoTokenizer

import hisvd
from hisvd import CalibrationSettings, EvaluationSettings, calibration
from hisvd.cached_moments import input_moment
from hisvd.calibration_cache import CalibrationCache
from hisvd.tables import table
from hisvd.utils.activation_files import ActivationPair
from hisvd.utils.files import make_folder, write_json
from hisvd.utils.model_utils import open_checkpoint
from hisvd.utils.streaming import StreamedModel
from hisvd.whitening_svd import H_DAMPING

NSAMPLES = 32
BUDGETS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


def timed(function: Callable) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextmanager
def stopwatch(owner: object, name: str, taken: dict[str, float]) -> Iterator[None]:
    """Within the context, add the seconds of every call of `owner.name` to `taken[name]`."""
    original = getattr(owner, name)

    def measured(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            taken[name] = taken.get(name, 0) + time.perf_counter() - start

    with mock.patch.object(owner, name, measured):
        yield


def bare_forward(model: str, tokens: torch.Tensor, folder: Path) -> Callable[[], None]:
    """What runs all decoder layers over `tokens`, hidden states on disk as in calibration, and does nothing else."""
    checkpoint = open_checkpoint(model)
    streamed = StreamedModel(checkpoint, 8, torch.device("cpu"), torch.float32)
    states: ActivationPair = streamed.pair(folder / "bare", tokens)
    arguments = streamed.embed(tokens, states[0])

    def run() -> None:
        for index in range(len(arguments)):
            layer = streamed.layer(index)
            states[index + 1].write(streamed.outputs(layer, index, states[index], arguments[index]))

    return run


def calibration_times(model: str, text: str, work_dir: Path) -> tuple[CalibrationCache, dict[str, float]]:
    """A new cache, and seconds by stage of making it."""
    settings = CalibrationSettings(
        nsamples=NSAMPLES, seqlen=SEQLEN, dataset=text, sampling="first", grad_nsamples=NSAMPLES
    )
    taken: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name in (
            (calibration, "layer_statistics"),
            (calibration, "gradient_statistics"),
            (calibration.Calibration, "forward_pass"),
            (calibration.Calibration, "gradient_pass"),
        ):
            stack.enter_context(stopwatch(owner, name, taken))
        cache = hisvd.calibrate(model, work_dir / "speed_cache", settings)
    decompositions = taken["layer_statistics"] + taken["gradient_statistics"]
    return cache, {
        "forward": taken["forward_pass"] - taken["layer_statistics"],
        "gradients": taken["gradient_pass"] - taken["gradient_statistics"],
        "decompositions": decompositions,
    }


@torch.no_grad()
def textbook(model: str, cache: CalibrationCache, ranks: dict[str, int], output: Path) -> None:
    """Truncate every linear in the metric of its inputs as in the papers, and save the model with dense products."""
    compressed_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for index in range(cache.num_layers):
        statistics = cache.read_layer(index)
        for s in cache.sublayers_of(index):
            moment = input_moment(s, statistics, torch.device("cpu"))
            moment.diagonal().add_(H_DAMPING * moment.diagonal().mean())
            root = torch.linalg.cholesky(moment)
            inverse = torch.linalg.inv(root)
            weight = compressed_model.get_parameter(f"{s.name}.weight")
            u, values, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
            r = ranks[s.name]
            weight.copy_((u[:, :r] * values[:r]) @ (v[:r] @ inverse))
    compressed_model.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


@click.command()
@click.option("--model_path", required=True)
@click.option("--calibration_text", default="python-docs", show_default=True)
@click.option("--dataset", default="python-docs", show_default=True, help="Text to evaluate on.")
@click.option("--work_dir", type=click.Path(path_type=Path), default="results/speed", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/speed.json", show_default=True)
def main(model_path: str, calibration_text: str, dataset: str, work_dir: Path, json_path: Path) -> None:
    """Print the ratios, and write them with the seconds to the JSON file."""
    shutil.rmtree(work_dir, ignore_errors=True)
    make_folder(work_dir)
    cache, taken = calibration_times(model_path, calibration_text, work_dir)
    taken["bare forward"] = timed(bare_forward(model_path, cache.read_tokens(), work_dir))

    by_inputs = one_shot(whitening="input", allocation="loss", factors="svd", rank_multiple=1, min_saving=0.0)
    ours, theirs = work_dir / "ours", work_dir / "textbook"
    (plan,) = hisvd.plan(cache, 0.8, by_inputs)
    taken["textbook"] = timed(lambda: textbook(model_path, cache, plan.ranks, theirs))
    taken["ours"] = timed(lambda: compressed(model_path, cache, ours, [0.8], by_inputs))
    taken["default, one budget"] = timed(lambda: compressed(model_path, cache, work_dir / "one", [0.6], one_shot()))
    taken["six budgets"] = timed(lambda: compressed(model_path, cache, work_dir / "six", BUDGETS, one_shot()))
    settings = EvaluationSettings(seqlen=SEQLEN, nsamples=16)
    perplexities = {}
    for name, folder in (("textbook", theirs), ("ours", ours)):
        (result,) = hisvd.evaluate(folder, [dataset], settings)["perplexity"].values()
        perplexities[name] = result["perplexity"]

    passes = taken["forward"] + taken["gradients"]
    ratios = {
        "forward pass with moments / bare forward pass": taken["forward"] / taken["bare forward"],
        "gradient pass / bare forward pass": taken["gradients"] / taken["bare forward"],
        "decompositions / calibration": taken["decompositions"] / (passes + taken["decompositions"]),
        "textbook / --whitening input, time": taken["textbook"] / taken["ours"],
        "textbook / --whitening input, perplexity": perplexities["textbook"] / perplexities["ours"],
        "six budgets / one": taken["six budgets"] / taken["default, one budget"],
    }
    write_json(json_path, {"ratios": ratios, "seconds": taken, "perplexities": perplexities})
    click.echo(table(["what", "ratio"], [[name, f"{value:.3f}"] for name, value in ratios.items()]))


if __name__ == "__main__":
    main()
