"""Speed and memory of the INT6 format on one large random linear, its products beside those of a dense one.

    python benchmarks/int6_speed.py

Rates are medians; on the CPU in float32, elsewhere in bfloat16.
"""

from pathlib import Path

import click
import torch
from torch import nn

from hisvd.component.int6_linear import FEW_TOKENS, INT6SparseLinear
from hisvd.sparse_int6 import pack_weight
from hisvd.utils.files import write_json
from hisvd.utils.model_utils import resolve_device
from hisvd.utils.speed_utils import median_seconds, peak_memory, reset_peak_memory


def extra_peak(module: INT6SparseLinear, x: torch.Tensor) -> int:
    """Bytes that a product adds to the peak, its output aside."""
    reset_peak_memory(x.device)
    before = peak_memory(x.device)
    output = module(x)
    return peak_memory(x.device) - before - output.nbytes


@click.command()
@click.option("--rows", default=4096, show_default=True)
@click.option("--columns", default=11008, show_default=True)
@click.option("--many", default=512, show_default=True, help="Tokens of the larger product; the other has one.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/int6_speed.json")
@torch.inference_mode()
def main(rows: int, columns: int, many: int, device: str, json_path: Path) -> None:
    """Print rates, the time of a product relative to a dense linear's, and what the product adds to peak memory."""
    where = resolve_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    tokens = {count: torch.ones(count, columns, dtype=dtype, device=where) for count in (many, 1)}
    # Memory first: what is allocated and freed before could be used again unseen. Code is loaded when first run.
    INT6SparseLinear(columns, 8, bias=False).to(where)(tokens[many])
    module = INT6SparseLinear(columns, rows, bias=False).to(where)
    extra = {count: extra_peak(module, x) for count, x in tokens.items() if count > FEW_TOKENS}

    dense = nn.Linear(columns, rows, bias=False, dtype=dtype, device=where)
    module = INT6SparseLinear.from_dense(dense)
    packing = median_seconds(lambda: pack_weight(dense.weight), where, 3)
    dequantizing = median_seconds(lambda: module.dequantize_weight(dtype), where, 5)
    figures = {
        "packing_weights_per_s": rows * columns / packing,
        "dequantizing_weights_per_s": rows * columns / dequantizing,
        "extra_peak_bytes": extra,
        "time_relative_to_dense": {
            count: median_seconds(lambda x=x: module(x), where, 5) / median_seconds(lambda x=x: dense(x), where, 5)
            for count, x in tokens.items()
        },
    }
    write_json(json_path, figures)
    click.echo(f"packing: {figures['packing_weights_per_s'] / 1e6:.0f} M weights/s (plain rule)")
    click.echo(f"dequantizing: {figures['dequantizing_weights_per_s'] / 1e6:.0f} M weights/s")
    for count, relative in figures["time_relative_to_dense"].items():
        memory = f", {extra[count] / 2**20:.1f} MiB more at the peak" if count in extra else ""
        click.echo(f"product of {count} tokens: {relative:.2f} x the time of a dense linear{memory}")


if __name__ == "__main__":
    main()
