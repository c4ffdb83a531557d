"""The one exception that the programs turn into a sentence and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class HiSVDError(Exception):
    """Bad input or bad usage; the message is one sentence that names the culprit and the fix."""


@contextmanager
def naming(culprit: str) -> Iterator[None]:
    """Inside: a HiSVDError gets the name of what it is about put before it, "culprit: sentence"."""
    try:
        yield
    except HiSVDError as error:
        raise HiSVDError(f"{culprit}: {error}") from None
