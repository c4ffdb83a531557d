"""The batch scripts, end to end, on tiny models that stand in for the real ones."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, build_model
from transformers import OPTConfig

# Run with the programs; the other scripts differ from the first in names alone.
RUN = ("llama7b", "opt6.7b")
OTHERS = ("llama2_7b", "llama3_8b", "llama13b", "llama_30b", "mistral_7b")
SOME = RUN[1:]
SIZES = {"NSAMPLES": "6", "GRAD_NSAMPLES": "2", "SEQLEN": "32", "DATASET": "python-docs", "DATASETS": "short.txt"}


def script(folder, name, *arguments, python=sys.executable):
    (folder / "short.txt").write_text("def f(x):\n    return x\n" * 100)
    environment = os.environ | SIZES | {"PYTHON": str(python), "TARGETS": "0.8 0.6", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts" / f"{name}.sh", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_folders, tokenizer):
    root = tmp_path_factory.mktemp("models")
    opt = OPTConfig(
        vocab_size=300, hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    )
    folders = {"llama7b": model_folders["llama"]}
    folders["opt6.7b"] = build_model(opt, tmp_path_factory.mktemp("opt"), tokenizer)
    for name, folder in folders.items():
        (root / name).symlink_to(folder)
    return root


def test_all_families_are_calibrated_compressed_and_evaluated_once(models, tmp_path):
    with ThreadPoolExecutor(2) as pool:  # each script uses its own names
        runs = list(pool.map(lambda name: script(tmp_path, f"compress_{name}", models / name, "cpu"), RUN))
    assert [run.returncode for run in runs] == [0] * len(RUN), runs
    for name in RUN:
        for target in ("80p", "60p"):
            assert (tmp_path / "compressed_models" / f"{name}_{target}" / "hisvd.json").is_file()
        reports = json.loads((tmp_path / "results" / f"compress_{name}.json").read_text())
        assert [report["target_compression"] for report in reports] == [0.8, 0.6]
        assert "Saved to" in (tmp_path / "logs" / f"compress_{name}.log").read_text()

    (tmp_path / "some").mkdir()
    for name in SOME:
        (tmp_path / "some" / name).symlink_to(models / name)
    calibrated = script(tmp_path, "calibrate_all", tmp_path / "some", "cpu")
    assert calibrated.returncode == 0 and calibrated.stdout.count("nothing to do") == len(SOME), calibrated
    evaluated = script(tmp_path, "evaluate_all", tmp_path / "some", "cpu")
    assert evaluated.returncode == 0, evaluated
    for name in SOME:
        kept = [row["linear_kept"] for row in json.loads((tmp_path / "results" / f"{name}.json").read_text())]
        assert kept[0] == 1 and 0.599 <= kept[2] <= 0.6 < 0.799 <= kept[1] <= 0.8
    again = script(tmp_path, "evaluate_all", tmp_path / "some", "cpu")
    assert again.returncode == 0 and again.stdout.count("is up to date") == len(SOME), again
    again = script(tmp_path, "compress_llama7b", models / "llama7b", "cpu")
    assert again.returncode == 0 and "all targets exist" in again.stdout


def test_the_other_scripts_differ_from_the_first_in_their_names_alone(tmp_path):
    """In the place of Python stands what prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    printed = {}
    for name in (RUN[0], *OTHERS):
        result = script(tmp_path, f"compress_{name}", tmp_path / name, "cpu", python=python)
        assert result.returncode == 0, result
        printed[name] = result.stdout
    assert all(f"{program}.py --model_path" in printed[RUN[0]] for program in ("calibrate", "compress"))
    for name in OTHERS:
        assert printed[name] == printed[RUN[0]].replace(RUN[0], name)


def test_first_error_stops_a_script(models, tmp_path):
    failed = script(tmp_path, "compress_llama7b", tmp_path / "missing", "cpu")
    assert failed.returncode == 2 and "missing" in failed.stdout and "Traceback" not in failed.stdout
    assert not (tmp_path / "logs" / "compress_llama7b.log").exists()
    for name in (*(f"compress_{name}" for name in RUN + OTHERS), "calibrate_all", "evaluate_all"):
        bare = script(tmp_path, name)
        assert bare.returncode == 2 and f"usage: bash scripts/{name}.sh MODEL" in bare.stderr
    none = script(tmp_path, "evaluate_all", tmp_path, "cpu")
    assert none.returncode == 2 and "has none of the folders" in none.stderr
