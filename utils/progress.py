"""Progress bars that a caller of the library can switch off; of several processes only the first shows them.

They are for people who watch: where standard error is no terminal, every stage is announced by a line instead.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from hisvd.utils import distributed

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


def progress_bar(iterable: Iterable | None, title: str, **options: Any) -> tqdm:
    """A tqdm bar on standard error with tqdm's own `options`, over `iterable` (None: to be updated by hand)."""
    if _announces() and not is_progress_shown() and length_hint(iterable, 1):
        tqdm.write(title, sys.stderr)
    return tqdm(iterable, title, disable=not is_progress_shown(), **options)
