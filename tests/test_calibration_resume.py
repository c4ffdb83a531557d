"""A calibration that was interrupted: finished work stays, lost work is redone, nothing else is deleted."""

import re
import shutil

import pytest
from conftest import calibrate_arguments, expect_sentence, run
from test_distributed import in_processes

from hisvd.calibration_cache import CalibrationCache, read_cache
from hisvd.errors import HiSVDError
from hisvd.utils.activation_files import ActivationFile

CACHE = "tiny_n6_s32_with_hessian"


@pytest.fixture
def interrupted(model_folders, tmp_path, monkeypatch):
    """A run that stops after so many layers of the forward and the gradient pass; its arguments and its folder."""

    def call(layers, gradients=0):
        arguments = calibrate_arguments(model_folders["llama"], tmp_path)

        def stopping(method, done, limit):
            def add(cache, *values):
                if len(getattr(cache, done)) == limit:
                    raise HiSVDError("interrupted")
                method(cache, *values)

            return add

        with monkeypatch.context() as patch:
            for method, done, limit in (("add_layers", "layers", layers), ("add_gradients", "gradients", gradients)):
                patch.setattr(CalibrationCache, method, stopping(getattr(CalibrationCache, method), done, limit))
            expect_sentence(run("calibrate", *arguments), "interrupted")
        cache = read_cache(tmp_path / CACHE)
        assert (len(cache.layers), len(cache.gradients)) == (layers, gradients)
        return arguments, cache.folder

    return call


def finished_files(folder):
    """Name → modification time, for the layers that the manifest lists."""
    cache = read_cache(folder)
    return {e["file"]: (folder / e["file"]).stat().st_mtime_ns for e in cache.layers + cache.gradients}


def expect_same(folder, other):
    assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in other.iterdir())
    for file in other.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


GONE = {
    "hidden states": (2, 0, r"hidden_.*"),
    "inputs for the gradients": (2, 0, r"inputs_001\.bin"),
    "everything in the forward pass": (3, 0, r".*\.bin"),
    "gradients": (4, 2, r"gradient_.*"),
    "inputs in the gradient pass": (4, 1, r"inputs_000\.bin"),
    "everything in the gradient pass": (4, 3, r".*\.bin"),
}


@pytest.mark.parametrize("layers, gradients, gone", GONE.values(), ids=GONE)
def test_finished_layers_stay_when_hidden_states_are_gone(interrupted, caches, layers, gradients, gone):
    arguments, folder = interrupted(layers, gradients)
    lost = [file for file in folder.iterdir() if re.fullmatch(gone, file.name)]
    assert lost
    for file in lost:
        file.unlink()
    before = finished_files(folder)
    assert run("calibrate", *arguments).code == 0
    assert before.items() <= finished_files(folder).items()
    expect_same(folder, caches["llama"])


@pytest.mark.parametrize("layers, gradients", [(3, 0), (4, 3)])
def test_a_kill_while_hidden_states_are_made_again_loses_nothing(interrupted, caches, monkeypatch, layers, gradients):
    arguments, folder = interrupted(layers, gradients)
    for file in folder.glob("*.bin"):
        file.unlink()
    before = finished_files(folder)
    write, calls = ActivationFile.write, []

    def stopping(file, batches, head=None):
        if "_again" in file.path.name:
            calls.append(file)
            if len(calls) == layers + (gradients and gradients + 1):  # the last but one layer
                raise HiSVDError("interrupted")
        write(file, batches, head)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationFile, "write", stopping)
        expect_sentence(run("calibrate", *arguments), "interrupted")
    assert run("calibrate", *arguments).code == 0
    assert before.items() <= finished_files(folder).items()
    expect_same(folder, caches["llama"])


def test_files_of_another_number_of_processes_are_not_taken_for_own_ones(interrupted, caches):
    arguments, folder = interrupted(2)
    for file in folder.glob("hidden_*.bin"):
        shutil.copy(file, folder / file.name.replace("hidden", "hidden_0_of_2"))
        file.write_bytes(file.read_bytes()[:100])
    assert run("calibrate", *arguments).code == 0
    expect_same(folder, caches["llama"])


def test_another_number_of_processes_finishes_the_run(interrupted):
    arguments, folder = interrupted(4, 1)
    before = finished_files(folder)
    in_processes(2, "calibrate", *arguments)
    assert before.items() <= finished_files(folder).items()
    assert read_cache(folder).complete and not list(folder.glob("*.bin"))


def test_files_that_are_not_of_a_run_stay(interrupted):
    arguments, folder = interrupted(2)
    others = [folder / name for name in ("pytorch_model.bin", "hidden.bin", "my_inputs_000.bin", "notes.tmp")]
    for file in others:
        file.write_text("mine")
    for _ in range(2):  # once to finish it, once with nothing to do
        assert run("calibrate", *arguments).code == 0
        assert all(file.read_text() == "mine" for file in others)
        assert not list(folder.glob("hidden_*"))


@pytest.mark.parametrize("left", [".hisvd_probe_123", ".manifest.json.tmp", ".tokens.safetensors.tmp"])
def test_what_a_kill_leaves_before_the_manifest_is_no_obstacle(model_folders, caches, tmp_path, left):
    folder = tmp_path / CACHE
    folder.mkdir()
    (folder / left).write_text("half")
    assert run("calibrate", *calibrate_arguments(model_folders["llama"], tmp_path)).code == 0
    expect_same(folder, caches["llama"])


def test_a_folder_of_something_else_is_refused(model_folders, tmp_path):
    folder = tmp_path / CACHE
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    result = run("calibrate", *calibrate_arguments(model_folders["llama"], tmp_path))
    expect_sentence(result, str(folder), "not a calibration cache")
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]
