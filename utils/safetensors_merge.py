"""Put several safetensors files together in one, with a few MiB of memory."""

import json
from collections.abc import Sequence
from pathlib import Path

from hisvd.utils.files import atomic_path
from hisvd.utils.model_folders import open_safetensors, safetensors_header

CHUNK = 2**22  # bytes copied at once
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


def merge_safetensors(paths: Sequence[Path], output: Path) -> None:
    """Write the tensors of all files, whose names differ, to `output`, atomically.

    As safetensors itself does, tensors of wide dtypes come first, so that all are aligned.

    Raises:
        HiSVDError: it cannot be written, or one of the files is truncated.
    """
    found = []
    for path in paths:
        with open_safetensors(path):  # else what a truncated one lacks would be waited for below
            start, header = safetensors_header(path)
        found += [(name, path, start, entry) for name, entry in header.items() if name != "__metadata__"]
    found.sort(key=lambda tensor: (-BITS.get(tensor[3]["dtype"], 8), tensor[0]))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, _, _, entry in found:
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        entries[name] = entry | {"data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(output) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, path, start, entry in found:
            with open(path, "rb") as source:
                begin, left = entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]
                source.seek(start + begin)
                while left:
                    data = source.read(min(CHUNK, left))
                    left -= file.write(data)
