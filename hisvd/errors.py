"""The one exception that the programs turn into a sentence and exit code 2, and helpers for its messages."""

from collections.abc import Iterator
from contextlib import contextmanager


class HiSVDError(Exception):
    """Bad input or bad usage; the message is one sentence that names the culprit and the fix."""


class TargetTooSmallError(HiSVDError):
    """No plan stores as little as the target."""


def first_line(error: BaseException) -> str:
    """An exception's message cut to its first line, for one-sentence errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_units(size: float) -> str:
    """A number of bytes for messages: "1.2 GB", "3.4 MB", "512 bytes"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} bytes"


@contextmanager
def naming(culprit: str) -> Iterator[None]:
    """Within the context, prefix the message of a HiSVDError with what it is about: "culprit: sentence"."""
    try:
        yield
    except HiSVDError as error:
        raise HiSVDError(f"{culprit}: {error}") from None
