"""Return freed memory to the system."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Return freed memory that glibc still holds to the system; with another C library, do nothing.

    glibc keeps freed blocks of up to 32 MB for later use, and over the layers of a model these come to hundreds of MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
