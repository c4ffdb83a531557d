"""The Python API: the same results as the programs, silence, refusals, documentation."""

import ast
import doctest
import inspect
import re
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, calibrate_arguments, run, saved_tensors, short_text

import hisvd
from hisvd.cli import calibrate, compress, evaluate
from hisvd.utils.data_utils import EVALUATION_SPLIT, load_text

QUIET = hisvd.Resources(progress=False)
CALIBRATION = hisvd.CalibrationSettings(nsamples=6, seqlen=32, dataset=short_text(), batch_size=4)


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


FUNCTIONS = ("calibrate", "estimate", "plan", "compress", "evaluate", "load")
FUNCTIONS += ("compression_report", "evaluation_report")
FUNCTIONS += ("attention_residual_study", "export_sparse_int6_model")
SETTINGS = ("CalibrationSettings", "CompressionSettings", "EvaluationSettings", "Resources", "StudySettings")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_returns_and_raises(name):
    function = getattr(hisvd, name)
    text = inspect.getdoc(function)
    documented = re.findall(r"^    (\w+): ", re.search(r"^Args:\n(.*?)^Returns:", text, re.S | re.M).group(1), re.M)
    assert documented == list(inspect.signature(function).parameters)
    assert re.search(r"^Raises:\n    HiSVDError: ", text, re.M) and "\nExample:\n    >>> " in text


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_say_what_each_field_is_and_its_default(name):
    settings = getattr(hisvd, name)
    entries = re.split(r"^    (?=\w+: )", inspect.getdoc(settings).partition("Raises:")[0], flags=re.M)[1:]
    described = {key: " ".join(text.split()) for key, text in (entry.split(": ", 1) for entry in entries)}
    assert list(described) == [field.name for field in fields(settings)]
    for field in fields(settings):
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        said = "None (the default): " if field.default is None else f"Default: {default}."
        assert said in described[field.name], field.name


def test_the_examples_of_the_docstrings_run(model_folders, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HISVD_DATA_DIR", raising=False)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama-7b").symlink_to(model_folders["llama"])
    (tmp_path / "data").mkdir()
    text = load_text("python-docs", EVALUATION_SPLIT, "data")[:20_000]
    for split in ("train", "test"):
        (tmp_path / "data" / f"wikitext2-{split}.txt").write_text(text)
    names = {"tokenizer": tokenizer, "text": text}
    smaller = {"nsamples=128, seqlen=2048": "nsamples=6, seqlen=32", '"cuda"': '"cpu"', "[30, 31]": "[2, 3]"}
    for name in FUNCTIONS:
        for example in doctest.DocTestParser().get_examples(inspect.getdoc(getattr(hisvd, name))):
            source = example.source
            for shown, run_instead in smaller.items():
                source = source.replace(shown, run_instead)
            if example.want:
                assert repr(eval(source, names)) == example.want.strip(), source
            else:
                exec(source, names)


@pytest.mark.parametrize("program", [calibrate, compress, evaluate])
def test_the_programs_parse_call_and_print(program):
    (main,) = (n for n in ast.parse(inspect.getsource(program)).body if getattr(n, "name", "") == "main")
    assert main.end_lineno - main.body[0].lineno < 30


def test_the_library_neither_prints_nor_knows_click():
    for folder in ("hisvd", "component", "utils"):
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text()
            assert "import click" not in text and not re.search(r"^\s*print\(", text, re.M), file
