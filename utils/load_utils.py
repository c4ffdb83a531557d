"""Load a model whole: original or compressed, from a folder, a `.pt` file or the Hub."""

import json
import math
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hisvd.component.hf_quantizer import METHOD
from hisvd.errors import HiSVDError, first_line, naming
from hisvd.schema import is_plain_name, is_text
from hisvd.utils.checksums import verify_weights
from hisvd.utils.config_checks import check_config
from hisvd.utils.files import check_regular, read_json, writing
from hisvd.utils.model_folders import (
    check_stored,
    local_folder,
    open_safetensors,
    safetensors_header,
    weight_file_names,
)
from hisvd.utils.model_utils import (
    NO_CODE,
    Checkpoint,
    check_size,
    load_tokenizer,
    open_checkpoint,
    quant_method,
    read_config,
    resolve_device,
)

PT_FORMAT = "hisvd-pt-1"
PT_FILE_PREFIX = "file:"
GENERATION = "generation_config.json"
# Buffers that checkpoints of older versions of transformers carry and that no model reads any more.
FORMER_BUFFERS = re.compile(r"\b(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(bias|masked_bias)|position_ids)$")
FLOATING_POINT = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_NAMED_TENSORS = 3  # that a message lists for each fault


def load(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    verify: bool = False,
) -> PreTrainedModel:
    """Load a compressed model, or any other Hugging Face causal language model, in eval mode.

    Args:
        path: A folder or .pt file of `hisvd.compress`, another Hugging Face model folder, or a Hub id.
        dtype: The dtype of its weights. None keeps the stored one.
        device: Where it is put. None is the CPU. Weights go straight to an accelerator, without a copy of the whole
            model on the CPU.
        verify: Whether the weight files of a compressed model are first read once to compare them with their checksums,
            which finds every flipped bit. Default: False.

    Returns:
        The model, as `AutoModelForCausalLM.from_pretrained` gives it: `forward`, `generate`, KV cache and SDPA work.

    Raises:
        HiSVDError: nothing is there, the file is not one of ours, or weights are missing, misshapen or left over; with
            `verify`, a weight file is damaged, missing or surplus, or the model has no checksums.
        torch.OutOfMemoryError: the accelerator's memory does not hold the model.

    Example:
        >>> import hisvd, torch
        >>> model = hisvd.load("models/small_80p", torch.bfloat16, "cuda")
        >>> model.dtype
        torch.bfloat16
    """
    place = device if isinstance(device, torch.device) else resolve_device(device or "cpu")
    # Misshapen tensors are listed like missing ones, not only logged.
    options = NO_CODE | {"dtype": dtype or "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    if place.type != "cpu":
        options["device_map"] = {"": place}
    name = os.fspath(path)
    if verify:
        verify_weights(Path(path) if Path(path).is_file() else local_folder(name))
    config = config_of(path)
    try:
        if Path(path).is_file():
            side_files, tensors = read_pt(Path(path))
            check_size(config, len(tensors), Path(path).stat().st_size, name)
            check_dtypes({key: tensor.dtype for key, tensor in tensors.items()}, config, name)
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            with naming(f"The model in {name}"):
                model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
            if GENERATION in side_files:
                model.generation_config = GenerationConfig.from_dict(json.loads(side_files[GENERATION]))
        else:
            folder = local_folder(name)
            files, entries = weight_files(folder), dict[str, dict]()
            for file in files:
                with open_safetensors(file):  # names a damaged file, which from_pretrained does not
                    entries |= safetensors_header(file)[1]
            check_size(config, len(entries), sum(file.stat().st_size for file in files), name)
            check_dtypes({key: entry.get("dtype") for key, entry in entries.items()}, config, name)
            if (folder / GENERATION).exists():
                read_json(folder / GENERATION)  # names it where it is damaged, which from_pretrained does not
            with naming(f"The model in {name}"):
                # The stubs do not know that output_loading_info makes it a pair.
                model, info = AutoModelForCausalLM.from_pretrained(folder, **options)  # type: ignore[misc]
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = expert_fault(name) if "automatic conversion" in str(error) else first_line(error)
        raise HiSVDError(f"The model in {name} cannot be loaded: {reason}") from None
    check_all_loaded(info, name)
    return model.eval().to(place)


def check_dtypes(dtypes: dict[str, Any], config: PreTrainedConfig, source: str) -> None:
    """Refuse weights and biases of other `dtypes` than floating point, which from_pretrained would convert in silence.

    `dtypes` are those of all tensors by name. What other quantization methods store is theirs.

    Raises:
        HiSVDError: there are some.
    """
    if quant_method(config) in (None, METHOD):
        known = {*FLOATING_POINT, *FLOATING_POINT.values()}
        names = [k for k in dtypes if k.endswith((".weight", ".bias")) and not FORMER_BUFFERS.search(k)]
        wrong = [f"{k} {dtypes[k]} instead of floating-point numbers" for k in names if dtypes[k] not in known]
        refuse_tensors([], wrong, [], source)


def check_all_loaded(info: dict[str, Any], source: str) -> None:
    """Refuse a model that is not what its files say, judging by the loading info of `from_pretrained`.

    Tied weights, which files leave out, and what a family ignores are not in `info`.

    Raises:
        HiSVDError: tensors are missing (transformers drew random ones for them), misshapen or left over.
    """
    misshapen = [f"{name} {tuple(found)} instead of {tuple(due)}" for name, found, due in info["mismatched_keys"]]
    surplus = [name for name in info["unexpected_keys"] if not FORMER_BUFFERS.search(name)]
    refuse_tensors(info["missing_keys"], misshapen, surplus, source)


def check_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse a checkpoint whose tensors are not those of `model` (see empty_model), judging by the files' headers.

    Tied weights and buffers that the model computes may be missing; buffers that no model reads any more, and what the
    family ignores, may be left over.

    Raises:
        HiSVDError: tensors are missing, misshapen, integers in place of weights, or left over.
    """
    names, entries = checkpoint.stored_names, checkpoint.entries()
    expected, tied = model.state_dict(keep_vars=True), getattr(model, "all_tied_weights_keys", {})
    missing = [n for n, t in expected.items() if n not in names and t.is_meta and n not in tied]
    misshapen = []
    for name in expected.keys() & names.keys():
        entry, due = entries[names[name]], list(expected[name].shape)
        if names[name] in checkpoint.transposed:
            due.reverse()
        if entry["shape"] != due:
            misshapen.append(f"{name} {tuple(entry['shape'])} instead of {tuple(due)}")
        elif isinstance(expected[name], nn.Parameter) and entry["dtype"] not in FLOATING_POINT:
            misshapen.append(f"{name} {entry['dtype']} instead of floating-point numbers")
    read = {names[name] for name in expected.keys() & names.keys()}
    ignored = [FORMER_BUFFERS, *map(re.compile, model._keys_to_ignore_on_load_unexpected or ())]
    surplus = [n for n in entries.keys() - read if not any(pattern.search(n) for pattern in ignored)]
    refuse_tensors(missing, misshapen, surplus, str(checkpoint.folder))


def refuse_tensors(missing: Collection[str], misshapen: Collection[str], surplus: Collection[str], source: str) -> None:
    """Refuse the model in `source` unless all three, names of tensors with what is wrong about them, are empty.

    Raises:
        HiSVDError: one is not.
    """
    faults = {"missing": missing, "of the wrong shape": misshapen, "not part of the model": surplus}
    described = [f"{fault}: {first_few(names)}" for fault, names in faults.items() if names]
    if described:
        raise HiSVDError(
            f"The tensors in {source} are not those that its config.json describes ({'; '.join(described)}): the files "
            "are damaged or belong to another model; download or create them again."
        )


def expert_fault(path: str) -> str:
    """Why experts in the model folder `path` cannot be fused; transformers only says that they cannot.

    Raises:
        HiSVDError: the folder has no safetensors files, or one cannot be read.
    """
    checkpoint = open_checkpoint(path, compressed_too=True)
    names = map(
        checkpoint.stored_name, checkpoint.empty.state_dict().keys() - checkpoint.empty.all_tied_weights_keys.keys()
    )
    missing = sorted(name for name in names if name not in checkpoint.files)
    return f"missing: {first_few(missing)}." if missing else "the weights of its experts have different shapes."


def first_few(names: Collection[str]) -> str:
    """The first MAX_NAMED_TENSORS names in order, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED_TENSORS} more" if len(names) > MAX_NAMED_TENSORS else ""
    return ", ".join(sorted(names)[:MAX_NAMED_TENSORS]) + more


