"""Progress bars that a caller of the library can switch off; of several processes only the first shows them.

They are for people who watch: where standard error is no terminal, every stage is announced by a line instead, and a
long one by a line a minute with the count.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from hisvd.utils import distributed

SECONDS_PER_LINE = 60

_shown: ContextVar[bool] = ContextVar("hisvd_progress_shown", default=True)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Within the context, show or hide progress, including the bars of transformers and huggingface_hub."""
    token, before = _shown.set(shown), transformers_logging.is_progress_bar_enabled()
    if not is_progress_shown():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        _shown.reset(token)
        if before:
            transformers_logging.enable_progress_bar()


def is_progress_shown() -> bool:
    """Whether this process shows progress bars."""
    return _announces() and sys.stderr.isatty()


def _announces() -> bool:
    return _shown.get() and distributed.is_first()


class _Lines(tqdm):
    """A bar that is not drawn, and writes a line at most once a minute instead."""

    def __init__(self, iterable: Iterable | None, title: str, **options: Any) -> None:
        super().__init__(iterable, title, **{**options, "disable": True})
        self.title, self.last_line = title, time.monotonic()

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> None:
        """Count `n` more steps."""
        self.n += n
        if time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            self.write(f"{self.title}: {self.n}" + (f" of {self.total}" if self.total else ""), sys.stderr)


def progress_bar(iterable: Iterable | None, title: str, **options: Any) -> tqdm:
    """A tqdm bar on standard error with tqdm's own `options`, over `iterable` (None: to be updated by hand)."""
    if not _announces():
        return tqdm(iterable, title, disable=True, **options)
    if is_progress_shown():
        return tqdm(iterable, title, **options)
    if length_hint(iterable, 1):
        tqdm.write(title, sys.stderr)
    return _Lines(iterable, title, **options)
