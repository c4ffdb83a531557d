"""Write a compressed model: shards into a partial folder, then a Hugging Face folder or one .pt file."""

import json
import shutil
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from hisvd.component.hf_quantizer import METHOD
from hisvd.errors import HiSVDError
from hisvd.sparse_int6 import COLUMNS, FORMAT_NAME, USER_ALIAS
from hisvd.utils.files import atomic_path, make_folder, sync_file, write_json, write_tensors
from hisvd.utils.load_utils import PT_FILE_PREFIX, PT_FORMAT
from hisvd.utils.model_utils import INDEX_NAME, Checkpoint, open_safetensors

REPORT = "hisvd.json"
PLAN = "plan.json"
MAX_SHARD_BYTES = 5 * 10**9
# Numbers that an entry of these dtypes stands for: permutations and metadata are none, a byte of INT6 is 4/3 values.
NUMBERS_AN_ENTRY = {"I32": 0, "U8": 4 / 3}
# What a model folder holds beside config and weights.
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


def output_path(save_model: str, target: float, several: bool) -> Path:
    """OUT, or with several targets OUT with the ratio in its name: OUT_80p, X_80p.pt."""
    path = Path(save_model)
    if not several:
        return path
    return path.with_name(f"{path.stem if is_pt(path) else path.name}_{100 * target:g}p{'.pt' if is_pt(path) else ''}")


def is_pt(path: Path) -> bool:
    """Whether the output is one file rather than a folder."""
    return path.suffix == ".pt"