def config_of(path: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of a model: folder, Hub id or `.pt`.

    Raises:
        HiSVDError: nothing is there, or its configuration cannot be used.
    """
    if not Path(path).is_file():
        return read_config(local_folder(os.fspath(path)))
    side_files, source = read_pt(Path(path))[0], f"{path}/config.json"
    if "config.json" not in side_files:
        raise HiSVDError(f"{path} holds no config.json; create it again with compress.py.")
    try:
        config = AutoConfig.for_model(**json.loads(side_files["config.json"]))
    except Exception as error:  # configurations check themselves, and raise dozens of types
        raise HiSVDError(f"The config.json in {path} cannot be used: {first_line(error)}") from None
    config.name_or_path = os.fspath(path)
    check_config(config, source)
    return config


def read_pt(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(side files, weights) of a `.pt` model. Weights stay memory-mapped.

    Side files are config.json, hisvd.json, the tokenizer …: text as str, binary as a uint8 tensor.

    Raises:
        HiSVDError: the file is truncated or was not written by compress.py.
    """
    check_regular(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the zip reader, the unpickler and its allow-list each raise types of their own
        content = None
    is_ours = isinstance(content, dict) and content.pop("format", None) == PT_FORMAT
    if not is_ours or not all(map(_fits_pt, content.items())):
        raise HiSVDError(f"{path} is not a model written by compress.py, or is truncated; create it again.")
    side_files = {k.removeprefix(PT_FILE_PREFIX): v for k, v in content.items() if k.startswith(PT_FILE_PREFIX)}
    weights = {k: v for k, v in content.items() if not k.startswith(PT_FILE_PREFIX)}
    return side_files, weights


def _fits_pt(entry: tuple[Any, Any]) -> bool:
    """Whether a key and its value are a side file, as text or bytes, or a weight."""
    key, value = entry
    if not is_text(key):
        return False
    if not key.startswith(PT_FILE_PREFIX):
        return isinstance(value, torch.Tensor)
    is_bytes = isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.is_contiguous()
    is_content = is_text(value) or is_bytes
    return is_content and is_plain_name(key.removeprefix(PT_FILE_PREFIX))


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: a `.pt`, or the safetensors files of a folder that belong to the model.

    Raises:
        HiSVDError: the folder has none.
    """
    if path.is_file():
        return [path]
    check_stored(path)
    return [path / name for name in weight_file_names(path)]


def bytes_in_memory(path: Path, dtype: torch.dtype | None) -> int:
    """Bytes of all tensors of a model (folder or `.pt`) with floating-point ones in `dtype` (None: as stored).

    Raises:
        HiSVDError: a file is missing, truncated or in another format.
    """
    if path.is_file():
        tensors = read_pt(path)[1].values()
        return sum(t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize for t in tensors)
    total = 0
    for file in weight_files(path):
        with open_safetensors(file):
            header = safetensors_header(file)[1]
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                if dtype and entry["dtype"] in FLOATING_POINT:
                    total += math.prod(entry["shape"]) * dtype.itemsize
                else:
                    total += end - start
    return total


def unpack_side_files(path: Path, folder: Path) -> None:
    """Write the side files of a `.pt` model into `folder`.

    Raises:
        HiSVDError: one cannot be written.
    """
    for name, content in read_pt(path)[0].items():
        data = content.encode() if isinstance(content, str) else content.numpy().tobytes()
        with writing(folder / name):
            (folder / name).write_bytes(data)


def tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model: folder, Hub id or `.pt`."""
    if Path(path).is_file():
        with tempfile.TemporaryDirectory() as folder, naming(path):
            unpack_side_files(Path(path), Path(folder))
            return load_tokenizer(Path(folder))
    return load_tokenizer(local_folder(path))
