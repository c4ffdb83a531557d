"""Speed and memory of models, measured for several of them side by side."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from hisvd.errors import HiSVDError
from hisvd.utils.load_utils import load
from hisvd.utils.memory import release_freed_memory
from hisvd.utils.model_utils import positions_of, resolve_dtype
from hisvd.utils.progress import progress_bar

PROMPT_TOKENS = 512  # unless --seqlen says otherwise
BATCH = 8
DECODED_TOKENS = {1: 32, BATCH: 8}  # by batch size: how far each prompt is continued while that is timed
ROUNDS = 3
MEASURE_PEAKS = (
    "import json, sys; from hisvd.utils.speed_utils import own_peaks; print(json.dumps(own_peaks(*sys.argv[1:])))"
)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call."""
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of `repeats` calls after one warm-up."""
    return statistics.median([seconds(function, device) for _ in range(repeats + 1)][1:])


def rows_of(prompt: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the BATCH equal parts (count, tokens / BATCH, at least 1) of a prompt (1, tokens)."""
    length = max(1, prompt.shape[1] // BATCH)
    return prompt.repeat(1, BATCH)[:, : BATCH * length].view(BATCH, length)[:count]


def generate(model: PreTrainedModel, prompts: torch.Tensor, count: int) -> None:
    """Continue `prompts` (batch, tokens) by `count` tokens each, greedily and with the KV cache."""
    model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare what causal models have
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )


def prefill_rate(model: PreTrainedModel, prompt: torch.Tensor, batch: int) -> float:
    """Tokens per second of one forward over a prompt (1, tokens), or over its parts as a batch, without the head."""
    ids = prompt if batch == 1 else rows_of(prompt, batch)
    return ids.numel() / seconds(lambda: model.get_decoder()(input_ids=ids, use_cache=False), model.device)


def decode_rate(model: PreTrainedModel, prompt: torch.Tensor, batch: int) -> float:
    """New tokens per second of a batch, after its first ones: what generating DECODED_TOKENS more adds."""
    ids, count = rows_of(prompt, batch), DECODED_TOKENS[batch]
    first = seconds(lambda: generate(model, ids, 1), model.device)
    all_of_them = seconds(lambda: generate(model, ids, 1 + count), model.device)
    return batch * count / (all_of_them - first)


def first_token_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Seconds until the first token after a prompt (1, tokens): forward with KV cache, head, choice of the token."""
    return seconds(lambda: generate(model, prompt, 1), model.device)


# Keyed like the figures of a model: each is measured on the model and a prompt (1, tokens).
TIMED: dict[str, Callable[[PreTrainedModel, torch.Tensor], float]] = {
    "prefill_tokens_per_s": partial(prefill_rate, batch=1),
    "prefill_tokens_per_s_batch_8": partial(prefill_rate, batch=BATCH),
    "decode_tokens_per_s": partial(decode_rate, batch=1),
    "decode_tokens_per_s_batch_8": partial(decode_rate, batch=BATCH),
    "time_to_first_token_s": first_token_seconds,
}


@torch.inference_mode()
def run_once(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    """Prefill and decode a little at both batch sizes: what warms up, and what the peak of running is measured on."""
    limit = positions_of(model.config)
    for ids in (prompt, rows_of(prompt, BATCH)):
        # The second new token takes a position after the prompt, where there may be none.
        generate(model, ids, 2 if limit is None or ids.shape[1] < limit else 1)


@torch.inference_mode()
def timed_in_turns(models: Sequence[PreTrainedModel], prompts: Sequence[torch.Tensor]) -> list[dict[str, list[float]]]:
    """Every figure in TIMED by round, for each of the models and its prompt (1, tokens).

    For each figure the models take turns, so that a change in the machine's load reaches all of them.
    """
    for model, prompt in zip(models, prompts, strict=True):
        run_once(model, prompt)
    rounds: list[dict[str, list[float]]] = [{name: [] for name in TIMED} for _ in models]
    for _ in progress_bar(range(ROUNDS), "timing", leave=False):
        for name, measure in TIMED.items():
            for model, prompt, figures in zip(models, prompts, rounds, strict=True):
                figures[name].append(measure(model, prompt))
    return rounds


def compared(own: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> dict[str, float]:
    """Ratios of the figures in TIMED, the median over the rounds' ratios; above 1, `own` is faster than `reference`."""
    ratios = {}
    for name in TIMED:
        quotients = [mine / other for mine, other in zip(own[name], reference[name], strict=True)]
        ratio = statistics.median(quotients)
        ratios[name] = 1 / ratio if name == "time_to_first_token_s" else ratio
    return ratios


def counts_allocations(device: torch.device) -> bool:
    """Whether PyTorch counts what it allocates on `device` (CUDA, ROCm and XPU; not MPS, and not the CPU)."""
    return hasattr(torch.get_device_module(device), "max_memory_allocated")


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew (on the CPU only where the system allows it: Linux)."""
    if counts_allocations(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's peak allocation, or the process's peak resident set."""
    if counts_allocations(device):
        return torch.get_device_module(device).max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_peaks(
    load_model: Callable[[], PreTrainedModel], prompt: torch.Tensor, device: torch.device
) -> tuple[PreTrainedModel, dict[str, int]]:
    """A model, and the bytes that this process takes for it at the peaks of loading and of running.

    On the CPU this is right only in a process that has done nothing else: freed memory is used again unseen.
    """

    def peak() -> int:
        reached = peak_memory(device) - before
        gc.collect()
        release_freed_memory()
        reset_peak_memory(device)
        return reached

    before = 0
    peak()
    before = peak_memory(device)  # just reset, it is what is in use
    model = load_model()
    loading = peak()
    run_once(model, prompt.to(device))
    return model, {"loading_peak_bytes": loading, "running_peak_bytes": peak()}


def own_peaks(path: str, dtype: str) -> dict[str, int]:
    """`memory_peaks` of the model at `path` on the CPU, for the ids on standard input; see peaks_on_cpu."""
    device, prompt = torch.device("cpu"), torch.tensor([json.load(sys.stdin)])
    return memory_peaks(lambda: load(path, resolve_dtype(dtype, device, None)), prompt, device)[1]


def peaks_on_cpu(path: str, dtype: str, prompt: torch.Tensor) -> dict[str, int]:
    """`memory_peaks` of the model at `path` in a new process, for a prompt (1, tokens).

    Raises:
        HiSVDError: the process failed.
    """
    command = [sys.executable, "-c", MEASURE_PEAKS, path, dtype]
    child = subprocess.run(command, input=json.dumps(prompt[0].tolist()), capture_output=True, text=True)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
        raise HiSVDError(f"The process that measures the memory of {path} failed ({reason}); leave out --speed.")
    return json.loads(child.stdout.splitlines()[-1])
