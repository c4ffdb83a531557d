"""Python files in processes of their own, at once: forks of a server that has imported the programs."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from tempfile import NamedTemporaryFile

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([f"hisvd.{name}" for name in ("calibration", "cli.compression_tables", "estimates")])


class Started:
    """What `python FILE ARGUMENTS` would be, with the part of subprocess.Popen that tests use."""

    def __init__(self, file, *arguments, **environment):
        self.stdout, self.stderr = NamedTemporaryFile("r"), NamedTemporaryFile("r")  # noqa: SIM115 (read while it runs)
        command = [str(part) for part in (file, *arguments)]
        variables = os.environ | {name: str(value) for name, value in environment.items()}
        outputs = (self.stdout.name, self.stderr.name)
        self._process = SERVER.Process(target=_run, args=(command, variables, outputs), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(command: list[str], variables: dict[str, str], outputs: tuple[str, str]) -> None:
    for descriptor, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:  # which the server has read already
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
