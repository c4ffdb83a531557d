"""Several processes, started by torchrun: each one's share of the work, and sums over all of them.

A process on its own has all of the work and sends nothing.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
from torch import distributed

from hisvd.errors import HiSVDError, first_line

# All processes are started within seconds of each other; one that is missing after this long will not come.
MEETING_TIMEOUT = timedelta(minutes=10)
# The others wait while the first decomposes a layer's matrices alone: up to two hours for one of a 70B model on a CPU.
WORK_TIMEOUT = timedelta(hours=6)
VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join() -> None:
    """Join the processes that torchrun describes in the environment; without any, run alone.

    Tensors on GPUs are sent by nccl if every process of this machine has a GPU of its own.

    Raises:
        HiSVDError: the environment describes the other processes incompletely, or they cannot be reached.
    """
    processes = _variable("WORLD_SIZE", "1")
    if processes <= 1 or distributed.is_initialized():
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise HiSVDError(
            f"WORLD_SIZE is {processes}, but these are not set: {', '.join(missing)}; start several processes with "
            "torchrun, or unset WORLD_SIZE to run only one."
        )
    gpus = torch.cuda.device_count()
    own_gpus = gpus >= _variable("LOCAL_WORLD_SIZE")
    if own_gpus:
        torch.cuda.set_device(local_device(gpus))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, _ = next(distributed.rendezvous("env://", timeout=MEETING_TIMEOUT))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpus else "gloo",
            store=store,
            rank=rank,
            world_size=processes,
            timeout=WORK_TIMEOUT,
        )
        store.set_timeout(WORK_TIMEOUT)  # nccl connects through it once more, at the first sum on GPUs
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise HiSVDError(
            f"The {processes} processes cannot connect at {address} (MASTER_ADDR and MASTER_PORT): "
            f"{first_line(error)}; give torchrun an address that all machines reach and a free port."
        ) from None


def local_device(devices: int) -> int:
    """The index of this process's accelerator among the `devices` that it sees: LOCAL_RANK.

    Raises:
        HiSVDError: there are fewer.
    """
    local = _variable("LOCAL_RANK", "0")
    if local >= devices:
        raise HiSVDError(
            f"LOCAL_RANK is {local}, but the number of visible accelerators is {devices}; start one process for each "
            "(torchrun --nproc_per_node), make more visible (CUDA_VISIBLE_DEVICES), or use --device cpu."
        )
    return local


def _variable(name: str, default: str | None = None) -> int:
    """The environment variable `name` as a number."""
    value = os.environ.get(name) or default
    if value is None or not value.isdecimal():
        raise HiSVDError(
            f"The environment variable {name} is not a number: {value!r}; let torchrun set it, or unset it."
        )
    return int(value)


def leave() -> None:
    """Leave the process group once all work is done; otherwise the interpreter may abort on exit."""
    if distributed.is_initialized():
        # torch 2.6 ends gloo's threads while it holds the GIL, for which one that frees the last sum may still wait.
        time.sleep(0.1)
        distributed.destroy_process_group()


def fail(code: int) -> NoReturn:
    """End this process with `code`; one of several exits at once, without leaving the process group.

    The others wait in a sum that will never complete, and leaving (with nccl above all) would wait for them in turn.
    Once this process is gone, they see a closed connection, or torchrun ends them.
    """
    if distributed.is_initialized():
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # a closed pipe must not keep it alive
            os._exit(code)
    sys.exit(code)


def count() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    """The index of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes what all have computed."""
    return index() == 0


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows of `tensor`: every `count()`-th, so the share of the first rows comes first."""
    return tensor[index() :: count()]


def own_name(name: str) -> str:
    """`name` for a file of this process alone."""
    return f"{name}_{index()}_of_{count()}" if count() > 1 else name


def processes_of(name: str) -> int:
    """The number of processes of the run that gave a file this name by own_name."""
    found = re.search(r"_\d+_of_(\d+)", name)
    return int(found[1]) if found else 1


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes.

    Raises:
        HiSVDError: another process has ended.
    """
    if count() > 1:
        tensor = tensor.contiguous()
        try:
            distributed.all_reduce(tensor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo and nccl raise for a closed connection
            raise HiSVDError(
                f"Process {index()} stops because another has ended; its own message says why ({first_line(error)})."
            ) from None
    return tensor


def gathered(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if count() == 1:
        return [text]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
    sizes = torch.zeros(count(), dtype=torch.long)
    sizes[index()] = len(data)
    sizes = total(sizes)
    rows = torch.zeros(count(), int(sizes.max()), dtype=torch.uint8)
    rows[index(), : len(data)] = data
    return [bytes(row[:size].tolist()).decode() for row, size in zip(total(rows), sizes.tolist(), strict=True)]


def everywhere(flag: bool) -> bool:
    """Whether `flag` is set in every process."""
    return int(total(torch.tensor(int(flag)))) == count()


@contextmanager
def first_alone() -> Iterator[None]:
    """A context that process 0 enters first, the others after it has left."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def wait() -> None:
    """Wait until every process has called this (or reached the other side of first_alone)."""
    total(torch.zeros(1))
