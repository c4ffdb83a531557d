"""Writing files so that existing ones are never lost and new ones are never incomplete."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hisvd.errors import HiSVDError, first_line, in_units
from hisvd.schema import OBJECT, check, is_text


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the context, say which file cannot be written; the errors of open files do not.

    Raises:
        HiSVDError: the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        raise HiSVDError(
            f"Cannot write {path}: {error.strerror or error}; free some space or choose another disk, and run the same "
            "command again."
        ) from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; on success it is fsynced and renamed to `path`, else removed.

    Raises:
        HiSVDError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """fsync a file or a folder (a folder: so that a rename in it survives a power cut)."""
    if os.name == "nt":  # Windows opens no folders, and syncs no files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        HiSVDError: it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically.

    Raises:
        HiSVDError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file, atomically, readable by transformers and with the umask's permissions.

    Raises:
        HiSVDError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise HiSVDError(f"Cannot write {path}: {error}.") from None
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes 0600


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_tensor(tensor: torch.Tensor) -> str:
    """Hex digest of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def make_folder(path: Path) -> Path:
    """Create a writable folder and its parents.

    Raises:
        HiSVDError: it cannot be created or written, or its name is one that safetensors does not open.
    """
    probe = path / f".hisvd_probe_{os.getpid()}"
    if not is_text(str(path)):
        raise HiSVDError(f"Cannot write to {path}: its name is not in UTF-8; choose another output path.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HiSVDError(f"Cannot write to {path}: {error.strerror}; choose another output path.") from None
    return path


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Within the context, hold the lock on the file `path`, so that one run alone works on `what`.

    The file is made for the lock and deleted with it. The kernel ends the lock of a process that dies; a file that it
    leaves behind is no obstacle. Where the file system knows no locks, and on Windows, none is held, with a warning.

    Raises:
        HiSVDError: another run holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            _lock(descriptor)
            is_ours = os.path.samestat(os.fstat(descriptor), os.stat(path))  # not one that a run has just deleted
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError as error:
            is_ours = True
            logging.getLogger("hisvd").warning(
                "%s cannot be locked (%s); do not start a second run on it.", what, error.strerror
            )
        if not is_ours:
            raise HiSVDError(
                f"Another run is at work on {what}; wait until it has ended, or choose another place for this one."
            )
        try:
            yield
        finally:
            if os.fstat(descriptor).st_size == 0:  # else it was there before, and is someone's
                with suppress(OSError):  # Windows deletes no open files
                    path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock an open file, without waiting for who else has locked it.

    Raises:
        OSError: someone has (BlockingIOError), or there are no locks here.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_left_behind(lock: Path) -> bool:
    """Whether there is a lock file beside something finished: its run is ending, or was killed before it deleted it."""
    return os.access(lock, os.W_OK)


def check_disk(folders: Sequence[Path], needed: float, purpose: str) -> None:
    """Make sure there is room for a run that fills `folders` with `needed` bytes, existing files included.

    Raises:
        HiSVDError: the disk has too little space left.
    """
    missing = needed - sum(_bytes_of(path) for folder in folders for path in folder.glob("*"))
    free = shutil.disk_usage(folders[0]).free
    if missing > free:
        raise HiSVDError(
            f"{purpose} needs {in_units(missing)} on the disk of {folders[0]}, which has {in_units(free)} left; "
            "free some space, or write to another disk."
        )


def _bytes_of(path: Path) -> int:
    """The size of an ordinary file; 0 of anything else, and of what another process has just deleted."""
    with suppress(OSError):
        if path.is_file():
            return path.stat().st_size
    return 0


def check_writable_file(path: Path) -> Path:
    """Make sure that `path` can be written as a file, before long work starts.

    Raises:
        HiSVDError: its folder cannot be created or written, or `path` is a folder.
    """
    if path.is_dir():
        raise HiSVDError(f"Cannot write the file {path}: a folder of that name exists; choose another name.")
    make_folder(path.parent)
    return path


def check_regular(path: Path) -> Path:
    """Make sure that `path` is an ordinary file (or a link to one): a pipe or device could be read without an end.

    Raises:
        HiSVDError: it is something else, or missing.
    """
    if not path.is_file():
        found = "not an ordinary file" if os.path.lexists(path) else "missing"
        raise HiSVDError(f"Cannot read {path}: it is {found}; put the file there.")
    return path


def read_json(path: Path, schema: Any = OBJECT) -> Any:
    """What a JSON file holds, by default an object, checked against `schema` (see hisvd.schema).

    Raises:
        HiSVDError: the file is missing, is not an ordinary file, or holds anything else.
    """
    try:
        value = json.loads(check_regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise HiSVDError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise HiSVDError(f"{path} is not JSON ({first_line(error)}); create it again.") from None
    check(value, schema, str(path))
    return value
