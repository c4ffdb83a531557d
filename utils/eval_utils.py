"""Perplexity and size of a loaded model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hisvd.component.conv1d import linear_shape
from hisvd.component.families import adapter_for
from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.component.low_rank import MODULE_OF_FORM
from hisvd.component.svd_generic import LINEARS
from hisvd.errors import HiSVDError
from hisvd.utils import distributed
from hisvd.utils.activation_files import ActivationPair
from hisvd.utils.load_utils import weight_files
from hisvd.utils.model_utils import positions_of
from hisvd.utils.progress import progress_bar
from hisvd.utils.streaming import Arguments, StreamedModel, decoder_layers, replaced_forwards

LOGITS_AT_ONCE = 2**25  # logits: 128 MiB in float32, whatever the vocabulary
DEFAULT_SEQLEN = 2048  # tokens per window


def window_length(config: PreTrainedConfig, seqlen: int | None, default: int, model: str) -> int:
    """Tokens per window: `seqlen`, or the default up to the positions of the model (named `model` in messages).

    Raises:
        HiSVDError: `seqlen` exceeds them.
    """
    limit = positions_of(config) or DEFAULT_SEQLEN
    length = seqlen or min(default, limit)
    if length > limit:
        raise HiSVDError(f"--seqlen {length} exceeds the {limit} positions of {model}; choose at most {limit}.")
    return length


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, name: str, tokens_per_batch: int = 4096) -> dict:
    """exp of the mean next-token cross-entropy over windows (count, seqlen), in float32.

    Every token of a window but its first is scored; several processes share the windows. Returns
    perplexity, nll and the number of scored tokens.

    Raises:
        HiSVDError: the loss is not a finite number.
    """
    total, mine = 0.0, distributed.share(windows)
    batches = mine.split(max(1, tokens_per_batch // windows.shape[1])) if len(mine) else ()
    for batch in progress_bar(batches, f"perplexity on {name}", leave=False):
        ids = batch.to(model.device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        total += summed_loss(hidden, ids, partial(head_logits, model), tokens_at_once(model))
    return _figures(total, mine[:, 1:].numel(), name)


def summed_loss(
    hidden: torch.Tensor, ids: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor], at_once: int
) -> float:
    """Σ of next-token losses in float32 over windows `ids` (b, seqlen), from hidden states (b, seqlen, hidden).

    `logits_of` maps (tokens, hidden) to (tokens, vocabulary); it is given `at_once` tokens at a time.
    """
    states, labels = hidden[:, :-1].flatten(0, 1).split(at_once), ids[:, 1:].flatten().split(at_once)
    return sum(
        nn.functional.cross_entropy(logits_of(part).float(), part_labels, reduction="sum").item()
        for part, part_labels in zip(states, labels, strict=True)
    )


def streamed_loss(
    streamed: StreamedModel,
    tokens: torch.Tensor,
    hidden: ActivationPair,
    arguments: list[list[Arguments]],
    layer_of: Callable[[int], nn.Module],
) -> float:
    """Σ of next-token losses in float32 over `tokens` (count, seqlen), with one decoder layer in memory at a time.

    `streamed.embed` has filled hidden[0] and given `arguments`.
    """
    for index, layer_arguments in enumerate(arguments):
        hidden[index + 1].write(streamed.outputs(layer_of(index), index, hidden[index], layer_arguments))
    at_once, batches = tokens_at_once(streamed.skeleton), tokens.split(streamed.batch_size)
    with torch.no_grad(), streamed.outside_weights():
        return sum(
            summed_loss(states, ids.to(states.device), streamed.logits, at_once)
            for states, ids in zip(streamed.read(hidden[len(arguments)]), batches, strict=True)
        )


def streamed_perplexity(streamed: StreamedModel, windows: torch.Tensor, name: str, folder: Path) -> dict:
    """What `perplexity` returns, with one decoder layer in memory at a time; hidden states go through `folder`.

    Raises:
        HiSVDError: a weight is missing, or a weight, an activation or the loss is not finite.
    """
    mine, total = distributed.share(windows), 0.0

    def layer_of(index: int) -> nn.Module:
        bar.update()
        return streamed.layer(index)

    layers = streamed.checkpoint.config.get_text_config().num_hidden_layers
    with progress_bar(None, f"perplexity on {name}", total=layers, leave=False) as bar:
        if len(mine):
            hidden = streamed.pair(folder / distributed.own_name("hidden"), mine)
            arguments = streamed.embed(mine, hidden[0])
            total = streamed_loss(streamed, mine, hidden, arguments, layer_of)
    return _figures(total, mine[:, 1:].numel(), name)


def _figures(total: float, scored: int, name: str) -> dict:
    """Perplexity, nll and the number of scored tokens, of all processes.

    Raises:
        HiSVDError: the loss is not a finite number, or its exponential is not.
    """
    total, scored = distributed.total(torch.tensor([total, scored], dtype=torch.float64)).tolist()
    nll = total / scored
    ppl = float(torch.tensor(nll, dtype=torch.float64).exp())
    if not math.isfinite(ppl):
        raise HiSVDError(
            f"The perplexity on {name} is {ppl} (mean loss {nll:g}), which measures nothing; check the model's "
            "weights, or use --dtype float32."
        )
    return {"perplexity": ppl, "nll": nll, "tokens_scored": int(scored)}


def tokens_at_once(model: PreTrainedModel) -> int:
    """Tokens whose logits are computed at once, which make at most LOGITS_AT_ONCE logits."""
    return max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)


@dataclass
class _HiddenStateAlone(BaseModelOutputWithPast):
    """A decoder's output; what some families return besides the hidden state, such as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        return None


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) of final hidden states (tokens, hidden), by the model's own head code.

    The model's forward runs with a decoder that returns `hidden`, so the family's own scaling or soft-capping of
    logits is applied.
    """
    dummy = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
    output = _HiddenStateAlone(last_hidden_state=hidden[None])
    with replaced_forwards({model.get_decoder(): lambda *args, **kwargs: output}):
        return model(input_ids=dummy, use_cache=False).logits[0]


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on an accelerator, or of the host's memory.

    An accelerator that does not report it (MPS) shares the host's memory.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return psutil.virtual_memory().available
    cached = module.memory_reserved(device) - module.memory_allocated(device)  # by PyTorch, for the next tensors
    return module.mem_get_info(device)[0] + cached


def linear_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(stored, dense) parameters in the decoder layers' linear weights; INT6 stores half of a weight's parameters."""
    stored = dense = 0
    factors: set[nn.Module] = set()
    for module in decoder_layers(model, adapter_for(model)).modules():
        if isinstance(module, tuple(MODULE_OF_FORM.values())):
            dense += math.prod(linear_shape(module))
            factors |= set(module.children())
        elif isinstance(module, LINEARS):
            size = math.prod(linear_shape(module))
            dense += size if module not in factors else 0
            stored += size // 2 if isinstance(module, INT6SparseLinear) else size
        fused = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)  # experts, not separated
        stored, dense = stored + fused, dense + fused
    return stored, dense


def weight_file_bytes(path: Path) -> int:
    """Bytes of a model's weights on disk: a .pt file, or the safetensors files of a folder."""
    return sum(file.stat().st_size for file in weight_files(path))
