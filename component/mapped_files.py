"""Tensors that lie in mapped files, as those of safetensors files do that nothing has converted."""

import ctypes
import mmap
import sys
from pathlib import Path

import torch


def in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a mapped file: only memory that PyTorch itself has allocated can be resized."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def mapped_ranges() -> list[tuple[int, int]]:
    """The first and last address of every file that this process has mapped; empty outside of Linux."""
    if sys.platform != "linux" or not Path("/proc/self/maps").exists():
        return []
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode = line.split()[:5]
        if inode != "0":  # memory without a file has none
            first, last = addresses.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def forget_pages(tensor: torch.Tensor, mapped: list[tuple[int, int]]) -> None:
    """Free the memory into which a tensor has been read that lies in one of the `mapped_ranges`.

    The tensor must be as it is in the file: whoever reads it next gets it from there. Does nothing to others.
    """
    if not in_file(tensor) or not tensor.is_contiguous():
        return
    # Whole pages of its own: pages at its ends are shared with other tensors.
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and any(start <= first and last <= end for start, end in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
