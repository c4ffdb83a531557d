"""Open a checkpoint lazily, and build its model without weights."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hisvd.component.conv1d import as_linears, conv1d_weights
from hisvd.component.families import separate_experts
from hisvd.component.hf_quantizer import METHOD
from hisvd.component.low_rank import swap_linears
from hisvd.errors import HiSVDError, first_line, naming
from hisvd.utils import distributed
from hisvd.utils.config_checks import check_config, experts_of
from hisvd.utils.files import read_json
from hisvd.utils.model_folders import (
    INDEX_NAME,
    SINGLE_NAME,
    check_stored,
    found_side_files,
    has_index,
    local_folder,
    open_safetensors,
    safetensors_header,
    weight_map,
)

ADAPTER_NAME = "adapter_config.json"
# Left out, transformers asks on standard input whether to run the code that a folder brings.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
PARAMETERS_PER_BYTE = 8  # that any way to store weights can hold
# Entries of config.json that say nothing about what the model computes.
COSMETIC_CONFIG_KEYS = {
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose weights are read tensor by tensor from its safetensors files."""

    folder: Path
    config: PreTrainedConfig
    files: dict[str, Path]  # tensor name → the file that holds it

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The model without weights (see empty_model), built once; whoever changes a model makes one of their own."""
        return empty_model(self.config)

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Stored names of linear weights that are transposed in the files: GPT-2's Conv1D."""
        return frozenset(map(self.stored_name, conv1d_weights(_meta_model(self.config))))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, as stored, on the CPU; weights of linears as (out_features, in_features).

        Files are closed again, so nothing stays mapped.

        Raises:
            HiSVDError: a tensor is missing, a file is truncated, or a value is not finite.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise HiSVDError(f"The tensor '{name}' is missing from the checkpoint {self.folder}.")
            by_file.setdefault(self.files[name], []).append(name)
        tensors = {}
        for path, members in by_file.items():
            with open_safetensors(path) as file:
                for name in members:
                    stored = file.get_tensor(name)
                    # A copy outlives the mapped file.
                    tensors[name] = (stored.T if name in self.transposed else stored).clone(
                        memory_format=torch.contiguous_format
                    )
                    if tensors[name].is_floating_point() and not torch.isfinite(tensors[name]).all():
                        raise HiSVDError(
                            f"The weight '{name}' in {path} holds NaN or infinite values; repair the checkpoint first."
                        )
        return tensors

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """The files' name of every tensor, by its name in the causal language model (see empty_model).

        Tensors are renamed as from_pretrained does it: by transformers' own table (published checkpoints often keep
        names of older versions), then with or without the base model's prefix (GPT-2 is saved from its base model).
        """
        model = self.empty
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        prefix, known = model.base_model_prefix, dict.fromkeys(model.state_dict(), True)
        names: dict[str, str] = {}
        for stored in self.files:
            name = rename_source_key(stored, renamings, [], prefix, known)[0]
            if name not in known and stored in known:
                name = stored
            names.setdefault(name, stored)
        return names

    def stored_name(self, name: str) -> str:
        """The files' name for the tensor `name` of the causal language model; one that they lack keeps its name."""
        return self.stored_names.get(name, name)

    def count_parameters(self) -> int:
        """Parameters in all tensors of the checkpoint."""
        return sum(math.prod(entry["shape"]) for entry in self.entries().values())

    def count_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def entries(self) -> dict[str, dict]:
        """The safetensors header entry of every tensor: dtype, shape, file and the byte range in it."""
        entries = {}
        for path in set(self.files.values()):
            offset, header = safetensors_header(path)
            for name, entry in header.items():
                if self.files.get(name) == path:
                    start, end = entry["data_offsets"]
                    entries[name] = {**entry, "file": path, "start": offset + start, "end": offset + end}
        return entries

    def fingerprint(self) -> str:
        """sha256 over what the model computes from: its config, and name, shape, dtype and 4 KiB of every tensor.

        Independent of how the tensors are spread over files, and quick on checkpoints of any size.
        """
        config = {k: v for k, v in self.config.to_dict().items() if k not in COSMETIC_CONFIG_KEYS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, entry in sorted(self.entries().items()):
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            with open(entry["file"], "rb") as file:
                file.seek(entry["start"] + max(0, (entry["end"] - entry["start"] - 4096) // 2))
                digest.update(file.read(min(4096, entry["end"] - entry["start"])))
        return digest.hexdigest()


def read_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        HiSVDError: config.json is missing, not one that transformers knows, or states impossible sizes; or an adapter
            lies beside it, which from_pretrained would add to the weights, and reading them layer by layer would not.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise HiSVDError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    read_json(path)
    if os.path.lexists(folder / ADAPTER_NAME):
        raise HiSVDError(
            f"{folder / ADAPTER_NAME} brings an adapter; merge it into the weights (peft: merge_and_unload) and save "
            "the model, or move the adapter elsewhere."
        )
    try:
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # configurations check themselves, and raise dozens of types
        raise HiSVDError(f"{path} cannot be used: {first_line(error)}") from None
    check_config(config, str(path))
    return config


def check_size(
    config: PreTrainedConfig,
    tensors: int,
    stored_bytes: int,
    source: str,
    build: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Refuse a configuration, of the model `source`, that describes more than `tensors` of `stored_bytes` can hold.

    `build` returns its empty model where one may exist already; it is built only if the sizes alone do not say so.

    Raises:
        HiSVDError: it does; nothing of that size has been allocated.
    """
    text, most = config.get_text_config(), PARAMETERS_PER_BYTE * stored_bytes
    keys = ("hidden_size", "vocab_size", "num_hidden_layers", "moe_intermediate_size", "intermediate_size")
    hidden, vocabulary, layers, *widths = (getattr(text, key, None) or 0 for key in keys)
    inner = next((width for width in widths if width and isinstance(width, int)), 1)  # others differ by layer
    least = max(vocabulary, experts_of(config) * inner) * hidden
    build = build or partial(empty_model, config)
    if layers > tensors or least > most or sum(p.numel() for p in build().parameters()) > most:
        raise HiSVDError(
            f"The config.json of {source} describes a model of more parameters than its {tensors:,} tensors of "
            f"{stored_bytes:,} bytes can hold; correct it, or download or create the model again."
        )


def quant_method(config: PreTrainedConfig) -> str | None:
    """How the weights are compressed or quantized, if they are: METHOD is HiSVD's."""
    return (getattr(config, "quantization_config", None) or {}).get("quant_method")


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights in the files, as config.json states it; bfloat16 if it does not."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model is made for; None if config.json has no such entry (BLOOM)."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # MPT's name


def check_calibratable(config: PreTrainedConfig, seqlen: int, model: str) -> None:
    """Refuse a calibration that is impossible with this configuration; `model` names the model.

    Raises:
        HiSVDError: it has fewer positions than `seqlen`.
    """
    limit = positions_of(config)
    if limit and seqlen > limit:
        raise HiSVDError(f"--seqlen {seqlen} exceeds the {limit} positions of {model}; choose at most {limit}.")


def open_checkpoint(model_path: str, compressed_too: bool = False) -> Checkpoint:
    """Open a folder or Hub id for lazy reading; with `compressed_too`, HiSVD's compressed folders as well.

    Raises:
        HiSVDError: nothing is there, no safetensors, a missing shard, or a model that is already quantized.
    """
    folder = local_folder(model_path)
    config = read_config(folder)
    method = quant_method(config)
    if method and not (compressed_too and method == METHOD):
        raise HiSVDError(
            f"{folder} is already compressed or quantized ('{method}'); start from the original checkpoint."
        )
    check_stored(folder)
    if has_index(folder):
        files = {name: folder / file for name, file in weight_map(folder).items()}
    else:
        with open_safetensors(folder / SINGLE_NAME) as file:
            files = {name: folder / SINGLE_NAME for name in file.keys()}  # noqa: SIM118 (not a dict)
    for path in sorted(set(files.values())):
        with open_safetensors(path):
            pass
    checkpoint = Checkpoint(folder, config, files)
    unlisted = sorted(files.keys() - checkpoint.entries().keys())
    if unlisted:
        raise HiSVDError(f"{files[unlisted[0]]} lacks the tensor '{unlisted[0]}' of {INDEX_NAME}; download it again.")
    check_size(config, len(files), checkpoint.count_bytes(), str(folder), lambda: checkpoint.empty)
    return checkpoint


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model with its parameters on the meta device and its buffers computed, in eval mode.

    In it, GPT-2's Conv1D modules are nn.Linear, and experts have linears of their own. A compressed model has its
    factored modules.

    Raises:
        HiSVDError: transformers cannot build the model, or the table of modules does not fit it.
    """
    model = _meta_model(config)
    separate_experts(model)
    as_linears(model)
    if quant_method(config) == METHOD:
        with naming(f"{config.name_or_path}/config.json"):
            swap_linears(model, config.quantization_config["modules"])
    return model.eval()


def _meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, **NO_CODE)
    except Exception as error:  # every family fails in its own way on sizes that do not go together
        raise HiSVDError(
            f"The model that {config.name_or_path}/config.json describes cannot be built: {first_line(error)}"
        ) from None


def resolve_device(device: str) -> torch.device:
    """`auto` is the accelerator if there is one (each of several processes has its own), else the CPU.

    Raises:
        HiSVDError: the name is not a device of this machine, or there are fewer accelerators than processes.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            return torch.device("cpu")
        if distributed.count() == 1:
            return accelerator
        return torch.device(accelerator.type, distributed.local_device(torch.accelerator.device_count()))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HiSVDError(f"The device '{device}' cannot be used here: {first_line(error)}") from None
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype | None:
    """`auto` is float32 on the CPU (exact, and as fast there as half precision), else the checkpoint's dtype."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.float32 if device.type == "cpu" else stored


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a CPU that multiplies matrices in bfloat16 several times as fast as in float32: with AMX."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # as in old releases
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model folder.

    Raises:
        HiSVDError: there is none, or it cannot be loaded.
    """
    found_side_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"its model_max_length is {tokenizer.model_max_length!r:.60} and not a number")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception for a broken file, and panics outside of it
        reason = first_line(error).removesuffix(" from one of:")  # a list of technical reasons follows
        raise HiSVDError(
            f"No usable tokenizer in {folder}: {reason}; put the files of the model's tokenizer there."
        ) from None
