"""Hidden states on disk: one file per point in the model, or a pair that the layers read and write in turn."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO, RawIOBase
from pathlib import Path

import torch

from hisvd.utils import distributed
from hisvd.utils.files import sync_file, writing
from hisvd.utils.memory import release_freed_memory

AGAIN = "_again"  # marks files from a repeated pass over finished layers


class ActivationFile:
    """Hidden states (sequences, seqlen, hidden) in a flat file, read and written one batch at a time.

    A run can resume from the file after a kill; with `in_memory`, what was written is read from memory instead.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, in_memory: bool = False) -> None:
        self.path, self.shape, self.dtype, self.in_memory = path, shape, dtype, in_memory
        self.bytes_per_sequence = shape[1] * shape[2] * dtype.itemsize
        self.batches: list[torch.Tensor] = []

    def is_whole(self) -> bool:
        """Whether the file exists with all its bytes."""
        return self.path.is_file() and self.path.stat().st_size == self.shape[0] * self.bytes_per_sequence

    def move_to(self, other: "ActivationFile") -> None:
        """Hand the file over to `other`, replacing its own."""
        os.replace(self.path, other.path)
        sync_file(other.path.parent)
        other.batches, self.batches = self.batches, []

    def write(self, batches: Iterator[torch.Tensor], head: "ActivationFile | None" = None) -> None:
        """Write consecutive batches (b, seqlen, hidden) and fsync; `head` receives the first sequences too.

        A thread writes one batch while the next is computed.

        Raises:
            HiSVDError: a file cannot be written.
        """
        with ExitStack() as stack:
            missing = {self: self.shape[0], **({head: head.shape[0]} if head else {})}
            files = {target: stack.enter_context(open(target.path, "wb", buffering=0)) for target in missing}
            writer, written = stack.enter_context(ThreadPoolExecutor(1)), list[Future]()
            for target in missing:
                target.batches.clear()
            for batch in batches:
                stored = batch.detach().to("cpu", self.dtype).contiguous()
                while written:  # at most one batch waits
                    written.pop().result()
                for target in missing:
                    part = stored[: missing[target]]
                    missing[target] -= len(part)
                    written.append(writer.submit(_append, files[target], target.path, part))
                    if target.in_memory and len(part):
                        target.batches.append(part)
            for future in written:
                future.result()
        for target in missing:
            with writing(target.path):
                sync_file(target.path)
        release_freed_memory()

    def read(self, batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
        """Yield consecutive batches (b, seqlen, hidden) on `device`; from memory, batches as they were written.

        A thread reads one batch while another is in use.
        """
        if self.batches:
            yield from (batch.to(device, copy=True) for batch in self.batches)
            return
        with open(self.path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._next_batch, file, batch_size)
            while len(batch := coming.result()):
                coming = reader.submit(self._next_batch, file, batch_size)
                yield batch.to(device)

    def _next_batch(self, file: RawIOBase, batch_size: int) -> torch.Tensor:
        """Up to `batch_size` sequences from where `file` stands."""
        batch = torch.empty(batch_size, *self.shape[1:], dtype=self.dtype)
        data, filled = batch.view(torch.uint8).numpy().reshape(-1).data, 0
        while count := file.readinto(data[filled:]):
            filled += count
        return batch[: filled // self.bytes_per_sequence]


def _append(file: FileIO, path: Path, part: torch.Tensor) -> None:
    data = part.view(torch.uint8).numpy().reshape(-1).data
    with writing(path):
        while data:
            data = data[file.write(data) :]


def is_reusable(path: Path, processes: int) -> bool:
    """Whether a run of `processes` processes can resume with the file at `path`.

    Files with AGAIN in their names belong to a pass over finished layers, which starts anew; those of another number of
    processes hold other sequences, and are outdated by the time a run of their number resumes.
    """
    return AGAIN not in path.name and distributed.processes_of(path.name) == processes


@dataclass(frozen=True)
class ActivationPair:
    """Two files that take turns: pair[k] holds what decoder layer k reads, and layer k writes pair[k + 1].

    From the top down (gradients) layer k reads pair[k + 1] and writes pair[k]. With `first`, pair[0] is a file of its
    own, which outlives the last layer.
    """

    even: ActivationFile
    odd: ActivationFile
    first: ActivationFile | None = None

    def __getitem__(self, index: int) -> ActivationFile:
        """The file that layer `index` reads and the layer below it writes."""
        if index == 0 and self.first:
            return self.first
        return self.odd if index % 2 else self.even

    def move_to(self, other: "ActivationPair", index: int) -> None:
        """Hand what layer `index` reads over to another pair; the other file is deleted."""
        self[index].move_to(other[index])
        unread = self.odd if self[index] is self.even else self.even
        unread.path.unlink(missing_ok=True)
        unread.batches.clear()
