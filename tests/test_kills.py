"""SIGKILL, SIGTERM and Ctrl-C at random moments: the same command resumes to the files of an undisturbed run."""

import random
import time
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from conftest import ROOT, calibrate_arguments, run
from processes import Started

SCENARIOS = {
    "calibrate": (),
    "folder": ("--target_compression", "0.6", "--save_model", "out", "--update", "none"),
    "update": ("--target_compression", "0.6", "--save_model", "out"),
    "file": ("--target_compression", "0.6", "--save_model", "out.pt", "--update", "none"),
    "several": ("--target_compression", "0.8,0.5", "--save_model", "out.pt", "--export", "int6", "--update", "none"),
}


SIGNALS = dict.fromkeys(SCENARIOS, (SIGKILL,)) | {"calibrate": (SIGKILL, SIGINT), "update": (SIGKILL, SIGTERM)}
CODES = {SIGKILL: -9, SIGTERM: -15, SIGINT: 130}  # a shell calls the second 143


class Runs:
    """Runs of one scenario, each in a folder of its own; the first one is not killed."""

    def __init__(self, name, model, cache, root):
        self.name, self.model, self.cache, self.root = name, model, cache, root
        root.mkdir()
        started = time.monotonic()
        process = self.start("whole", 0)
        assert process.wait(300) == 0, process.stderr.read()
        self.seconds = time.monotonic() - started
        self.operations = int(process.stdout.read().rpartition("operations: ")[2])
        assert self.operations > 20

    def command(self, folder):
        (self.root / folder).mkdir(exist_ok=True)
        if self.name == "calibrate":
            return ["calibrate", *calibrate_arguments(self.model, self.root / folder)]
        options = [self.root / folder / part if part.startswith("out") else part for part in SCENARIOS[self.name]]
        return ["compress", "--model_path", self.model, "--calib_cache", self.cache, *options]

    def start(self, folder, event, number=SIGKILL):
        file = ROOT / "tests" / "killed.py"
        return Started(file, event, int(number), self.root / folder, *self.command(folder), OMP_NUM_THREADS=1)

    def check(self, folder, draw, kills, timed=False, number=SIGKILL):
        """Kill as often as that at random moments, then let the same command finish, and compare all files."""
        for _ in range(kills):
            process = self.start(folder, 0 if timed else draw.randint(1, self.operations), number)
            if timed:
                time.sleep(draw.uniform(0, self.seconds))
                process.kill()
            assert process.wait(300) in (0, CODES[number]), process.stderr.read()
        result = run(*self.command(folder))
        assert result.code == 0, result
        whole, files = self.root / "whole", [p for p in (self.root / folder).rglob("*") if p.is_file()]
        assert {p.relative_to(self.root / folder) for p in files} == {
            p.relative_to(whole) for p in whole.rglob("*") if p.is_file()
        }
        for path in files:
            assert path.read_bytes() == (whole / path.relative_to(self.root / folder)).read_bytes(), path.name


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_signal_before_a_random_file_operation(name, model_folders, caches, tmp_path):
    runs = Runs(name, model_folders["llama"], caches["llama"], tmp_path / "runs")
    for number in SIGNALS[name]:
        runs.check(f"killed {number}", random.Random(f"{name} {number}"), kills=1, number=number)


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_ten_kills(name, model_folders, caches, tmp_path):
    """Before file operations and by the clock, one to three of them before the run may finish."""
    runs, draw = Runs(name, model_folders["llama"], caches["llama"], tmp_path / "runs"), random.Random(f"long {name}")
    for kills, timed in ((1, False), (2, False), (3, False), (1, True), (3, True)):
        runs.check(f"killed {kills} {timed}", draw, kills, timed)
