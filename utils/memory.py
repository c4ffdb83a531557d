"""Give freed memory back to the system."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Return to the system what the C library holds of freed memory; where it is not glibc, do nothing.

    glibc keeps freed blocks of up to 32 MB for later use, and over the layers of a model these come to hundreds of MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
