"""The text that compressed models are tuned on, as the original reads it: where its states start, and should end."""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from hisvd.errors import HiSVDError
from hisvd.factoring import CompressionJob
from hisvd.layer_tensors import norm_gains
from hisvd.utils import distributed
from hisvd.utils.model_utils import multiplies_bfloat16
from hisvd.utils.progress import progress_bar
from hisvd.utils.streaming import Arguments, StreamedModel, decoder_layers

TOKENS_PER_STEP = 2048  # at least
MAX_STEPS = 48  # each reads and writes all that is trained


class Batch(NamedTuple):
    """Sequences: embedded, after the original's last layer, and what each layer gets besides hidden states."""

    embedded: torch.Tensor
    wanted: torch.Tensor
    arguments: tuple[Arguments, ...]


def steps_for(sequences: int, seqlen: int, processes: int = 1) -> tuple[int, int, int]:
    """Sequences per batch, batches per step, and steps, where each of the processes has its share of the sequences."""
    batch_size = max(1, TOKENS_PER_STEP // (processes * seqlen))
    batches = -(-sequences // (processes * batch_size))  # of the process with the most
    batches_per_step = -(-batches // MAX_STEPS)
    return batch_size, batches_per_step, -(-batches // batches_per_step)


def pass_dtype(calibrated: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the passes: as calibrated, or bfloat16 instead of float32 where that is several times as fast."""
    quicker = calibrated == torch.float32 and multiplies_bfloat16(device)
    return torch.bfloat16 if quicker else calibrated


class TuningText:
    """This process's calibration text and the held-out text, for all targets; hidden states are kept in `folder`."""

    def __init__(self, job: CompressionJob, folder: Path) -> None:
        """Read the text.

        Raises:
            HiSVDError: nothing of the layers can be trained.
        """
        tokens, processes = job.cache.read_tokens(), distributed.count()
        batch_size, self.batches_per_step, self.num_steps = steps_for(len(tokens), tokens.shape[1], processes)
        dtype = pass_dtype(job.cache.dtype, job.device)
        self.streamed = StreamedModel(job.checkpoint, batch_size, job.device, dtype)
        self.folder, self.num_layers = folder, job.cache.num_layers
        layers = decoder_layers(self.streamed.skeleton, self.streamed.adapter)
        if job.settings.refine == "norms" and not any(map(norm_gains, layers)):
            raise HiSVDError("--refine norms: the decoder layers of this model have no norms with gains; leave it out.")
        # Consecutive sequences are alike, and every step should see different text.
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
        self.texts = {"tokens": distributed.share(tokens), "held_out": job.cache.read_held_out()}

    @cached_property
    def read(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """What gives the batches of "tokens", and of "held_out"; the original runs when this is first asked for."""
        return {name: self._read_by_original(name, tokens) for name, tokens in self.texts.items()}

    def steps(self) -> Iterator[list[Batch]]:
        """The calibration text, step by step, from the start again once it ends: other processes may have more."""
        batches = itertools.chain.from_iterable(self.read["tokens"]() for _ in itertools.count())
        while True:
            yield list(itertools.islice(batches, self.batches_per_step))

    def _read_by_original(self, name: str, tokens: torch.Tensor) -> Callable[[], Iterator[Batch]]:
        """Embed `tokens`, and take them through the original's layers; `name` is that of their files."""
        path = self.folder / distributed.own_name(f"hidden_{name}")
        states = self.streamed.pair(path, tokens, keep_first=True)
        arguments = self.streamed.embed(tokens, states[0])
        for index in progress_bar(range(self.num_layers), "the original's predictions", leave=False):
            layer = self.streamed.layer(index)
            states[index + 1].write(self.streamed.outputs(layer, index, states[index], arguments[index]))
        files = states[0], states[self.num_layers]
        return lambda: map(Batch, *map(self.streamed.read, files), zip(*arguments, strict=True))
