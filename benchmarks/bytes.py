"""Perplexity against the size of the weight files: 16 bits, torchao's int8 and int4, and ours at the same sizes.

    python benchmarks/bytes.py --model_path models/smollm2-135m --calibration_text wikitext2-validation.txt \
        --datasets wikitext2-test.txt,ptb-test.txt,c4-validation.json --work_dir results/bytes

Needs `pip install -e .[benchmarks,quant]`. All methods change the decoder's linears alone; the rest stays in 16 bits.
torchao rounds weights to nearest, in int8 with a scale per row, in int4 with one per 32 columns. A run that is
started again reuses the cache, the models and the figures that it finds in the work folder.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from common import Texts, compressed, file_name, with_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from hisvd import CompressionSettings
from hisvd.cli.common import program
from hisvd.integer_codes import INTEGERS
from hisvd.shape_utils import PLAIN_BYTES, matrix_bytes
from hisvd.tables import table
from hisvd.utils.files import write_json
from hisvd.utils.model_utils import open_checkpoint

BYTES = [0.4, 0.35, 0.25, 0.2]  # shares of the linears' bytes in 16 bits, besides those of int8 and int4
UPDATES = {"HiSVD --target_bytes, one shot": "none", "HiSVD --target_bytes": "sequential"}


def write_rounded(model_path: str, linears: list[str], dtype: str, folder: Path) -> None:
    """Write the model with its linears rounded by torchao, as plain weights of the same values."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(INTEGERS["int4"].group))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    quantize_(model, int4 if dtype == "int4" else Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in linears)
    for name in linears:
        linear = model.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight.dequantize())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)


class Row(NamedTuple):
    """A model: its name, the bytes of its weight files, and its perplexities by data set."""

    name: str
    size: int
    perplexities: dict[str, float]


def plot(rows: list[Row], path: Path) -> None:
    """One panel per data set: perplexity (log scale) against megabytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    datasets = list(rows[0].perplexities)
    figure, axes = pyplot.subplots(1, len(datasets), figsize=(5 * len(datasets), 4.5), squeeze=False)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for name in dict.fromkeys(row.name for row in rows):
            points = [(row.size / 1e6, row.perplexities[dataset]) for row in rows if row.name == name]
            axis.plot(*zip(*points, strict=True), "o-" if len(points) > 1 else "s", label=name)
        axis.set(yscale="log", title=Path(dataset).stem, xlabel="weight files, MB", ylabel="perplexity")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command()
@with_texts("results/bytes")
@program
def main(**options: Any) -> None:
    """Calibrate once, store the model in several sizes, evaluate, and draw."""
    texts = Texts(**options)
    cache, model_path, work_dir = texts.calibrated(), texts.model_path, texts.work_dir
    linears, in_16_bits = [s.name for s in cache.sublayers], PLAIN_BYTES * sum(s.size for s in cache.sublayers)
    whole = weight_bytes(model_path)
    rows = [Row("16 bits", whole, *texts.evaluated([model_path], "dense.json"))]
    targets = list(BYTES)
    for dtype in INTEGERS:
        folder = work_dir / f"torchao_{dtype}"
        figures = f"{folder.name}.json"
        if not (work_dir / figures).exists():
            write_rounded(model_path, linears, dtype, folder)
        stored = sum(matrix_bytes(*s.shape, dtype) for s in cache.sublayers)
        targets.append(round(stored / in_16_bits, 4))
        rows.append(
            Row(f"torchao {dtype}, to nearest", whole - in_16_bits + stored, *texts.evaluated([folder], figures))
        )
        shutil.rmtree(folder, ignore_errors=True)
    for name, update in UPDATES.items():
        settings = CompressionSettings(budget="bytes", update=update)
        models = compressed(model_path, cache, work_dir / file_name(name), sorted(targets, reverse=True), settings)
        perplexities = texts.evaluated(models, f"{file_name(name)}.json")
        rows += [Row(name, weight_bytes(model), found) for model, found in zip(models, perplexities, strict=True)]
    titles = ["linears", "MB", *(Path(dataset).stem for dataset in texts.names)]
    cells = [[row.name, f"{row.size / 1e6:.1f}", *(f"{p:.2f}" for p in row.perplexities.values())] for row in rows]
    click.echo(table(titles, cells))
    write_json(work_dir / "bytes.json", [row._asdict() for row in rows])
    plot(rows, work_dir / "bytes.png")


def weight_bytes(model: str | Path) -> int:
    """The bytes of a model's weight files."""
    return open_checkpoint(str(model), compressed_too=True).count_bytes()


if __name__ == "__main__":
    main()
