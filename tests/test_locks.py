"""Two runs at once on one cache or output: the second is refused, and a dead run's lock is no obstacle."""

import subprocess
import sys

import pytest
from conftest import calibrate_arguments, expect_sentence, run
from test_resume import assert_same, kill_once

from hisvd import calibration
from hisvd.calibration_cache import CalibrationCache
from hisvd.compression import ModelWriter
from hisvd.errors import HiSVDError
from hisvd.utils.files import locked

CACHE = "tiny_n6_s32_with_hessian"


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def command(model_folders, caches, tmp_path):
    """compress.py to OUT in the test's folder."""

    def call(targets="0.6", output="out"):
        where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--update", "none"]
        return run("compress", *where, "--target_compression", targets, "--save_model", tmp_path / output)

    return call


def during(monkeypatch, owner, name, action):
    """Do `action` once, while owner.name is called."""
    real, done = getattr(owner, name), []

    def calling(*args, **kwargs):
        if not done:
            done.append(True)
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, calling)


def test_a_lock_has_one_holder_and_leaves_no_file(tmp_path):
    lock = tmp_path / ".lock"
    with locked(lock, "the folder"):
        with pytest.raises(HiSVDError, match="Another run is at work on the folder"), locked(lock, "the folder"):
            pass
        assert lock.exists()
    assert not lock.exists()
    with locked(lock, "the folder"):
        pass


def test_a_file_that_was_there_before_stays(tmp_path):
    lock = tmp_path / ".lock"
    lock.write_text("mine")
    with locked(lock, "the folder"):
        pass
    assert lock.read_text() == "mine"


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / ".lock", "the folder"):
        assert "the folder cannot be locked (Operation not supported)" in caplog.text


def test_where_python_has_no_locks_runs_go_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path / ".lock", "the folder"):
        assert "the folder cannot be locked (Function not implemented)" in caplog.text
    assert not (tmp_path / ".lock").exists()


def test_the_kernel_ends_the_lock_of_a_killed_process(tmp_path, model_folders, caches):
    folder = tmp_path / CACHE
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, folder / ".lock"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    expect_sentence(run("calibrate", *arguments), "Another run is at work", str(folder))
    assert [path.name for path in folder.iterdir()] == [".lock"]
    process.kill()
    process.wait()
    assert (folder / ".lock").exists() and run("calibrate", *arguments).code == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in caches["llama"].iterdir())


def test_a_second_calibration_of_the_same_cache_is_refused(tmp_path, model_folders, caches, monkeypatch):
    arguments, others = calibrate_arguments(model_folders["llama"], tmp_path), []
    during(monkeypatch, CalibrationCache, "add_gradients", lambda: others.append(run("calibrate", *arguments)))
    assert run("calibrate", *arguments).code == 0
    expect_sentence(others[0], "Another run is at work", str(tmp_path / CACHE))
    for file in caches["llama"].iterdir():
        assert (tmp_path / CACHE / file.name).read_bytes() == file.read_bytes()
    assert run("calibrate", *arguments).output.count("nothing to do") == 1
    assert not (tmp_path / CACHE / ".lock").exists()


def test_a_finished_cache_is_not_locked(tmp_path, model_folders, caches, monkeypatch):
    monkeypatch.setattr(calibration, "locked", None)
    assert run("calibrate", *calibrate_arguments(model_folders["llama"], caches["llama"].parent, "llama")).code == 0


@pytest.mark.parametrize("output", ["out", "out.pt"])
def test_a_second_compression_to_the_same_output_is_refused(command, tmp_path, monkeypatch, output):
    others = []

    def start_others():
        others.extend([command("0.6", output), command("0.8", output)])
        assert command("0.5", "another").code == 0

    during(monkeypatch, ModelWriter, "write_shard", start_others)
    assert command("0.6", output).code == 0
    for other in others:
        expect_sentence(other, "Another run is at work", str(tmp_path / output))
    assert command("0.6", "whole").code == 0
    assert_same(tmp_path / output, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([output, "another", "whole"])


def test_of_several_outputs_one_that_is_in_use_is_refused(command, tmp_path, monkeypatch):
    others = []
    during(monkeypatch, ModelWriter, "write_shard", lambda: others.append(command("0.8,0.6")))
    assert command("0.6", "out_60p").code == 0
    expect_sentence(others[0], "Another run is at work", str(tmp_path / "out_60p"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_60p"]


def test_an_interrupted_run_gives_its_lock_back(command, tmp_path, monkeypatch):
    kill_once(monkeypatch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 2)
    assert command().code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert command().code == 0
