"""The files of a model folder: which there are, and what is refused in their place."""

import json
import os
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hisvd.errors import HiSVDError
from hisvd.schema import OBJECT, SHARD
from hisvd.utils.files import check_regular, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What a model folder holds besides config and weights.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "LICENSE*",
    "USE_POLICY*",
)
HUB_SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")  # what is fetched besides the weights
INDEX = {"weight_map": {"*": SHARD}, "metadata": OBJECT}  # transformers loads no index without metadata


def local_folder(model_path: str, config_only: bool = False) -> Path:
    """The local folder for a path or a Hub id (whose files are downloaded into the Hugging Face cache).

    Of the weights only those in the index are downloaded: some repositories hold a second copy.

    Raises:
        HiSVDError: no such folder, an empty folder, or the Hub cannot be reached.
    """
    path = Path(model_path)
    if path.is_dir():
        if not any(path.iterdir()):
            raise HiSVDError(f"The model folder {path} is empty; give a folder with config.json and *.safetensors.")
        return path
    if path.exists():
        raise HiSVDError(f"{path} is a file, not a model folder; give the folder that holds config.json.")
    if model_path.count("/") > 1 or model_path.startswith((".", "/", "~")) or "\\" in model_path:
        raise HiSVDError(f"The model folder {path} does not exist; check --model_path.")
    from huggingface_hub import snapshot_download

    try:
        if config_only:
            return Path(snapshot_download(model_path, allow_patterns=["config.json"]))
        folder = Path(snapshot_download(model_path, allow_patterns=list(HUB_SIDE_FILES)))
        # A snapshot's folder has the name of its commit.
        return Path(snapshot_download(model_path, revision=folder.name, allow_patterns=weight_file_names(folder)))
    except Exception as error:  # the hub client raises dozens of types; all mean "could not be fetched"
        raise HiSVDError(
            f"'{model_path}' is not a local folder and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}); download it on a machine with a connection and pass the folder."
        ) from None


def has_index(folder: Path) -> bool:
    """Whether the index says where the weights of a model folder are; as in transformers, a single file goes first."""
    return (folder / INDEX_NAME).is_file() and not (folder / SINGLE_NAME).is_file()


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → the file that holds it, from the index of a model folder.

    Raises:
        HiSVDError: the index is not one, is empty, or names files outside the folder.
    """
    found = read_json(folder / INDEX_NAME, INDEX)["weight_map"]
    if not found:
        raise HiSVDError(f"{folder / INDEX_NAME} lists no tensors; download or create the folder again.")
    return found


def weight_file_names(folder: Path) -> list[str]:
    """The files that hold the weights of a model folder, whether or not they exist."""
    return sorted(set(weight_map(folder).values())) if has_index(folder) else [SINGLE_NAME]


def check_stored(folder: Path) -> None:
    """Refuse a model folder without safetensors; transformers would look for pickles there.

    Raises:
        HiSVDError: there are none.
    """
    if not has_index(folder) and not os.path.lexists(folder / SINGLE_NAME):
        raise HiSVDError(
            f"{folder} has no model.safetensors (or its index); convert the weights once with "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')."
        )


def found_side_files(folder: Path) -> list[Path]:
    """The files that a model folder holds besides config and weights.

    Raises:
        HiSVDError: something else stands in the place of one, which transformers would pass over in silence.
    """
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern)}
    return [check_regular(path) for path in sorted(found) if path.suffix or not path.is_dir()]


def open_safetensors(path: Path) -> Any:
    """`safe_open` on the CPU, with a truncated, foreign or missing file named.

    Raises:
        HiSVDError: the file is missing, truncated, not an ordinary one or not in safetensors format.
    """
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise HiSVDError(f"Cannot read {path}: it is missing, truncated or not a safetensors file ({error}).") from None


def safetensors_header(path: Path) -> tuple[int, dict]:
    """(offset of the data, header) of a safetensors file; the caller has opened it successfully before."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))
