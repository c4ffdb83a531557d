"""Typed checks of what files say, made once where a file is read; the messages name the file and the entry."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hisvd.errors import HiSVDError

MOST = 2**40  # no size or count in a file is larger
OBJECT: dict[str, Any] = {}  # the schema of any object
SHOWN = 60  # characters of a value that a message quotes


@dataclass(frozen=True)
class Kind:
    """What a single value must be: a test, and what to call it in messages."""

    title: str
    holds: Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether `value` is a string that can be written as UTF-8: without half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain_name(value: Any) -> bool:
    """Whether `value` is the name of a file, without a folder."""
    return is_text(value) and "\0" not in value and value not in ("", "..") and _last_part(value) == value


def _last_part(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def is_path_inside(value: Any) -> bool:
    """Whether `value` is the relative path of a file that stays inside the folder that it starts from."""
    if not is_text(value) or "\0" in value or not value or "\\" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


SIZE = Kind("a whole number of at least 1", lambda v: type(v) is int and 0 < v <= MOST)
COUNT = Kind("a whole number of at least 0", lambda v: type(v) is int and 0 <= v <= MOST)
NUMBER = Kind("a finite number", lambda v: type(v) in (int, float) and abs(v) < math.inf)
TEXT = Kind("a string", lambda v: isinstance(v, str))
FILE_NAME = Kind("the name of a file in the same folder", is_plain_name)
SHARD = Kind("a .safetensors file in the folder", lambda v: is_path_inside(v) and v.endswith(".safetensors"))


def one_of(*values: Any) -> Kind:
    """One of these values, of the same type."""
    known = " or ".join(map(repr, values))
    return Kind(known, lambda v: any(type(v) is type(value) and v == value for value in values))


def check(value: Any, schema: Any, source: str, entry: str = "") -> None:
    """Refuse a value from `source` that does not have the form of `schema`; `entry` is where it stands in the file.

    A schema is a Kind; [schema], a list of such values; {"*": schema}, an object of them under any names; or an object
    of schemas by name, of which those with a question mark after their names may be missing. Further entries are
    ignored.

    Raises:
        HiSVDError: it does not.
    """
    if isinstance(schema, Kind):
        if not schema.holds(value):
            _refuse(value, schema.title, source, entry)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            _refuse(value, "a list", source, entry)
        for index, member in enumerate(value):
            check(member, schema[0], source, f"{entry}[{index}]")
    else:
        if not isinstance(value, dict):
            _refuse(value, "an object", source, entry)
        for key, part in schema.items():
            if key == "*":
                for name, member in value.items():
                    check(member, part, source, _inside(entry, str(name)))
            elif key.rstrip("?") in value:
                check(value[key.rstrip("?")], part, source, _inside(entry, key.rstrip("?")))
            elif not key.endswith("?"):
                raise HiSVDError(f"{source} has no entry {_inside(entry, key)!r}; create it again.")


def _inside(entry: str, key: str) -> str:
    return f"{entry}.{key}" if entry else key


def _refuse(value: Any, due: str, source: str, entry: str) -> None:
    shown = repr(value) if len(repr(value)) <= SHOWN else f"{repr(value)[:SHOWN]}…"
    where = f"'{entry[: 2 * SHOWN]}' in {source}" if entry else source
    raise HiSVDError(f"{where} is {shown} and not {due}; correct it, or create the file again.")
