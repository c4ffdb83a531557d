"""Speed in vLLM on the CPU: new tokens per second of one stream and of several, compressed models beside the original.

    bash scripts/test_vllm.sh --collect-only   # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/serving.py --model_path ORIGINAL --model_path COMPRESSED

Each model runs in a process of its own. They take turns, so that a change in the machine's load reaches all of them.
"""

import os
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import click

from hisvd.utils.files import write_json

PROMPT_TOKENS, NEW_TOKENS = 16, 64
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def serve(model: str, dtype: str, connection: Connection) -> None:
    """Answer every number of streams sent through `connection` by the seconds that NEW_TOKENS of each take."""
    os.environ.update(ENVIRONMENT)
    import vllm

    engine = vllm.LLM(model, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=64)
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    connection.send("ready")
    while (streams := connection.recv()) is not None:
        # Prompts that differ from the first token on, in every call: nothing comes from the prefix cache.
        first = time.time_ns() % 200
        prompts = [{"prompt_token_ids": [first + i % 50, *range(3, 2 + PROMPT_TOKENS)]} for i in range(streams)]
        start = time.perf_counter()
        engine.generate(prompts, settings, use_tqdm=False)
        connection.send(time.perf_counter() - start)


def seconds_of(models: list[str], dtype: str, streams: list[int], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of every round by model and number of streams; a first round that is not counted warms up."""
    context = get_context("spawn")
    connections = {}
    for model in models:
        connections[model], other = context.Pipe()
        context.Process(target=serve, args=(model, dtype, other), daemon=True).start()
        other.close()
        connections[model].recv()
    seconds: dict[tuple[str, int], list[float]] = {(model, count): [] for model in models for count in streams}
    for turn in range(rounds + 1):
        for count in streams:
            for model, connection in connections.items():
                connection.send(count)
                taken = connection.recv()
                if turn:
                    seconds[model, count].append(taken)
    for connection in connections.values():
        connection.send(None)
    return seconds


@click.command()
@click.option("--model_path", "models", multiple=True, required=True, help="The original first; repeatable.")
@click.option("--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], show_default=True)
@click.option("--streams", multiple=True, default=[1, 16], show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/serving.json")
def main(
    models: tuple[str, ...], dtypes: tuple[str, ...], streams: tuple[int, ...], rounds: int, json_path: Path
) -> None:
    """Print tokens per second (medians), and the ratio to the original: the median over the rounds' ratios."""
    rows = []
    for dtype in dtypes:
        seconds = seconds_of(list(models), dtype, list(streams), rounds)
        for (model, count), taken in seconds.items():
            rate = NEW_TOKENS * count / median(taken)
            ratio = median(dense / own for dense, own in zip(seconds[models[0], count], taken, strict=True))
            rows.append({"model": model, "dtype": dtype, "streams": count, "tokens_per_s": rate, "ratio": ratio})
            click.echo(f"{model}, {dtype}, {count} streams: {rate:.1f} tokens/s, {ratio:.2f} x")
    write_json(json_path, rows)


if __name__ == "__main__":
    main()