class ModelWriter:
    """Writes one compressed model: shard k for decoder layer k, the last one for everything else.

    A shard past MAX_SHARD_BYTES goes into several files; the one without a number at its end is written last.
    Shards go to the folder OUT.partial beside the output; `finish` turns it into the output. An interrupted
    run's partial folder is continued if it was made by the same plan.
    """

    def __init__(self, output: Path, plan: dict, num_shards: int, transposed: Collection[str] = ()) -> None:
        """Prepare OUT.partial. Tensors named in `transposed` are stored so (see Checkpoint.transposed).

        Raises:
            HiSVDError: the output exists already or cannot be written.
        """
        if output.exists():
            raise HiSVDError(f"{output} exists already; delete it or choose another --save_model.")
        self.output, self.plan, self.num_shards, self.transposed = output, plan, num_shards, transposed
        self.folder = output.with_name(f"{output.name}.partial")
        make_folder(self.folder)
        if not self._has_same_plan():
            shutil.rmtree(self.folder)
            make_folder(self.folder)
            write_json(self.folder / PLAN, plan)

    def _has_same_plan(self) -> bool:
        try:
            return json.loads((self.folder / PLAN).read_text(encoding="utf-8")) == json.loads(json.dumps(self.plan))
        except (OSError, ValueError):
            return False

    def _shard(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def has_shard(self, index: int) -> bool:
        """Whether shard `index` is written; it appears whole or not at all."""
        return self._shard(index).is_file()

    def shards_done(self) -> int:
        """How many decoder layers' shards are written, from the first on."""
        return next(i for i in range(self.num_shards) if i == self.num_shards - 1 or not self.has_shard(i))

    def write_shard(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write shard `index`, in place of one that is there."""
        first, *others = split_by_bytes(self._turned(tensors), MAX_SHARD_BYTES)
        paths = [self._shard(index).with_suffix(f".{number}.safetensors") for number in range(2, len(others) + 2)]
        for path, part in zip(paths, others, strict=True):
            write_tensors(path, part)
        write_tensors(self._shard(index), first)
        for path in set(self._files_of(index)) - {self._shard(index), *paths}:
            path.unlink()

    def read_shard(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of shard `index`."""
        return self._turned({k: t for path in self._files_of(index) for k, t in load_file(path).items()})

    def _files_of(self, index: int) -> list[Path]:
        return sorted(self.folder.glob(f"{self._shard(index).stem}*.safetensors"))

    def _turned(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.T.contiguous() if name in self.transposed else tensor for name, tensor in tensors.items()}

    def finish(self, checkpoint: Checkpoint, modules: dict[str, dict]) -> dict:
        """Add configuration, tokenizer, index, report and model card, and move the result to its place.

        `modules` is the table for config.json (empty: a plain model). Returns the report.
        """
        weight_map, stored = {}, {}
        files = [path for index in range(self.num_shards) for path in self._files_of(index)]
        for path in files:
            with open_safetensors(path) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    tensor = shard.get_slice(name)
                    weight_map[name] = path.name
                    stored[name] = (tensor.get_dtype(), _product(tensor.get_shape()))
        report = dict(self.plan)
        report["model_numbers_after"] = sum(
            round(size * NUMBERS_AN_ENTRY.get(dtype, 1)) for dtype, size in stored.values()
        )
        report["model_kept"] = report["model_numbers_after"] / report["model_numbers_before"]
        report["weight_bytes_after"] = sum(path.stat().st_size for path in files)
        report["bits_per_number"] = 8 * report["weight_bytes_after"] / report["model_numbers_before"]
        codes = {name.removesuffix(".packed_weight") for name in stored if name.endswith(".packed_weight")}
        if codes:
            report["int6"] = int6_figures(codes, stored)
            modules = modules | {name: {"form": "int6"} for name in self._module_names(checkpoint, codes)}
        self._write_side_files(checkpoint, modules, report, weight_map)
        (self.folder / PLAN).unlink()
        for activations in self.folder.glob("*.bin"):
            activations.unlink()
        if is_pt(self.output):
            with atomic_path(self.output) as temporary:
                torch.save(self._flat_content(weight_map), temporary)
            shutil.rmtree(self.folder)
        else:
            self.folder.rename(self.output)
            sync_file(self.output.parent)
        return report

    def _module_names(self, checkpoint: Checkpoint, codes: set[str]) -> list[str]:
        """The names inside the model of linears, or factors of them, that are stored under the names `codes`."""
        linears = [row["name"] for row in self.plan["sublayers"]]
        by_stored = {checkpoint.stored_name(f"{name}.weight").removesuffix(".weight"): name for name in linears}
        names = []
        for code in codes:
            parent, _, factor = code.rpartition(".")
            names.append(by_stored[code] if code in by_stored else f"{by_stored[parent]}.{factor}")
        return names

    def _write_side_files(
        self, checkpoint: Checkpoint, modules: dict[str, dict], report: dict, weight_map: dict[str, str]
    ) -> None:
        for pattern in SIDE_FILES:
            for file in checkpoint.folder.glob(pattern):
                shutil.copyfile(file, self.folder / file.name)
        config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        if modules:
            config["quantization_config"] = {"quant_method": METHOD, "format_version": 1, "modules": modules}
        write_json(self.folder / "config.json", config)
        write_json(self.folder / REPORT, report)
        index = {"metadata": {"total_size": report["weight_bytes_after"]}, "weight_map": weight_map}
        write_json(self.folder / INDEX_NAME, index)
        (self.folder / "README.md").write_text(model_card(report), encoding="utf-8")

    def _flat_content(self, weight_map: dict[str, str]) -> dict[str, str | torch.Tensor]:
        """What the .pt file holds; the weights are mapped from the shards, not read into memory."""
        content: dict[str, str | torch.Tensor] = {"format": PT_FORMAT}
        for path in sorted(self.folder.iterdir()):
            if path.suffix == ".safetensors" or path.name == INDEX_NAME:
                continue
            data = path.read_bytes()
            try:
                content[PT_FILE_PREFIX + path.name] = data.decode()
            except UnicodeDecodeError:  # a SentencePiece model
                content[PT_FILE_PREFIX + path.name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for name in sorted(set(weight_map.values())):
            with open_safetensors(self.folder / name) as shard:
                content |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a dict)
        return content


def split_by_bytes(tensors: dict[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """`tensors` in order, in parts of at most `limit` bytes; a tensor that is larger has a part of its own."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    left = limit
    for name, tensor in tensors.items():
        if parts[-1] and tensor.nbytes > left:
            parts.append({})
            left = limit
        parts[-1][name] = tensor
        left -= tensor.nbytes
    return parts


def int6_figures(codes: set[str], stored: dict[str, tuple[str, int]]) -> dict:
    """What hisvd.json says about the INT6 weights `codes`, from (dtype, size) of all tensors in the files.

    Bits are per weight of those linears, columns of padding included.
    """
    sizes = {
        part: sum(stored[f"{name}.{part}"][1] for name in codes) for part in ("packed_weight", "metadata", "scales")
    }
    weights = COLUMNS * sizes["metadata"]
    payload, metadata = 8 * sizes["packed_weight"] / weights, 32 * sizes["metadata"] / weights
    return {
        "format": FORMAT_NAME,
        "user_alias": USER_ALIAS,
        "weights": len(codes),
        "bits_per_stored_value": 6,
        "pair_sparsity": 0.5,
        "payload_bits_per_weight": payload,
        "metadata_bits_per_weight": metadata,
        "total_bits_per_weight": payload + metadata + 32 * sizes["scales"] / weights,
    }


def _product(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def model_card(report: dict) -> str:
    """README.md of a compressed folder."""
    settings = "\n".join(f"| {key} | {value} |" for key, value in report["settings"].items())
    return f"""---
library_name: transformers
tags: [hisvd, low-rank, compression]
---
# {Path(report["source_model"]).name}, {report["linear_kept"]:.1%} of its linear weights

Compressed without training by HiSVD {version("hisvd")} from `{report["source_model"]}`; the original's license applies.

```python
import hisvd  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```

Numbers in the decoder's linear weights: {report["linear_numbers_after"]:,} of {report["linear_numbers_before"]:,};
in the whole model: {report["model_numbers_after"]:,} of {report["model_numbers_before"]:,}.

| setting | value |
| --- | --- |
{settings}

Calibrated on {report["calibration"]["nsamples"]} × {report["calibration"]["seqlen"]} tokens of
{report["calibration"]["dataset"]}. The ranks of all sublayers are in `{REPORT}`.
"""
