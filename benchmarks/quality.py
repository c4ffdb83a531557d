"""Perplexity against the share of linear weights kept, for every method side by side: tables, JSON and a plot.

    python benchmarks/quality.py --model_path models/smollm2-135m --calibration_text wikitext2-validation.txt \
        --datasets wikitext2-test.txt,ptb-test.txt,c4-validation.json --work_dir results/quality

Needs `pip install -e .[benchmarks]`. One model and one calibration set, the first nsamples x 512 tokens of its file;
every data set is evaluated on its first 16 x 512 tokens. Compressed models are deleted once evaluated; a run
that is started again reuses the cache, the models and the figures that it finds in the work folder.
"""

import shutil
from pathlib import Path
from typing import Any

import click
from common import Texts, compressed, file_name, one_shot, with_texts

from hisvd import CompressionSettings
from hisvd.cli.common import program
from hisvd.tables import table
from hisvd.utils.files import write_json

TARGETS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
METHODS = {
    "plain SVD": one_shot(whitening="none", allocation="uniform", factors="svd"),
    "input whitening, uniform, as SVD-LLM": one_shot(whitening="input", allocation="uniform", factors="svd"),
    "HiSVD Stage 1": one_shot(whitening="input", allocation="hisvd", lwe_strength=0),
    "HiSVD Stage 1 + 2": one_shot(whitening="input", allocation="hisvd"),
    "low rank alone": one_shot(moves="low_rank"),
    "neurons alone": one_shot(moves="neurons"),
    "both moves": one_shot(moves="both"),
    "both moves, refined": one_shot(refine="weights"),
    "HiSVD default (both moves, update)": CompressionSettings(),
    "plain (stock checkpoint, update)": CompressionSettings(export="plain"),
}


def plot(curves: dict[str, dict[float, dict[str, float]]], dense: dict[str, float], path: Path) -> None:
    """One panel per data set: perplexity (log scale, cut at 100 times dense) against the share of weights kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(dense), figsize=(5 * len(dense), 4.5), squeeze=False)
    for axis, (dataset, floor) in zip(axes[0], dense.items(), strict=True):
        for method, by_target in curves.items():
            axis.plot(list(by_target), [p[dataset] for p in by_target.values()], "o-", label=method)
        axis.axhline(floor, color="black", linestyle="--", label="dense")
        axis.set(yscale="log", ylim=(floor * 0.9, floor * 100), title=Path(dataset).stem)
        axis.set(xlabel="linear weights kept", ylabel="perplexity")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command()
@with_texts("results/quality")
@program
def main(**options: Any) -> None:
    """Calibrate once, compress by every method to every target, evaluate, and draw."""
    texts = Texts(**options)
    cache, work_dir = texts.calibrated(), texts.work_dir
    (dense,) = texts.evaluated([texts.model_path], "dense.json")
    curves = {}
    for method, settings in METHODS.items():
        figures = f"{file_name(method)}.json"
        models = []
        if not (work_dir / figures).exists():
            models = compressed(texts.model_path, cache, work_dir / file_name(method), TARGETS, settings)
        curves[method] = dict(zip(TARGETS, texts.evaluated(models, figures), strict=True))
        for path in models:
            shutil.rmtree(path)
    for dataset in dense:
        rows = [["dense", *[f"{dense[dataset]:.2f}"] * len(TARGETS)]]
        rows += [[method, *(f"{p[dataset]:.4g}" for p in by_target.values())] for method, by_target in curves.items()]
        click.echo(table([Path(dataset).name, *map(str, TARGETS)], rows) + "\n")
    write_json(work_dir / "quality.json", {"dense": dense, **curves})
    plot(curves, dense, work_dir / "quality.png")


if __name__ == "__main__":
    main()
