"""Write a compressed model: shards into a partial folder, then a Hugging Face folder or one .pt file."""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from hisvd.errors import HiSVDError, first_line
from hisvd.schema import FILE_NAME, check
from hisvd.utils.checksums import REPORT, REPORT_SCHEMA
from hisvd.utils.files import atomic_path, make_folder, read_json, sync_file, write_json, write_tensors, write_text
from hisvd.utils.load_utils import PT_FILE_PREFIX, PT_FORMAT, read_pt
from hisvd.utils.model_folders import INDEX_NAME, SINGLE_NAME, found_side_files, open_safetensors, safetensors_header
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.safetensors_merge import merge_safetensors

Item = TypeVar("Item")
PLAN = "plan.json"
WRITTEN = "written.json"  # the names of the files beside the shards, which are all that is deleted with a .pt's shards
PREDICTED = "predicted_loss"  # follows from the rest of a plan, and its last digits depend on the machine
PROBE = r"\.hisvd_probe_\d+"  # of files.make_folder
# What a run killed at its very start leaves, and what later runs keep in `work`, and in `work/packed`, besides.
START_FILES = re.compile(rf"{PROBE}|\.{re.escape(PLAN)}\.tmp")
WORK_FILES = re.compile(
    rf"{START_FILES.pattern}|{re.escape(PLAN)}|\.?{re.escape(WRITTEN)}(\.tmp)?|int6_gate\.json|int6_.+\.safetensors|\.int6_.+\.tmp"
    r"|(hidden|original|held_out)\w*\.bin|tuned_\d+_\d+\.safetensors|\.tuned_.+\.tmp"
    r"|\.?tuning\.json(\.tmp)?"
)
PACKED_FILES = re.compile(rf"{PROBE}|\.?model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.tmp)?")
COUNTED = ("linear_numbers_after", "linear_kept")  # in a finished report these are what the shards hold
MAX_SHARD_BYTES = 5 * 10**9


def output_path(save_model: str, target: float, budget: str | None) -> Path:
    """OUT, or OUT with percent and budget in its name (None: one target): OUT_80p, X_80p.pt, OUT_40b of bytes.

    Raises:
        HiSVDError: it is a file system's root, or only says where this folder or its parent is.
    """
    path = Path(save_model)
    if path.name in ("", ".."):
        raise HiSVDError(f"--save_model {save_model} has no name of its own; give a folder or a .pt file to create.")
    if not budget:
        return path
    stem, suffix = (path.stem, ".pt") if is_pt(path) else (path.name, "")
    return path.with_name(f"{stem}_{100 * target:g}{budget[0]}{suffix}")


def is_pt(path: Path) -> bool:
    """Whether the output is one file rather than a folder."""
    return path.suffix == ".pt"


