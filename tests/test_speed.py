"""evaluate.py --speed: several models beside a reference, and the memory of each."""

import itertools
import json

import psutil
import pytest
import torch
from conftest import build_model, expect_sentence, run, short_text
from test_evaluation import row_of
from transformers import GPT2Config

import hisvd
from hisvd import evaluation
from hisvd.errors import HiSVDError
from hisvd.utils import speed_utils
from hisvd.utils.load_utils import bytes_in_memory


def test_speed_beside_a_reference_that_is_no_row(chain, model_folders, tmp_path, monkeypatch):
    """Also where memory does not hold both at once; the figures are counted, not timed: 1, 2, 3 …"""
    calls, folder = itertools.count(1), chain("llama", "0.5", "out")
    monkeypatch.setattr(speed_utils, "TIMED", dict.fromkeys(speed_utils.TIMED, lambda *_: next(calls)))
    monkeypatch.setattr(evaluation, "peaks_on_cpu", lambda path, *_: {"loading_peak_bytes": len(path) * 10**6})
    options = ["--datasets", "python-docs", "--seqlen", 32, "--nsamples", 1, "--json", tmp_path / "e.json"]
    beside = ["--speed", "--reference", model_folders["llama"]]
    result = run("evaluate", "--model_path", folder, *options, *beside)
    assert result.code == 0 and row_of(result, model_folders["llama"], 0), result
    (figures,) = json.loads((tmp_path / "e.json").read_text())
    speeds, reference = figures["speed"], figures["speed"]["reference"]
    assert reference["model"] == str(model_folders["llama"]) and speeds["took_turns"]
    # Three rounds of five figures in turns: the reference has 1, 11, 21 of the first figure, the model 2, 12, 22.
    assert (reference["prefill_tokens_per_s"], speeds["prefill_tokens_per_s"]) == (11, 12)
    assert speeds["ratios"]["prefill_tokens_per_s"] == pytest.approx(12 / 11)
    assert speeds["ratios"]["time_to_first_token_s"] == pytest.approx(19 / 20)
    ratio = len(str(folder)) / len(str(model_folders["llama"]))
    assert speeds["ratios"]["loading_peak_bytes"] == pytest.approx(ratio)

    memory = psutil.virtual_memory()
    free = 2 * bytes_in_memory(model_folders["llama"], torch.float32)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=free))
    result = run("evaluate", "--model_path", folder, *options, *beside)
    assert result.code == 0 and "one after the other" in result.output
    assert not json.loads((tmp_path / "e.json").read_text())[0]["speed"]["took_turns"]

    expect_sentence(run("evaluate", "--model_path", folder, *options, *beside[1:]), "--reference", "--speed")


def test_the_reference_is_the_first_original(chain, model_folders, monkeypatch):
    monkeypatch.setattr(evaluation, "peaks_on_cpu", lambda *_: {})
    monkeypatch.setattr(speed_utils, "TIMED", dict.fromkeys(speed_utils.TIMED, lambda *_: 1.0))
    folders = [chain("llama", "0.5", "a"), model_folders["llama"], chain("llama", "0.8", "b")]
    settings = hisvd.EvaluationSettings(seqlen=32, speed=True)
    texts = evaluation.load_texts(["python-docs"], settings)

    def references(paths):
        speeds = evaluation.compared_speeds(paths, texts, settings, hisvd.Resources())
        return [figures.get("reference", {}).get("model") for figures in speeds]

    assert references(folders) == [str(folders[1]), None, str(folders[1])]
    assert references([folders[0], folders[2]]) == [None, str(folders[0])]


def test_peaks_of_a_process_that_fails_name_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_utils, "MEASURE_PEAKS", "raise MemoryError")
    with pytest.raises(HiSVDError, match=r"nowhere.*--speed"):
        speed_utils.peaks_on_cpu(str(tmp_path / "nowhere"), "float32", torch.zeros(1, 8, dtype=torch.long))


def test_a_prompt_may_take_all_positions(tmp_path, tokenizer, monkeypatch):
    """GPT-2 has learned positions, and none for a token after them."""
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    folder = build_model(config, tmp_path / "gpt2", tokenizer)
    monkeypatch.setattr(evaluation, "peaks_on_cpu", lambda *_: {})
    monkeypatch.setattr(speed_utils, "TIMED", dict.fromkeys(speed_utils.TIMED, lambda *_: 1.0))
    settings = hisvd.EvaluationSettings(seqlen=64, speed=True)
    texts = evaluation.load_texts([short_text()], settings)
    (figures,) = evaluation.compared_speeds([folder], texts, settings, hisvd.Resources())
    assert figures["prompt_tokens"] == 64


def test_every_model_reports_the_length_of_its_own_prompt(model_folders, monkeypatch):
    monkeypatch.setattr(evaluation, "peaks_on_cpu", lambda *_: {})
    monkeypatch.setattr(speed_utils, "TIMED", dict.fromkeys(speed_utils.TIMED, lambda *_: 1.0))
    monkeypatch.setattr(speed_utils, "run_once", lambda *_: None)
    lengths = {str(model_folders["llama"]): 16, str(model_folders["qwen2"]): 24}
    monkeypatch.setattr(evaluation, "prompt_for", lambda path, *_: torch.zeros(1, lengths[str(path)], dtype=torch.long))
    settings = hisvd.EvaluationSettings(speed=True)
    speeds = evaluation.compared_speeds(list(lengths), {}, settings, hisvd.Resources())
    assert [figures["prompt_tokens"] for figures in speeds] == list(lengths.values())
