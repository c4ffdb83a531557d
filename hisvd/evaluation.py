"""Evaluate models: perplexity, and on request speed and memory. evaluate.py stands on this."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from hisvd.component.hf_quantizer import METHOD
from hisvd.errors import HiSVDError, in_units, naming
from hisvd.settings import EvaluationSettings, Resources
from hisvd.utils import distributed
from hisvd.utils.checksums import verify_weights
from hisvd.utils.data_utils import (
    EVALUATION_SPLIT,
    Document,
    check_vocabulary,
    default_batch_size,
    evaluation_windows,
    join_documents,
    leading_bos,
    load_documents,
    tokenize,
)
from hisvd.utils.eval_utils import (
    DEFAULT_SEQLEN,
    free_memory,
    linear_parameters,
    perplexity,
    streamed_perplexity,
    weight_file_bytes,
    window_length,
)
from hisvd.utils.files import make_folder
from hisvd.utils.load_utils import bytes_in_memory, check_tensors, config_of, load, tokenizer_of
from hisvd.utils.model_folders import local_folder
from hisvd.utils.model_utils import open_checkpoint, quant_method, resolve_device, resolve_dtype, stored_dtype
from hisvd.utils.progress import progress_shown
from hisvd.utils.sample_utils import continuations
from hisvd.utils.save_utils import PREDICTED, saved_report
from hisvd.utils.speed_utils import (
    PROMPT_TOKENS,
    compared,
    counts_allocations,
    memory_peaks,
    peaks_on_cpu,
    timed_in_turns,
)
from hisvd.utils.streaming import StreamedModel
from hisvd.utils.task_utils import load_tasks, task_figures

Texts = dict[str, list[Document]]  # data set → its documents


def evaluate(
    model: str | Path,
    datasets: Sequence[str],
    settings: EvaluationSettings = EvaluationSettings(),
    resources: Resources = Resources(),
) -> dict:
    """Measure a model's perplexity on each data set, its size, and on request its speed and scores on tasks.

    The text is tokenized at once and cut into windows that do not overlap; the perplexity is the exponential of the
    mean next-token cross-entropy, in float32. Under torchrun the processes share the windows.

    Args:
        model: A folder or .pt file of `hisvd.compress`, another Hugging Face model folder, or a Hub id.
        datasets: Names ("wikitext2", "ptb", "c4", "python-docs") or paths of .txt, .json or .jsonl files; may be empty
            with settings.tasks.
        settings: Windows, protocol, compute dtype, and what else is measured; `hisvd.EvaluationSettings` lists them.
        resources: The device, and whether progress bars are shown.

    Returns:
        A dict:
        "model", "device", "dtype", "protocol": what was measured, where and how.
        "source_model": what a compressed model was made from; None for others.
        "linear_numbers_stored", "linear_numbers_dense": parameters of the decoder layers' linear weights, now and
            before compression; "linear_kept": their ratio.
        "weight_file_bytes": size of the files with the weights.
        "seqlen": tokens per window.
        "documents": by data set, how many documents were read.
        "perplexity": by data set, a dict with "perplexity", "nll" (mean cross-entropy, in nats per token) and
            "tokens_scored".
        "speed", with settings.speed: what `compared_speeds` says of the model.
        "tasks", with settings.tasks: by task, a dict with its metrics ("acc", "acc_stderr" …), "samples" and "shots";
            the members of a group also have "subtask_of".
        "samples", with settings.prompts: a list of dicts with "prompt" and "continuation".
        "predicted_loss", of compressed models: by how much compression was predicted to raise the mean loss on the
            calibration text, in nats per token, if hisvd.json says so.

    Raises:
        HiSVDError: a model, text or task cannot be read; weights are missing, left over or, with settings.verify,
            damaged; windows are longer than the model's positions or the text; the memory is too small; or a
            perplexity is not finite.

    Example:
        >>> import hisvd
        >>> figures = hisvd.evaluate("models/small_80p", ["wikitext2"], hisvd.EvaluationSettings(nsamples=4))
        >>> figures["perplexity"]["wikitext2"]["perplexity"] > 1
        True
    """
    texts = load_texts(datasets, settings)
    result = evaluate_texts(model, texts, settings, resources)
    if settings.speed:
        (result["speed"],) = compared_speeds([model], texts, settings, resources)
    return result


def load_texts(datasets: Sequence[str], settings: EvaluationSettings) -> Texts:
    """The documents of each data set's evaluation split, or of each file.

    Raises:
        HiSVDError: no data set is given where one is needed, or one cannot be read.
    """
    if not datasets and (settings.speed or not settings.tasks):
        raise HiSVDError(f"--datasets is empty; give text files, or some of {', '.join(EVALUATION_SPLIT)}.")
    return {name: load_documents(name, EVALUATION_SPLIT, settings.data_dir) for name in datasets}


def evaluate_texts(model: str | Path, texts: Texts, settings: EvaluationSettings, resources: Resources) -> dict:
    """`evaluate` on texts that are already loaded, once for several models; without speed."""
    name = os.fspath(model)
    with progress_shown(resources.progress), exhaustion_explained(name, settings.offload_folder):
        if settings.tasks:
            check_tasks(settings.tasks)
        path = weights_at(name)
        report = checked_report(path, settings)
        device = resolve_device(resources.device)
        tokens = tokens_for(path, texts, settings, DEFAULT_SEQLEN)
        windows = {
            name: evaluation_windows(ids, tokens.seqlen, settings.nsamples, name, tokens.bos)
            for name, ids in tokens.ids.items()
        }
        measured: dict[str, Any] = {}
        loaded: PreTrainedModel | StreamedModel
        if settings.offload_folder:
            loaded = streamed_model(path, device, settings.dtype, tokens.seqlen)
            stored, dense = linear_parameters(loaded.skeleton)
            make_folder(Path(settings.offload_folder))
            with tempfile.TemporaryDirectory(dir=settings.offload_folder) as folder, naming(path):
                ppl = {name: streamed_perplexity(loaded, w, name, Path(folder)) for name, w in windows.items()}
        else:
            loaded = whole_model(path, device, settings.dtype)
            stored, dense = linear_parameters(loaded)
            with naming(path):
                ppl = {name: perplexity(loaded, w, name) for name, w in windows.items()}
            if settings.tasks:
                measured["tasks"] = task_figures(loaded, tokenizer_of(path), settings.tasks, settings.task_limit)
            if settings.prompts:
                measured["samples"] = continuations(loaded, tokenizer_of(path), settings.prompts, path)
        if report:  # without its removed neurons a model no longer shows how large it was
            dense = report["linear_numbers_before"]
            if PREDICTED in report:
                measured[PREDICTED] = report[PREDICTED]["total"]
        return {
            "model": name,
            "source_model": report.get("source_model", "unknown") if report else None,
            "linear_numbers_stored": stored,
            "linear_numbers_dense": dense,
            "linear_kept": stored / dense,
            "weight_file_bytes": weight_file_bytes(Path(path)),
            "seqlen": tokens.seqlen,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype),
            "protocol": settings.protocol,
            "documents": {name: len(documents) for name, documents in texts.items()},
            "perplexity": ppl,
            **measured,
        }


def compared_speeds(
    models: Sequence[str | Path], texts: Texts, settings: EvaluationSettings, resources: Resources
) -> list[dict]:
    """Speed and memory of several models, beside those of a reference: `settings.reference`, or one of the models.

    That is the first that is not compressed, else the first. Models take turns where memory holds all of them at once.

    Returns:
        A dict for each model. Batches of 8 are the prompt's eighths, and decoding continues one or all of these.
        "prompt_tokens": length of the model's prompt, from the first text.
        "prefill_tokens_per_s", "decode_tokens_per_s", the same with "_batch_8", "time_to_first_token_s": medians.
        "loading_peak_bytes", "running_peak_bytes", and the larger one as "peak_memory_bytes": what the model takes at
            most while it is loaded, and while it runs; absent where PyTorch does not count them (MPS).
        "took_turns": whether the models did.
        For all but the reference, "reference": its name as "model", and its figures; "ratios": by figure. Of speeds and
            of the time to the first token, they are above 1 where the model is faster than the reference; of
            memory, below 1 where it takes less.

    Raises:
        HiSVDError: a model cannot be read or loaded, or the memory is too small.
    """
    names = [os.fspath(model) for model in models]
    if settings.reference and os.fspath(settings.reference) not in names:
        names.insert(0, os.fspath(settings.reference))
    with progress_shown(resources.progress), exhaustion_explained(" or ".join(names), None):
        device, paths = resolve_device(resources.device), list(map(weights_at, names))
        if len(paths) > len(models):  # the rows have been checked
            checked_report(paths[0], settings)
        prompts = [prompt_for(path, texts, settings) for path in paths]
        compute = resolve_dtype(settings.dtype, device, None)
        needed = [bytes_in_memory(Path(path), compute) for path in paths]
        together = sum(needed) + max(needed) <= free_memory(device)  # the spare one is for loading and running
        rounds: list[dict[str, list[float]]] = []
        speeds: list[dict] = []
        for group in [range(len(paths))] if together else [[i] for i in range(len(paths))]:
            chosen = [(paths[i], prompts[i]) for i in group]
            measured = speeds_of_group(chosen, device, settings.dtype)
            for (_, prompt), (timed, peaks) in zip(chosen, measured, strict=True):
                rounds.append(timed)
                speeds.append({"prompt_tokens": prompt.shape[1], "took_turns": together and len(names) > 1})
                speeds[-1] |= {name: median(values) for name, values in timed.items()} | peaks
    if settings.reference:
        first = names.index(os.fspath(settings.reference))
    else:
        first = next((i for i, path in enumerate(paths) if saved_report(Path(path)) is None), 0)
    reference: dict = {"model": names[first], **speeds[first]}
    for i, figures in enumerate(speeds):
        if i != first:
            memory = {name: figures[name] / reference[name] for name in reference if name.endswith("_bytes")}
            figures |= {"reference": reference, "ratios": compared(rounds[i], rounds[first]) | memory}
    return speeds[-len(models) :]


def speeds_of_group(
    models: Sequence[tuple[str, torch.Tensor]], device: torch.device, dtype: str
) -> list[tuple[dict[str, list[float]], dict[str, int]]]:
    """(figures by round, peaks of memory) of models in memory at once, each a path and a prompt (1, tokens)."""
    if counts_allocations(device):
        measured = [memory_peaks(partial(whole_model, path, device, dtype), ids, device) for path, ids in models]
        loaded, peaks = [model for model, _ in measured], [found for _, found in measured]
    else:
        peaks = [peaks_on_cpu(path, dtype, ids) if device.type == "cpu" else {} for path, ids in models]
        loaded = [whole_model(path, device, dtype) for path, _ in models]
    highest = [{"peak_memory_bytes": max(found.values())} if found else {} for found in peaks]
    timed = timed_in_turns(loaded, [ids.to(device) for _, ids in models])
    return [(rounds, found | most) for rounds, found, most in zip(timed, peaks, highest, strict=True)]


def prompt_for(model: str, texts: Texts, settings: EvaluationSettings) -> torch.Tensor:
    """The start (1, tokens) of the first text: --seqlen tokens, or PROMPT_TOKENS, or as many as the model reads.

    Raises:
        HiSVDError: the text is shorter.
    """
    name, documents = next(iter(texts.items()))
    tokens = tokens_for(model, {name: documents}, settings, PROMPT_TOKENS)
    return evaluation_windows(tokens.ids[name], tokens.seqlen, 1, name, tokens.bos)


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Load the tasks before the model, so that nothing is computed in vain.

    Raises:
        HiSVDError: lm_eval is not installed, a task cannot be loaded, or there are several processes.
    """
    if distributed.count() > 1:
        raise HiSVDError("--tasks runs in one process; start evaluate.py without torchrun, or drop --tasks.")
    load_tasks(tasks)


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts as one model reads them: a row of ids (tokens,) per data set; windows of `seqlen` start with `bos`."""

    ids: dict[str, torch.Tensor]
    seqlen: int
    bos: int | None


def tokens_for(model: str, texts: Texts, settings: EvaluationSettings, default_seqlen: int) -> TokenizedTexts:
    """Tokenize all texts for a model.

    Raises:
        HiSVDError: its configuration or tokenizer cannot be read, or the windows are longer than it has positions.
    """
    config, tokenizer = config_of(model), tokenizer_of(model)
    seqlen, bos = window_length(config, settings.seqlen, default_seqlen, model), leading_bos(config, tokenizer)
    protocol = settings.protocol if bos is None else "default"  # otherwise the first window would have two
    ids = {name: tokenize(join_documents(texts[name], tokenizer), tokenizer, protocol) for name in texts}
    for found in ids.values():
        check_vocabulary(found, config, model)
    return TokenizedTexts(ids, seqlen, bos)


def weights_at(model: str) -> str:
    """The path of a model's local files: a folder (in the Hub's cache, for an id) or a `.pt`."""
    return model if Path(model).is_file() else os.fspath(local_folder(model))


def checked_report(model: str, settings: EvaluationSettings) -> dict | None:
    """The hisvd.json of a compressed model, whose weights are verified first where the settings say so; else None.

    Raises:
        HiSVDError: it is damaged, or does not match its checksums or has none.
    """
    report = saved_report(Path(model))
    if settings.verify and (report or Path(model).is_file() or quant_method(config_of(model)) == METHOD):
        verify_weights(Path(model))
    return report


def whole_model(model: str, device: torch.device, dtype: str) -> PreTrainedModel:
    """The model with all its weights on `device`.

    Raises:
        HiSVDError: it cannot be loaded, or exceeds the free memory of the device.
    """
    compute = resolve_dtype(dtype, device, None)
    needed, free = bytes_in_memory(Path(model), compute), free_memory(device)
    if needed > free:
        raise HiSVDError(
            f"{model} takes {in_units(needed)} of memory, but only {in_units(free)} are free on {device}; "
            f"{remedies(model)}."
        )
    # Not load().to(dtype): that would round the rotary frequencies, which from_pretrained keeps in float32.
    return load(model, compute, device)


def streamed_model(model: str, device: torch.device, dtype: str, seqlen: int) -> StreamedModel:
    """The model to be run with one decoder layer in memory at a time.

    Raises:
        HiSVDError: it is not a folder with safetensors, or its tensors are not those of its configuration.
    """
    checkpoint = open_checkpoint(model, compressed_too=True)
    stored = stored_dtype(checkpoint.config)
    compute = resolve_dtype(dtype, device, stored) or stored
    streamed = StreamedModel(checkpoint, default_batch_size(seqlen), device, compute)
    check_tensors(checkpoint, streamed.skeleton)
    return streamed


def remedies(model: str) -> str:
    """What to do about a model that does not fit into memory."""
    folder = "save it as a folder and use" if Path(model).is_file() else "use"
    return f"{folder} --offload_folder DIR (perplexity alone, one layer in memory), or --dtype bfloat16"


@contextmanager
def exhaustion_explained(model: str, offload_folder: str | Path | None) -> Iterator[None]:
    """Within the context, turn the accelerator's out-of-memory error into a sentence that names remedies.

    Raises:
        HiSVDError: it is exhausted.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        remedy = "lower --seqlen, or use --device cpu" if offload_folder else remedies(model)
        raise HiSVDError(f"The accelerator's memory is exhausted by {model}; {remedy}.") from None
