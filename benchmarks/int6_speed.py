"""Speed and memory of the INT6 format on one large linear: packing, dequantizing, and products beside a dense linear.

python benchmarks/int6_speed.py
"""

import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn

from hisvd.cli.common import table
from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.int6_fit import int6_tensors
from hisvd.sparse_int6 import dequantize
from hisvd.utils.eval_utils import peak_memory, reset_peak_memory
from hisvd.utils.files import write_json
from hisvd.utils.model_utils import resolve_device


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of several runs behind one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


@click.command()
@click.option("--rows", default=4096, show_default=True)
@click.option("--columns", default=11008, show_default=True)
@click.option("--tokens", default="1,4,16,512", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/int6_speed.json")
@torch.inference_mode()
def main(rows: int, columns: int, tokens: str, device: str, json_path: Path) -> None:
    """Print rates, the time of a product relative to a dense linear's, and what the product adds to peak memory."""
    where = resolve_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    dense = nn.Linear(columns, rows, bias=False, dtype=dtype, device=where)
    code = int6_tensors(dense.weight)
    module = INT6SparseLinear.from_dense(dense.weight)
    figures = {
        "weights": rows * columns,
        "packing_weights_per_s": rows * columns / seconds(lambda: int6_tensors(dense.weight), where, 1),
        "dequantizing_weights_per_s": rows
        * columns
        / seconds(lambda: dequantize(**code, in_features=columns, dtype=dtype), where),
        "products": {},
    }
    for count in map(int, tokens.split(",")):
        x = torch.randn(count, columns, dtype=dtype, device=where)
        module(x)
        reset_peak_memory(where)
        before = peak_memory(where)
        output = module(x)
        extra = peak_memory(where) - before - output.nbytes
        relative = seconds(lambda x=x: module(x), where) / seconds(lambda x=x: dense(x), where)
        figures["products"][count] = {"time_relative_to_dense": relative, "extra_peak_bytes": extra}
    write_json(json_path, figures)
    for kind in ("packing", "dequantizing"):
        click.echo(f"{kind}: {figures[f'{kind}_weights_per_s'] / 1e6:.0f} M weights/s")
    products = figures["products"].items()
    rows = [[n, f"{f['time_relative_to_dense']:.2f}", f"{f['extra_peak_bytes'] / 2**20:.1f}"] for n, f in products]
    click.echo(table(["tokens", "time / dense", "extra MiB"], rows))


if __name__ == "__main__":
    main()
