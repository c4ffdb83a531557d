"""A disk that fills up: one sentence that names the file, nothing half-written, and the same command completes.

A limit on the size of files makes the kernel refuse writes like a full disk, whoever writes.
"""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import calibrate_arguments, run
from test_resume import assert_same

from hisvd import sequential_update
from hisvd.calibration_cache import CalibrationCache, read_cache
from hisvd.errors import HiSVDError
from hisvd.utils import save_utils
from hisvd.utils.activation_files import ActivationFile
from hisvd.utils.files import check_disk, write_json
from hisvd.utils.save_utils import ModelWriter


@contextmanager
def full_after(size):
    """Within the context, files end after `size` bytes; Python ignores the signal that comes with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill(patch, owner, name, size, when=lambda *args: True):
    """The disk is full during the first call of owner.name for which `when` holds."""
    real, done = getattr(owner, name), []

    def limited(*args, **kwargs):
        if done or not when(*args):
            return real(*args, **kwargs)
        done.append(True)
        with full_after(size):
            return real(*args, **kwargs)

    patch.setattr(owner, name, limited)


def expect_refusal(result, *fragments):
    """One sentence; a bar that it interrupts may stand in the same line."""
    assert result.code == 2 and result.error.count("Error: Cannot write") == 1 and "Traceback" not in result.error
    assert all(str(fragment) in result.error for fragment in fragments), result.error


@pytest.fixture
def command(model_folders, caches, tmp_path):
    """compress.py to OUT in the test's folder."""

    def call(output, *options):
        where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"]]
        return run("compress", *where, "--target_compression", "0.6", "--save_model", tmp_path / output, *options)

    return call


WRITES = {
    "shard": (ModelWriter, "write_shard", 1000, "model-00001-of-00005.safetensors"),
    "hidden states": (ActivationFile, "write", 1000, ".bin"),
    "copied hidden states": (sequential_update.shutil, "copyfile", 1000, "hidden_even.bin"),
    "plan": (save_utils, "write_json", 10, "plan.json"),
    "tokenizer": (save_utils.shutil, "copyfile", 10, "json"),
    "card": (save_utils, "write_text", 10, "README.md"),
    "file": (save_utils.torch, "save", 20_000, "out.pt"),
}


@pytest.mark.parametrize(("owner", "name", "size", "culprit"), WRITES.values(), ids=WRITES)
def test_compression(command, tmp_path, monkeypatch, owner, name, size, culprit):
    output = "out.pt" if name == "save" else "out"
    options = () if culprit.endswith(".bin") else ("--update", "none")
    with monkeypatch.context() as patch:
        fill(patch, owner, name, size)
        expect_refusal(command(output, *options), tmp_path, culprit)
    assert [path.name for path in tmp_path.iterdir()] == [f"{output}.partial"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert command(output, *options).code == 0
    if culprit.endswith((".bin", ".pt")):
        assert command("whole", *options).code == 0
        assert_same(tmp_path / output, tmp_path / "whole")


def test_calibration(model_folders, caches, tmp_path, monkeypatch):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    folder = tmp_path / "tiny_n6_s32_with_hessian"
    with monkeypatch.context() as patch:
        fill(patch, CalibrationCache, "write_layer", 1000, lambda cache, *args: len(cache.layers) == 2)
        expect_refusal(run("calibrate", *arguments), str(folder / "layer_002.safetensors"))
        assert len(read_cache(folder).layers) == 2 and not (folder / "layer_002.safetensors").exists()
        fill(patch, ActivationFile, "write", 1000)
        expect_refusal(run("calibrate", *arguments), str(folder), ".bin")
        fill(patch, CalibrationCache, "write_manifest", 100)
        expect_refusal(run("calibrate", *arguments), str(folder / "manifest.json"))
    assert run("calibrate", *arguments).code == 0
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in caches["llama"].iterdir())
    for file in caches["llama"].iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_hidden_states_smaller_than_a_buffer(tmp_path):
    file = ActivationFile(tmp_path / "a.bin", (2, 4, 8), torch.float32)
    with full_after(100), pytest.raises(HiSVDError, match=r"a\.bin"):
        file.write(torch.ones(2, 4, 8).split(1))


def test_a_json_file_keeps_its_former_content(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with full_after(4), pytest.raises(HiSVDError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {"b": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'


def test_files_of_other_processes_may_vanish_while_space_is_counted(tmp_path, monkeypatch):
    (tmp_path / "probe").touch()
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: is_file(self) and self.unlink() is None)
    check_disk([tmp_path], 1, "This")
    assert not list(tmp_path.iterdir())
