"""The Python API: the same results as the programs, silence, refusals."""

import ast
import inspect
import re

import pytest
import torch
from conftest import ROOT, calibrate_arguments, run, saved_tensors

import hisvd
from hisvd.cli import calibrate, compress, evaluate

QUIET = hisvd.Resources(progress=False)
CALIBRATION = hisvd.CalibrationSettings(nsamples=6, seqlen=32, dataset="python-docs", batch_size=4)


@pytest.mark.parametrize("update", ["sequential", "none"])
def test_the_api_gives_what_the_programs_give_and_prints_nothing(model_folders, tmp_path, capfd, update):
    model, settings = model_folders["llama"], hisvd.CompressionSettings(update=update)
    cache = hisvd.calibrate(model, tmp_path / "cache", CALIBRATION, QUIET)
    results = hisvd.compress(model, cache, tmp_path / "api", [0.8, 0.5], settings, QUIET)
    figures = hisvd.evaluate(results[0].path, ["python-docs"], hisvd.EvaluationSettings(seqlen=32, nsamples=3), QUIET)
    assert capfd.readouterr() == ("", "")
    assert figures["perplexity"]["python-docs"]["perplexity"] > 1

    assert run("calibrate", *calibrate_arguments(model, tmp_path)).code == 0
    where = ["--model_path", model, "--calib_cache", tmp_path / "tiny_n6_s32_with_hessian", "--update", update]
    assert run("compress", *where, "--target_compression", "0.8,0.5", "--save_model", tmp_path / "program").code == 0
    for result in results:
        left = saved_tensors(result.path)
        right = saved_tensors(tmp_path / result.path.name.replace("api", "program"))
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_wrong_settings_are_refused_by_name(caches):
    for settings in ({"allocation": "best"}, {"factors": "qr"}, {"update": "twice"}, {"lwe_strength": -1.0}):
        with pytest.raises(hisvd.HiSVDError, match=f"--{next(iter(settings))}"):
            hisvd.CompressionSettings(**settings)
    with pytest.raises(hisvd.HiSVDError, match="--sampling"):
        hisvd.CalibrationSettings(sampling="last")
    for target in (0, 1.5, -0.1):
        with pytest.raises(hisvd.HiSVDError, match=r"outside \(0, 1\]"):
            hisvd.plan(caches["llama"], target)


def test_the_api_is_documented():
    for name in ("calibrate", "plan", "compress", "evaluate", "estimate", "load", "attention_residual_study"):
        text = inspect.getdoc(getattr(hisvd, name))
        assert text and "Raises:" in text, name


@pytest.mark.parametrize("program", [calibrate, compress, evaluate])
def test_the_programs_parse_call_and_print(program):
    (main,) = (n for n in ast.parse(inspect.getsource(program)).body if getattr(n, "name", "") == "main")
    assert main.end_lineno - main.body[0].lineno < 30


def test_the_library_neither_prints_nor_knows_click():
    for folder in ("hisvd", "component", "utils"):
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text()
            assert "import click" not in text and not re.search(r"^\s*print\(", text, re.M), file
