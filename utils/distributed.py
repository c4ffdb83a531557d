"""Several processes, started by torchrun: whose share of the work is which, and sums over all.

Alone, a process has all of it and sends nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed


def join() -> None:
    """Join the processes that torchrun describes in the environment; without any, stay alone.

    Tensors on GPUs go by nccl if every process of this machine has a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        own_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        if own_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if own_gpus else "gloo")


def leave() -> None:
    """Part from the other processes; an interpreter that ends with them still joined may abort."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes what all have computed."""
    return index() == 0


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows of `tensor`: every size-th, so that a share of the first rows is the start of the share."""
    return tensor[index() :: count()]


def own_name(name: str) -> str:
    """`name` for a file of this process alone."""
    return f"{name}_{index()}_of_{count()}" if count() > 1 else name


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes."""
    if count() > 1:
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor)
    return tensor


def everywhere(flag: bool) -> bool:
    """Whether `flag` is set in every process."""
    return int(total(torch.tensor(int(flag)))) == count()


@contextmanager
def first_alone() -> Iterator[None]:
    """Inside: process 0 first, the others when it has left."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def wait() -> None:
    """Until every process has come here (or to the other side of first_alone)."""
    total(torch.zeros(1))
