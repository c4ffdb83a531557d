"""Several processes on the CPU give the results of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from conftest import IDS, ROOT, calibrate_arguments, run
from processes import Started

import hisvd
from hisvd.calibration_cache import read_cache
from hisvd.utils import distributed
from hisvd.utils.model_utils import resolve_device

# calibrate.py in its own processes: process 1 runs FAULT instead of its third sum, while the others wait for it there,
# and leaving the group hangs, as it does with nccl while others wait.
FAULTY = """
import os, signal, sys, time
import click
import torch.distributed
from hisvd.cli.calibrate import main
from hisvd.errors import HiSVDError
from hisvd.utils import distributed

total, calls = distributed.total, []

def failing_total(tensor):
    calls.append(tensor)
    if len(calls) == 3 and distributed.index() == 1:
        time.sleep(1)
        print("about to fail", end="")
        FAULT
        time.sleep(600)
    return total(tensor)

distributed.total = failing_total
torch.distributed.destroy_process_group = lambda: time.sleep(600)
main()
"""
SENTENCE = 'raise HiSVDError("The file is damaged.")'


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_processes(count, *command):
    """A Python command in `count` processes that know each other as if torchrun had started them."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": 1}
    return [Started(*command, **shared, RANK=index, LOCAL_RANK=index) for index in range(count)]


def outcomes(processes, within):
    """(exit code, standard output, standard error) of each; all must end by themselves `within` so many seconds."""
    end = time.monotonic() + within
    try:
        return [(p.wait(max(0.01, end - time.monotonic())), p.stdout.read(), p.stderr.read()) for p in processes]
    finally:
        for process in processes:
            process.kill()


def in_processes(count, program, *arguments):
    """What all processes together print; each must succeed."""
    ended = outcomes(start_processes(count, ROOT / f"{program}.py", *arguments), within=300)
    assert [code for code, _, _ in ended] == [0] * count, ended
    return "".join(output for _, output, _ in ended)


def launched(processes, program, *arguments):
    """The command that runs one of the programs in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, ROOT / f"{program}.py", *map(str, arguments)]


@pytest.fixture(scope="module")
def cache(model_folders, tmp_path_factory):
    """The tiny Llama's cache, made by two processes of torchrun."""
    root = tmp_path_factory.mktemp("distributed")
    command = launched(2, "calibrate", *calibrate_arguments(model_folders["llama"], root, "llama"))
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Calibration of 4 layers") == 1
    return root / "llama_n6_s32_with_hessian"


@pytest.mark.parametrize(("update", "refine"), [("none", "none"), ("sequential", "none"), ("none", "weights")])
def test_compressed_model_is_that_of_one_process(cache, model_folders, tmp_path, update, refine):
    where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--target_compression", "0.7"]
    options = ["--update", update, "--refine", refine]
    printed = in_processes(3, "compress", *where, *options, "--save_model", tmp_path / "several")
    assert printed.count("Saved to") == 1 and not list((tmp_path / "several").glob("*.bin"))
    assert run("compress", *where, *options, "--save_model", tmp_path / "one").code == 0
    reports = [json.loads((tmp_path / name / "hisvd.json").read_text()) for name in ("several", "one")]
    assert reports[0]["sublayers"] == reports[1]["sublayers"]
    if refine == "weights":
        several, one = (report["tuning"] for report in reports)
        assert several["divergences"] == pytest.approx(one["divergences"], rel=1e-3)
        assert several["divergence_before"] == pytest.approx(one["divergence_before"], rel=1e-3)
    assert any("stored_shape" in row for row in reports[0]["sublayers"])  # neurons are removed
    with torch.no_grad():
        several, one = (hisvd.load(tmp_path / name)(IDS).logits for name in ("several", "one"))
    torch.testing.assert_close(several, one, rtol=1e-3, atol=1e-3)


def test_the_search_waits_for_the_process_that_assembles_a_model(cache, model_folders, tmp_path):
    where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--max_ppl_increase", "0.001"]
    options = ["--allocation", "uniform", "--update", "none"]
    printed = in_processes(2, "compress", *where, *options, "--save_model", tmp_path / "several")
    assert printed.count("Saved to") == 1 and [path.name for path in tmp_path.iterdir()] == ["several"]


