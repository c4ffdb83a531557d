"""Work, counted in operations, decompositions and bytes, and how fast a device does it, measured now."""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

DECOMPOSITIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "eigh": torch.linalg.eigh,
    "eigvalsh": torch.linalg.eigvalsh,
    "cholesky": torch.linalg.cholesky,
}
SIZES = (256, 1024, 2048)  # of the matrices that are decomposed; larger ones only for models that need them
TOKENS, INNER, OUTER = 4096, 1024, 2048  # of the product that is timed: a batch through a linear
MOVED = 2**28  # bytes that are written to memory and to disk


@dataclass
class Work:
    """What is to be done.

    Attributes:
        products: Floating-point operations in matrix products, by dtype.
        decompositions: How many, by (name in DECOMPOSITIONS, dtype, n).
        memory: Bytes read and written by elementwise operations.
        disk: Bytes written to files and read from them.
    """

    products: dict[torch.dtype, float] = field(default_factory=lambda: defaultdict(float))
    decompositions: dict[tuple[str, torch.dtype, int], float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0.0
    disk: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """The work of both."""
        both = Work(memory=self.memory + other.memory, disk=self.disk + other.disk)
        for part in (self, other):
            for dtype, flops in part.products.items():
                both.products[dtype] += flops
            for kind, count in part.decompositions.items():
                both.decompositions[kind] += count
        return both


@dataclass(frozen=True)
class Rates:
    """What a device does per second: operations in products by dtype, bytes; and seconds of decompositions by size."""

    products: dict[torch.dtype, float]
    decompositions: dict[tuple[str, torch.dtype, int], float]
    memory: float
    disk: float

    def seconds(self, work: Work) -> float:
        """The time that `work` takes, one part after the other."""
        taken = sum(flops / self.products[dtype] for dtype, flops in work.products.items())
        taken += sum(count * self._decomposition(*kind) for kind, count in work.decompositions.items())
        return taken + work.memory / self.memory + work.disk / self.disk

    def _decomposition(self, name: str, dtype: torch.dtype, n: int) -> float:
        """Seconds of one, as n³ from the nearest size that was measured."""
        measured = {size: t for (other, d, size), t in self.decompositions.items() if (other, d) == (name, dtype)}
        nearest = min(measured, key=lambda size: max(size / n, n / size))
        return measured[nearest] * (n / nearest) ** 3


def measure_rates(device: torch.device, work: Work) -> Rates:
    """The rates of whatever `work` needs; takes some seconds. The disk is that of temporary files."""
    products = {dtype: 2 * TOKENS * INNER * OUTER / _seconds(_product(device, dtype)) for dtype in work.products}
    largest = max((n for _, _, n in work.decompositions), default=0)
    decompositions = {}
    for name, dtype in dict.fromkeys((name, dtype) for name, dtype, _ in work.decompositions):
        for size in SIZES:
            if size == SIZES[0] or size <= largest:
                matrix = torch.randn(size, size, device=device, dtype=dtype)
                matrix = matrix @ matrix.T + size * torch.eye(size, device=device, dtype=dtype)
                decompositions[name, dtype, size] = _seconds(lambda: DECOMPOSITIONS[name](matrix))  # noqa: B023
    ones = torch.ones(MOVED // 8, device=device)
    memory = MOVED / _seconds(lambda: ones + ones)  # one half is read, one half written
    return Rates(products, decompositions, memory, _disk_rate())


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a, b = torch.randn(TOKENS, INNER, device=device).to(dtype), torch.randn(OUTER, INNER, device=device).to(dtype)
    return lambda: torch.nn.functional.linear(a, b)


def _disk_rate() -> float:
    """Bytes per second of writing a file with fsync."""
    data = torch.ones(MOVED, dtype=torch.uint8).numpy().data
    with tempfile.TemporaryFile() as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # as utils.files does
        return MOVED / (time.perf_counter() - start)


def _seconds(function: Callable[[], object]) -> float:
    """The time of the faster of two calls after a warm-up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
