"""Speed of compressed models beside the original, in transformers: prefill of 512 tokens and decoding of one.

    python benchmarks/inference.py --model_path ORIGINAL --model_path COMPRESSED [--model_path …]

Measured with the whole model; and with the decoder layers alone of a random-weight Llama of another shape, whose MLPs
and linears keep the same shares as those of COMPRESSED at the same depth. Models take turns, so that a change in the
machine's load reaches all of them. The limit is how many times fewer parameters are read: in prefill those of the
linears, in decoding those of the head too.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
from large_model import SHAPES
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hisvd
from hisvd.component.conv1d import linear_shape
from hisvd.component.low_rank import swap_linears
from hisvd.shape_utils import largest_rank, stored_parameters
from hisvd.tables import table
from hisvd.utils.eval_utils import linear_parameters
from hisvd.utils.files import write_json
from hisvd.utils.speed_utils import seconds

PROMPT_TOKENS = 512
ROUNDS = {"prefill": 5, "decode": 31}


def steps_of(model: PreTrainedModel, whole: bool) -> dict[str, Callable[[], object]]:
    """What is timed: the prompt, and one token after it; with the head (on one position) if `whole`."""
    ids = torch.arange(PROMPT_TOKENS)[None] % model.config.vocab_size
    run = model if whole else model.get_decoder()
    options = {"logits_to_keep": 1} if whole else {}
    cache = run(input_ids=ids, use_cache=True, **options).past_key_values

    def decode() -> None:
        run(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **options)
        cache.crop(-1)  # the prompt alone is left

    return {"prefill": lambda: run(input_ids=ids, use_cache=False, **options), "decode": decode}


@torch.inference_mode()
def ratios(models: dict[str, PreTrainedModel], whole: bool) -> list[dict]:
    """By model and step: milliseconds (medians), and how many times faster than the first model (median of rounds)."""
    steps = {name: steps_of(model, whole) for name, model in models.items()}
    first = next(iter(models))
    head = sum(p.numel() for p in models[first].get_output_embeddings().parameters()) if whole else 0
    read = {name: linear_parameters(model)[0] for name, model in models.items()}
    rows = []
    for step, rounds in ROUNDS.items():
        taken_by: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds + 1):
            for name in models:
                taken_by[name].append(seconds(steps[name][step], models[name].device))
        for name, taken in taken_by.items():
            faster = median(dense / own for dense, own in zip(taken_by[first][1:], taken[1:], strict=True))
            besides = head if step == "decode" else 0
            limit = (read[first] + besides) / (read[name] + besides)
            rows.append({"model": name, "step": step, "ms": 1e3 * median(taken[1:]), "ratio": faster, "limit": limit})
    return rows


def scaled_table(modules: dict[str, dict], original: PreTrainedModel, model: PreTrainedModel) -> dict[str, dict]:
    """The table for swap_linears that gives `model` the widths and parameter shares which `modules` give `original`."""
    scaled, source = {}, original.config
    kept = model.config.intermediate_size / source.intermediate_size
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or ".layers." not in name:
            continue
        prefix, _, rest = name.partition(".layers.")
        index, _, path = rest.partition(".")
        depth = int(index) * source.num_hidden_layers // model.config.num_hidden_layers
        source_name = f"{prefix}.layers.{depth}.{path}"
        entry = modules.get(source_name, {})
        new = {side: round(entry[side] * kept) for side in ("in", "out") if side in entry}
        if "rank" in entry:
            (m, n), shape = (linear_shape(part) for part in (original.get_submodule(source_name), linear))
            old = (entry.get("out", m), entry.get("in", n))
            shape = (new.get("out", shape[0]), new.get("in", shape[1]))
            share = stored_parameters(entry["rank"], old, entry["form"]) / math.prod(old)
            new["rank"] = largest_rank(share * math.prod(shape), shape, entry["form"])
        if new:
            scaled[name] = {"form": entry["form"]} | new
    return scaled


def random_model(config: LlamaConfig, original: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """A random-weight Llama with the shares of `source`, which is `original` or what it has been compressed to."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=original.dtype)
    if source is not original:
        swap_linears(model, scaled_table(source.config.quantization_config.modules, original, model))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("permutation"):
                buffer.copy_(torch.randperm(len(buffer)))
    return model.eval()


@click.command()
@click.option("--model_path", "paths", multiple=True, required=True, help="The original first; repeatable.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tinyllama", show_default=True)
@click.option("--layers", default=4, show_default=True, help="Of the random-weight model; 0: none")
@click.option("--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/inference.json")
def main(paths: tuple[str, ...], shape: str, layers: int, dtypes: tuple[str, ...], json_path: Path) -> None:
    """Print the table, and write it to the JSON file."""
    rows = []
    for name in dtypes:
        dtype = getattr(torch, name)
        loaded = {path: hisvd.load(path, dtype) for path in paths}
        found = [{"what": "whole", **row} for row in ratios(loaded, whole=True)]
        if layers:
            config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": layers})
            models = {path: random_model(config, loaded[paths[0]], model) for path, model in loaded.items()}
            found += [{"what": f"{layers} layers of {shape}", **row} for row in ratios(models, whole=False)]
        rows += [{"dtype": name, **row} for row in found]
    write_json(json_path, rows)
    cells = [
        [r["dtype"], r["what"], r["model"], r["step"], f"{r['ms']:.1f}", f"{r['ratio']:.2f} x", f"{r['limit']:.2f}"]
        for r in rows
    ]
    click.echo(table(["dtype", "what", "model", "step", "ms", "speed", "limit"], cells))


if __name__ == "__main__":
    main()
