"""Several processes on the CPU give what one gives."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, calibrate_arguments

from hisvd.calibration_cache import read_cache


def torchrun(processes, program, *arguments):
    """Run one of the programs in several processes; the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, ROOT / f"{program}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cache(model_folders, tmp_path_factory):
    """The tiny Llama's cache, made by two processes."""
    root = tmp_path_factory.mktemp("distributed")
    finished = torchrun(2, "calibrate", *calibrate_arguments(model_folders["llama"], root, "llama"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Calibration of 4 layers") == 1
    return root / "llama_n6_s32_with_hessian"


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