def test_perplexity_is_that_of_one_process(model_folders, tmp_path):
    where = ["--model_path", model_folders["llama"], "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 3]
    printed = in_processes(2, "evaluate", *where, "--json", tmp_path / "several.json")
    assert run("evaluate", *where, "--json", tmp_path / "one.json").code == 0
    several, one = (json.loads((tmp_path / f"{n}.json").read_text())[0]["perplexity"] for n in ("several", "one"))
    assert several["python-docs"]["tokens_scored"] == one["python-docs"]["tokens_scored"] == 3 * 31
    assert several["python-docs"]["nll"] == pytest.approx(one["python-docs"]["nll"], rel=1e-6)
    assert printed.count("python-docs") == 1


def test_more_processes_than_sequences_are_refused(model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    ended = outcomes(start_processes(4, ROOT / "calibrate.py", *arguments, "--grad_nsamples", 3), within=60)
    assert [code for code, _, _ in ended] == [2] * 4, ended
    # Of one at least: the others may lose their connection to it first.
    assert any("Error: --nsamples" in error and "start fewer processes" in error for _, _, error in ended), ended
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault, code, message",
    [
        (SENTENCE, 2, "Error: The file is damaged."),
        ('raise click.UsageError("Use it otherwise.")', 2, "Error: Use it otherwise."),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "Interrupted; run the same command again"),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_failing_process_leaves_at_once_and_the_others_follow(model_folders, tmp_path, fault, code, message):
    (tmp_path / "faulty.py").write_text(FAULTY.replace("FAULT", fault))
    command = [tmp_path / "faulty.py", *calibrate_arguments(model_folders["llama"], tmp_path)]
    waiting, failing = outcomes(start_processes(2, *command), within=60)  # mostly spent on imports
    assert failing[0] == code and message in failing[2], failing
    assert ("Traceback" in failing[2]) == (code == 1)
    assert failing[1] == "about to fail" or code == -signal.SIGTERM
    assert waiting[0] == 2 and "Process 0 stops because another has ended; its own message says why" in waiting[2]
    assert "Traceback" not in waiting[2] and waiting[2].count("Error: ") == 1


def test_torchrun_ends_within_seconds_of_a_failure(model_folders, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY.replace("FAULT", f'open("{tmp_path}/failed", "w").close(); {SENTENCE}'))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, tmp_path / "faulty.py", *calibrate_arguments(model_folders["llama"], tmp_path)]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as running:
        try:
            _, error = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 1 and "Error: The file is damaged." in error
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 20


def test_ctrl_c_for_all_processes_ends_them_with_130(model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    running = start_processes(2, ROOT / "calibrate.py", *arguments)
    while not (tmp_path / "tiny_n6_s32_with_hessian" / "layer_000.safetensors").exists():
        assert running[0].poll() is None, running[0].stderr.read()
        time.sleep(0.002)
    for process in running:
        process.send_signal(signal.SIGINT)
    for code, _, error in outcomes(running, within=20):
        assert code == 130 and "Interrupted" in error and "Traceback" not in error, error


@pytest.fixture
def described(monkeypatch):
    """The environment of the second of two processes; described(NAME=value) changes it, None removes."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))

    change(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=free_port())
    change(TORCHELASTIC_USE_AGENT_STORE=None)
    return change


def test_an_incomplete_environment_is_refused(described):
    described(RANK=None, MASTER_ADDR=None)
    with pytest.raises(hisvd.HiSVDError, match="WORLD_SIZE is 2, but these are not set: RANK, MASTER_ADDR; start"):
        distributed.join()
    described(WORLD_SIZE="two")
    with pytest.raises(hisvd.HiSVDError, match="WORLD_SIZE is not a number: 'two'"):
        distributed.join()
    described(WORLD_SIZE=1)
    distributed.join()
    assert distributed.count() == 1


def test_a_taken_port_and_a_missing_process_are_refused(described, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        described(RANK=0, LOCAL_RANK=0, MASTER_PORT=port)
        with pytest.raises(hisvd.HiSVDError, match=rf"cannot connect at localhost:{port} .*a free port\.$"):
            distributed.join()
    monkeypatch.setattr(distributed, "MEETING_TIMEOUT", timedelta(seconds=1))
    described(MASTER_PORT=free_port())
    with pytest.raises(hisvd.HiSVDError, match="The 2 processes cannot connect at localhost"):
        distributed.join()


def test_processes_wait_for_hours_of_work_but_not_for_one_that_never_starts(described, monkeypatch):
    waits = {}

    class Store:
        def set_timeout(self, timeout):
            waits["store"] = timeout

    def rendezvous(address, timeout):
        waits["meeting"] = timeout
        yield Store(), 1, 2

    def init_process_group(backend, timeout, **_):
        waits["work"] = timeout

    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    distributed.join()
    assert waits["meeting"] < timedelta(hours=1)
    assert waits["work"] >= timedelta(hours=2) and waits["store"] == waits["work"]


def test_fewer_accelerators_than_processes_are_refused(described, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")  # alone
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(
        hisvd.HiSVDError, match=r"LOCAL_RANK is 1, but the number of visible accelerators is 1; .*--device cpu"
    ):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")
    described(LOCAL_RANK=0)
    assert resolve_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    described(LOCAL_RANK=2)
    with pytest.raises(hisvd.HiSVDError, match="LOCAL_RANK is 2, but the number of visible accelerators is 2"):
        distributed.join()


def test_a_killed_process_stops_all_and_a_rerun_resumes(cache, model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path, "llama")
    folder = tmp_path / "llama_n6_s32_with_hessian"
    running = subprocess.Popen(launched(2, "calibrate", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (folder / "layer_000.safetensors").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert running.wait(120) != 0
    done = {f: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = [folder / entry["file"] for entry in manifest["layers"] + manifest["gradients"]]
    assert len(kept) < 8
    in_processes(2, "calibrate", *arguments)
    assert all(file.stat().st_mtime_ns == done[file] for file in kept)
    for file in cache.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_moments_are_those_of_one_process(cache, caches):
    one = read_cache(caches["llama"])
    assert read_cache(cache).identity == one.identity and not list(cache.glob("*.bin"))
    for index in range(one.num_layers):
        left, right = one.read_layer(index), read_cache(cache).read_layer(index)
        assert left.keys() == right.keys()
        for name in left:
            if name.endswith((".H", ".F")):
                assert (left[name] - right[name]).norm() <= 1e-5 * left[name].norm(), name
            elif name.endswith("singular_values"):
                torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-5 * float(left[name].max()))


GATHERING = """
from hisvd.utils import distributed
distributed.join()
print(distributed.gathered(["", "äpfel", "x" * 1000][distributed.index()]) == ["", "äpfel", "x" * 1000])
distributed.leave()
"""


def test_every_process_gets_the_texts_of_all(tmp_path):
    (tmp_path / "gathering.py").write_text(GATHERING)
    ended = outcomes(start_processes(3, tmp_path / "gathering.py"), within=100)
    assert [(code, output) for code, output, _ in ended] == [(0, "True\n")] * 3, ended


def test_layers_are_decomposed_by_all_processes(model_folders, tmp_path):
    """Three processes share four layers: each writes files of its own, at the same time as the others."""
    writing = f"""
import sys
from hisvd.calibration_cache import CalibrationCache
from hisvd.cli.calibrate import main
from hisvd.utils import distributed
write = CalibrationCache._write
def noting(cache, file, tensors):
    with open(f"{tmp_path}/by_{{distributed.index()}}", "a") as notes:
        notes.write(file + " ")
    return write(cache, file, tensors)
CalibrationCache._write = noting
main()
"""
    (tmp_path / "writing.py").write_text(writing)
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    ended = outcomes(start_processes(3, tmp_path / "writing.py", *arguments), within=200)
    assert [code for code, _, _ in ended] == [0] * 3, ended
    written = [(tmp_path / f"by_{i}").read_text().replace(".safetensors", "").split() for i in range(3)]
    assert written[0] == ["layer_000", "layer_003", "gradients_003", "gradients_000"]
    assert written[1:] == [["layer_001", "gradients_002"], ["layer_002", "gradients_001"]]
