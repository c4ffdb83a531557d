"""The benchmarks that measure the library, on a tiny model: what they write, and what a second run reuses."""

import importlib
import json

import pytest
import torch
from click.testing import CliRunner
from conftest import CONFIGS, ROOT, build_model

from hisvd.integer_codes import INTEGERS
from hisvd.utils.data_utils import EVALUATION_SPLIT, load_text


@pytest.fixture
def run_benchmark(monkeypatch, model_folders, tmp_path):
    """run_benchmark("quality", *options) on a tiny model, 32 tokens per window, two targets: module, output."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    text = tmp_path / "text.txt"
    text.write_text(load_text("python-docs", EVALUATION_SPLIT, "data")[:30_000])

    def call(name: str, *options: str):
        module = importlib.import_module(name)
        for part in (importlib.import_module("common"), module):
            monkeypatch.setattr(part, "SEQLEN", 32, raising=False)
        names = list(module.METHODS)
        monkeypatch.setattr(module, "METHODS", {n: module.METHODS[n] for n in (names[0], names[-1])})
        monkeypatch.setattr(module, "TARGETS", [0.8, 0.6])
        where = ["--model_path", str(model_folders["llama"]), "--calibration_text", str(text)]
        arguments = [*where, "--work_dir", str(tmp_path / "work"), *(o.replace("TEXT", str(text)) for o in options)]
        result = CliRunner().invoke(module.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return module, result.stdout

    return call


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_quality_writes_tables_figures_and_a_plot_and_repeats_only_what_is_missing(run_benchmark, tmp_path):
    options = ["--datasets", "TEXT,python-docs", "--nsamples", "4", "--grad_nsamples", "2", "--eval_nsamples", "2"]
    module, tables = run_benchmark("quality", *options)
    work = tmp_path / "work"
    figures = json.loads((work / "quality.json").read_text())
    assert list(figures) == ["dense", *module.METHODS]
    assert figures["dense"].keys() == {str(tmp_path / "text.txt"), "python-docs"}
    for method in module.METHODS:
        assert list(figures[method]) == ["0.8", "0.6"] and method in tables
        assert all(ppl > 1 for by_text in figures[method].values() for ppl in by_text.values())
    assert (work / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert not list(work.glob("*/hisvd.json")), "compressed models are deleted once evaluated"

    before = written(work)
    (work / "plain-SVD.json").unlink()
    assert run_benchmark("quality", *options)[1] == tables
    made = {path.name for path, time in written(work).items() if before.get(path) != time}
    assert made == {"plain-SVD.json", "quality.json", "quality.png"}


def test_reference_figures_stand_beside_the_measured_ones(run_benchmark, tmp_path):
    module, table = run_benchmark("reference_figures", "--evaluation_text", "TEXT")
    records = json.loads((tmp_path / "work" / "reference_figures.json").read_text())
    rows = ["dense", *(name for name in module.METHODS for _ in module.TARGETS)]
    rows += ["plain SVD, uniform, ranks rounded down"] * 2
    assert [record["method"] for record in records] == rows
    assert all(record["perplexity"] > 1 and record["reference"] > 1 for record in records)

    before = written(tmp_path / "work")
    assert run_benchmark("reference_figures", "--evaluation_text", "TEXT")[1] == table
    changed = {path.name for path, time in written(tmp_path / "work").items() if before.get(path) != time}
    assert changed == {"reference_figures.json"}


def test_every_method_has_its_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("reference_figures")
    assert module.REFERENCE.keys() == module.METHODS.keys()


def test_sizes_in_bytes_stand_beside_torchao(monkeypatch, tokenizer, tmp_path):
    pytest.importorskip("torchao")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, common = importlib.import_module("bytes"), importlib.import_module("common")
    monkeypatch.setattr(common, "SEQLEN", 32)
    monkeypatch.setattr(module, "BYTES", [0.4])
    monkeypatch.setattr(module, "UPDATES", {"ours": "none"})
    text = tmp_path / "text.txt"
    text.write_text(load_text("python-docs", EVALUATION_SPLIT, "data")[:30_000])
    folder = build_model(CONFIGS["llama"], tmp_path / "model", tokenizer, torch.bfloat16)
    arguments = ["--model_path", folder, "--calibration_text", text, "--datasets", text, "--nsamples", 4]
    arguments += ["--grad_nsamples", 2, "--eval_nsamples", 2, "--work_dir", tmp_path / "work"]
    result = CliRunner().invoke(module.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "work" / "bytes.json").read_text())
    assert [row["name"] for row in rows] == ["16 bits", *(f"torchao {d}, to nearest" for d in INTEGERS), *["ours"] * 3]
    whole, int8, int4 = (row["size"] for row in rows[:3])
    assert whole > int8 > int4
    ours = [row["size"] for row in rows[3:]]
    # Headers of the files differ.
    assert ours == sorted(ours, reverse=True) and ours[0] < 1.05 * int8 and ours[-1] < 1.05 * int4
    assert (tmp_path / "work" / "bytes.png").read_bytes().startswith(b"\x89PNG")


def test_speed_writes_its_ratios(monkeypatch, model_folders, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("speed")
    for name, value in {"SEQLEN": 32, "NSAMPLES": 4, "BUDGETS": [0.9, 0.8]}.items():
        monkeypatch.setattr(module, name, value)
    arguments = ["--model_path", model_folders["llama"], "--work_dir", tmp_path / "work", "--json", tmp_path / "s.json"]
    result = CliRunner().invoke(module.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "s.json").read_text())
    assert len(found["ratios"]) == 6 and all(ratio > 0 for ratio in found["ratios"].values())
    assert found["ratios"]["textbook / --whitening input, perplexity"] == pytest.approx(1, abs=1e-3)
    assert all(name in result.output for name in found["ratios"])
