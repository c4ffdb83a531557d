"""Several processes on the CPU give what one gives."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import IDS, ROOT, calibrate_arguments, run

import hisvd
from hisvd.calibration_cache import read_cache


def launched(processes, program, *arguments):
    """The command that runs one of the programs in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, ROOT / f"{program}.py", *map(str, arguments)]


def torchrun(*arguments):
    """Run it to its end; the finished process."""
    return subprocess.run(launched(*arguments), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cache(model_folders, tmp_path_factory):
    """The tiny Llama's cache, made by two processes."""
    root = tmp_path_factory.mktemp("distributed")
    finished = torchrun(2, "calibrate", *calibrate_arguments(model_folders["llama"], root, "llama"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Calibration of 4 layers") == 1
    return root / "llama_n6_s32_with_hessian"


@pytest.mark.parametrize("update", ["none", "sequential"])
def test_compressed_model_is_that_of_one_process(cache, model_folders, tmp_path, update):
    where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--target_compression", "0.7"]
    finished = torchrun(3, "compress", *where, "--update", update, "--save_model", tmp_path / "several")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Saved to") == 1 and not list((tmp_path / "several").glob("*.bin"))
    assert run("compress", *where, "--update", update, "--save_model", tmp_path / "one").code == 0
    reports = [json.loads((tmp_path / name / "hisvd.json").read_text()) for name in ("several", "one")]
    assert reports[0]["sublayers"] == reports[1]["sublayers"]
    with torch.no_grad():
        several, one = (hisvd.load(tmp_path / name)(IDS).logits for name in ("several", "one"))
    torch.testing.assert_close(several, one, rtol=1e-3, atol=1e-3)


def test_perplexity_is_that_of_one_process(model_folders, tmp_path):
    where = ["--model_path", model_folders["llama"], "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 3]
    finished = torchrun(2, "evaluate", *where, "--json", tmp_path / "several.json")
    assert finished.returncode == 0, finished.stderr
    assert run("evaluate", *where, "--json", tmp_path / "one.json").code == 0
    several, one = (json.loads((tmp_path / f"{n}.json").read_text())[0]["perplexity"] for n in ("several", "one"))
    assert several["python-docs"]["tokens_scored"] == one["python-docs"]["tokens_scored"] == 3 * 31
    assert several["python-docs"]["nll"] == pytest.approx(one["python-docs"]["nll"], rel=1e-6)
    assert finished.stdout.count("python-docs") == 1


def test_one_failing_process_stops_all_and_a_rerun_goes_on(model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    too_many = torchrun(4, "calibrate", *arguments, "--grad_nsamples", 3)
    assert too_many.returncode != 0 and "start fewer processes" in too_many.stderr
    assert too_many.stderr.count("Error: --nsamples") == 4  # what follows is torchrun's own
    assert torchrun(2, "calibrate", *arguments).returncode == 0


def test_a_killed_process_stops_all_and_a_rerun_goes_on(cache, model_folders, tmp_path):
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
    assert torchrun(2, "calibrate", *arguments).returncode == 0
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
            if name.endswith("eigenvectors"):
                values = name.replace("eigenvectors", "eigenvalues")
                a, b = ((t[name] * t[values]) @ t[name].T for t in (left, right))
                assert (a - b).norm() <= 1e-5 * a.norm(), name
            elif name.endswith("singular_values"):
                torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-5 * float(left[name].max()))