class ModelWriter:
    """Writes one compressed model: shard k for decoder layer k, the last one for everything else.

    A shard larger than MAX_SHARD_BYTES is split into several files; the one without a final number is written last.
    Shards go to the folder OUT.partial beside the output, working files to `work` inside it. `pack` puts shards
    together in files of at most MAX_SHARD_BYTES, `complete` adds the other files of a model folder, hisvd.json last,
    and `finish` moves the result to its place. A run that is killed at any moment can resume with the same plan, and
    nothing else is ever deleted.
    """

    def __init__(self, output: Path, plan: dict, num_shards: int, transposed: Collection[str] = ()) -> None:
        """Prepare OUT.partial. Tensors named in `transposed` are stored transposed (see Checkpoint.transposed).

        Raises:
            HiSVDError: the output, or an unfinished run, exists with another plan; or it cannot be written.
        """
        self.output, self.num_shards, self.transposed = output, num_shards, transposed
        self.plan = json.loads(json.dumps(plan))
        self.folder = output.with_name(f"{output.name}.partial")
        self.work = self.folder / "work"
        self.packed = self.work / "packed"
        self.is_finished = output.exists()
        if output.is_symlink() and not self.is_finished:
            raise HiSVDError(f"{output} is a link that leads nowhere; delete it or choose another --save_model.")
        if self.is_finished:
            if not self._follows_plan(saved_report(output)):
                raise HiSVDError(f"{output} already exists; delete it or choose another --save_model.")
            return
        plan_file = self.work / PLAN
        # A folder may have lost its plan already; `work` stays beside a .pt's shards.
        plans = (plan_file,) if is_pt(output) else (plan_file, self.folder / REPORT)
        found = next((read_json(file) for file in plans if file.is_file()), None)
        if found is not None and not self._follows_plan(found):
            raise HiSVDError(
                f"{self.folder} holds an unfinished run with other settings or from another version; run that "
                "command again, delete the folder, or choose another --save_model."
            )
        is_foreign = found is None and self.folder.is_dir() and any(_foreign(self.folder))
        foreign_pack = any(not PACKED_FILES.fullmatch(path.name) for path in self.packed.glob("*"))
        if is_foreign or foreign_pack or any(path.is_symlink() for path in (self.folder, self.work, self.packed)):
            raise HiSVDError(
                f"{self.folder} exists and is not an unfinished run of HiSVD; move it away or choose another "
                "--save_model."
            )
        make_folder(self.folder)
        if found is None:
            make_folder(self.work)
            write_json(plan_file, plan)

    def _follows_plan(self, report: dict | None) -> bool:
        due = {key: value for key, value in self.plan.items() if key not in (*COUNTED, PREDICTED)}
        return report is not None and all(key in report and report[key] == value for key, value in due.items())

    @property
    def is_complete(self) -> bool:
        """Whether all files are written, so that only moving the result to its place is left."""
        return self.is_finished or (self.folder / REPORT).is_file()

    def _shard(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def has_shard(self, index: int) -> bool:
        """Whether shard `index` is written; it appears whole or not at all."""
        return self.is_complete or self._shard(index).is_file()

    def has_all_shards(self) -> bool:
        """Whether every shard is written."""
        return all(self.has_shard(index) for index in range(self.num_shards))

    def shards_done(self) -> int:
        """How many decoder layers' shards are written, from the first on."""
        return next(i for i in range(self.num_shards) if i == self.num_shards - 1 or not self.has_shard(i))

    def write_shard(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write shard `index`, replacing an existing one.

        Raises:
            HiSVDError: a value is not finite, or the disk is full.
        """
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise HiSVDError(f"The compressed weight '{name}' holds NaN or infinite values; nothing is saved.")
        first, *others = split_by_bytes(self._transpose(tensors), MAX_SHARD_BYTES)
        paths = [self._shard(index).with_suffix(f".{number}.safetensors") for number in range(2, len(others) + 2)]
        for path, part in zip(paths, others, strict=True):
            write_tensors(path, part)
        write_tensors(self._shard(index), first)
        for path in set(self._files_of(index)) - {self._shard(index), *paths}:
            path.unlink()

    def read_shard(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of shard `index`."""
        return self._transpose({k: t for path in self._files_of(index) for k, t in load_file(path).items()})

    def _files_of(self, index: int) -> list[Path]:
        ours = re.compile(rf"{re.escape(self._shard(index).stem)}(\.\d+)?\.safetensors")
        return sorted(path for path in self.folder.glob("*.safetensors") if ours.fullmatch(path.name))

    def shard_files(self) -> list[Path]:
        """The files of all shards, in order."""
        return [path for index in range(self.num_shards) for path in self._files_of(index)]

    def pack(self) -> None:
        """Put the shards of a folder together in larger files, beside them.

        Raises:
            HiSVDError: a file cannot be written.
        """
        if is_pt(self.output):
            return
        groups = grouped_by_bytes(self.shard_files(), lambda path: path.stat().st_size, MAX_SHARD_BYTES)
        if all(len(group) < 2 for group in groups):
            return
        for old in make_folder(self.packed).glob("*.safetensors"):  # of a run that was killed here
            old.unlink()
        for number, group in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE_NAME
            merge_safetensors(group, self.packed / name)

    def weight_files(self) -> list[Path]:
        """The files with weights of the finished model, in order: what `pack` has made, else all shards."""
        return sorted(self.packed.glob("*.safetensors")) or self.shard_files()

    def _place_packed(self) -> None:
        """Replace the shards by what `pack` has made of them."""
        if not self.packed.is_dir():
            return
        packed = sorted(self.packed.glob("*.safetensors"))
        # Once the first is moved, the shards are gone, and what has the name of one is a packed file of a killed run.
        if packed and packed[0].name.startswith((SINGLE_NAME, "model-00001-")):
            for path in self.shard_files():
                path.unlink()
        for path in packed:
            path.rename(self.folder / path.name)
        with suppress(OSError):  # not empty
            self.packed.rmdir()

    def _transpose(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.T.contiguous() if name in self.transposed else tensor for name, tensor in tensors.items()}

    def stored_tensors(self) -> dict[str, tuple[str, list[int]]]:
        """(safetensors dtype, shape) of every tensor in the shards."""
        stored = {}
        for path in self.shard_files():
            with open_safetensors(path) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    stored[name] = (shard.get_slice(name).get_dtype(), shard.get_slice(name).get_shape())
        return stored

    def coded_modules(self, checkpoint: Checkpoint, codes: dict[str, str]) -> dict[str, str]:
        """`codes`, the forms of linears or factors by their names in the files, by their names inside the model."""
        linears = [row["name"] for row in self.plan["sublayers"]]
        by_stored = {checkpoint.stored_name(f"{name}.weight").removesuffix(".weight"): name for name in linears}
        forms = {}
        for code, form in codes.items():
            parent, _, factor = code.rpartition(".")
            forms[by_stored[code] if code in by_stored else f"{by_stored[parent]}.{factor}"] = form
        return forms

    def complete(self, checkpoint: Checkpoint, changes: dict, report: dict, card: str) -> None:
        """Add configuration, tokenizer, index, model card, and last the report.

        `changes` are the entries of config.json that differ from the original's.

        Raises:
            HiSVDError: a file cannot be written, or see `side_files`.
        """
        copied = side_files(checkpoint.folder)
        files = self.weight_files()
        index = [INDEX_NAME] if files[0].name != SINGLE_NAME else []
        names = [*(file.name for file in copied), "config.json", *index, "README.md", REPORT]
        write_json(self.work / WRITTEN, {"files": names})
        for file in copied:
            with atomic_path(self.folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
        write_json(self.folder / "config.json", read_json(checkpoint.folder / "config.json") | changes)
        weight_map: dict[str, str] = {}
        total = 0  # bytes of the tensors, as transformers counts
        for path in files if index else ():
            with open_safetensors(path) as shard:
                weight_map |= dict.fromkeys(shard.keys(), path.name)
            total += path.stat().st_size - safetensors_header(path)[0]
        if index:
            write_json(self.folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_text(self.folder / "README.md", card)
        write_json(self.folder / REPORT, report)

    def finish(self) -> dict:
        """Move the complete result to its place; returns the report.

        Raises:
            HiSVDError: the disk is full.
        """
        if not self.is_finished:
            if is_pt(self.output):
                try:
                    with atomic_path(self.output) as temporary:
                        torch.save(self._flat_content(), temporary)
                except RuntimeError as error:  # what PyTorch's zip writer raises when a disk is full
                    raise HiSVDError(
                        f"Cannot write {self.output} (is the disk full?): {first_line(error)}; free some space, and "
                        "run the same command again."
                    ) from None
            else:
                self._place_packed()
                self._remove_work()
                self.folder.rename(self.output)
                sync_file(self.output.parent)
            self.is_finished = True
        if is_pt(self.output):
            self._remove_partial()
        report = saved_report(self.output)
        assert report is not None  # __init__ or complete() has seen to it
        return report

    def _remove_work(self) -> None:
        """Delete the working files, the plan last; anything else in their folder stays."""
        for path in sorted(self.work.glob("*"), key=lambda path: path.name == PLAN):
            if WORK_FILES.fullmatch(path.name):
                path.unlink()
        with suppress(OSError):  # not empty, or gone already
            self.work.rmdir()

    def _remove_partial(self) -> None:
        """Delete what was written to OUT.partial; anything else in it, and a folder of someone else's, stays."""
        plan, is_linked = self.work / PLAN, self.folder.is_symlink() or self.work.is_symlink()
        if is_linked or not plan.is_file() or not self._follows_plan(read_json(plan)):
            return
        for path in (*self.shard_files(), *self._written()):
            path.unlink(missing_ok=True)
        self._remove_work()
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def _written(self) -> list[Path]:
        """The files that `complete` has written."""
        if not (self.work / WRITTEN).is_file():
            return []
        names = read_json(self.work / WRITTEN, {"files": [FILE_NAME]})["files"]
        return [self.folder / name for name in sorted(names)]

    def _flat_content(self) -> dict[str, str | torch.Tensor]:
        """What the .pt file holds; the weights are mapped from the shards, not read into memory."""
        content: dict[str, str | torch.Tensor] = {"format": PT_FORMAT}
        for path in self._written():
            if path.name == INDEX_NAME:
                continue
            data = path.read_bytes()
            try:
                content[PT_FILE_PREFIX + path.name] = data.decode()
            except UnicodeDecodeError:  # a SentencePiece model
                content[PT_FILE_PREFIX + path.name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for path in sorted(self.shard_files()):
            with open_safetensors(path) as shard:
                content |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a dict)
        return content


def saved_report(output: Path) -> dict | None:
    """The content of hisvd.json of a finished output; None where there is none.

    Raises:
        HiSVDError: it is damaged.
    """
    if not is_pt(output):
        return read_json(output / REPORT, REPORT_SCHEMA) if (output / REPORT).is_file() else None
    try:
        report = json.loads(read_pt(output)[0][REPORT])
    except (HiSVDError, KeyError):  # another program's file
        return None
    except (ValueError, TypeError, RecursionError):
        raise HiSVDError(f"The {REPORT} in {output} is damaged; create the file again.") from None
    check(report, REPORT_SCHEMA, f"{output}/{REPORT}")
    return report


def side_files(folder: Path) -> list[Path]:
    """What a model folder holds besides config and weights, for the compressed model.

    Links are followed inside the folder and into the Hub's cache, where a snapshot consists of them.

    Raises:
        HiSVDError: one leads elsewhere, so that its target would be copied into a folder that may be published; or see
            found_side_files.
    """
    found = found_side_files(folder)
    for path in found:
        target = path.resolve()
        is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if folder.resolve() not in target.parents and not is_blob:
            raise HiSVDError(
                f"{path} is a link to {target}, outside the model folder; put a copy there if it belongs to the model, "
                "or delete the link."
            )
    return found


def _foreign(folder: Path) -> Iterator[Path]:
    """What a partial folder without a plan holds, except for the remains of a run killed at its very start."""
    for path in folder.iterdir():
        if path.name == "work" and path.is_dir() and not path.is_symlink():
            yield from (inside for inside in path.iterdir() if not START_FILES.fullmatch(inside.name))
        elif not START_FILES.fullmatch(path.name):
            yield path


def grouped_by_bytes(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """`items` in order, in groups whose sizes sum to at most `limit` bytes; a larger one has a group of its own."""
    groups, left = list[list[Item]](), 0
    for item in items:
        if not groups or size(item) > left:
            groups.append([])
            left = limit
        groups[-1].append(item)
        left -= size(item)
    return groups


def split_by_bytes(tensors: dict[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """`tensors` in order, in parts of at most `limit` bytes, at least one; a larger tensor has a part of its own."""
    return [dict(part) for part in grouped_by_bytes(tensors.items(), lambda item: item[1].nbytes, limit)] or [{}]
