"""evaluate.py and its text: perplexity against transformers' own loss, data sets, tables."""

import json
import math

import psutil
import pytest
import torch
from conftest import HEADS, SHARED, build_model, expect_sentence, run
from transformers import AutoModelForCausalLM, Gemma2Config

from hisvd.errors import HiSVDError
from hisvd.utils import eval_utils
from hisvd.utils.data_utils import (
    CALIBRATION_SPLIT,
    EVALUATION_SPLIT,
    calibration_windows,
    evaluation_windows,
    load_text,
    tokenize,
)


def test_perplexity_equals_the_models_own_loss_in_any_chunking(model_folders, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    windows = torch.randint(300, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()
    for at_once in (2**26, 300 * 7):
        monkeypatch.setattr(eval_utils, "LOGITS_AT_ONCE", at_once)
        figures = eval_utils.perplexity(model, windows, "test", tokens_a_batch=32)
        assert figures["nll"] == pytest.approx(expected, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert figures["tokens_scored"] == 5 * 15


def test_soft_capped_logits_are_the_models_own(tmp_path, tokenizer):
    config = Gemma2Config(**SHARED, **HEADS, head_dim=16, final_logit_softcapping=0.01)
    folder = build_model(config, tmp_path / "gemma2", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    windows = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()
    assert eval_utils.perplexity(model, windows, "test")["nll"] == pytest.approx(expected, rel=1e-5)


def test_original_folder_and_pt_in_one_table_with_json(chain, model_folders, tmp_path):
    file, folder = chain("llama", "0.5", "out.pt"), chain("llama", "0.5", "out")
    (tmp_path / "mine.txt").write_text("def f(x):\n    return x\n" * 200)
    paths = [a for path in (model_folders["llama"], folder, file) for a in ("--model_path", path)]
    options = ["--datasets", f"python-docs,{tmp_path / 'mine.txt'}", "--seqlen", 32, "--nsamples", 4]
    result = run("evaluate", *paths, *options, "--speed", "--json", tmp_path / "e.json")
    assert result.code == 0, result
    original, as_folder, as_file = json.loads((tmp_path / "e.json").read_text())
    assert original["linear_kept"] == 1 and 0.499 <= as_folder["linear_kept"] <= 0.5
    assert as_folder["perplexity"] == as_file["perplexity"] != original["perplexity"]
    assert as_file["weight_file_bytes"] == file.stat().st_size
    assert as_folder["perplexity"]["python-docs"]["tokens_scored"] == 4 * 31
    assert as_file["speed"]["prefill_tokens_per_s"] > 0 and as_file["speed"]["decode_tokens_per_s"] > 0
    for figures in (original, as_folder):
        assert f"{figures['perplexity']['python-docs']['perplexity']:.2f}" in result.output


def test_int6_layer_by_layer_and_what_does_not_go_with_it(chain, tmp_path, monkeypatch):
    folder = chain("llama", "0.8", "out", "--export", "int6", "--quality_gate_delta", "none")
    options = ["--model_path", folder, "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 3]
    offload = ["--offload_folder", tmp_path / "offload"]
    assert run("evaluate", *options, "--json", tmp_path / "whole.json").code == 0
    assert run("evaluate", *options, *offload, "--json", tmp_path / "streamed.json").code == 0
    whole, streamed = (json.loads((tmp_path / f"{n}.json").read_text())[0] for n in ("whole", "streamed"))
    assert streamed["perplexity"]["python-docs"] == pytest.approx(whole["perplexity"]["python-docs"], rel=1e-5)
    expect_sentence(run("evaluate", *options, *offload, "--speed"), "--speed", "--offload_folder")
    expect_sentence(run("evaluate", *options[:4], *offload, "--attention_residual"), "--offload_folder")
    expect_sentence(run("evaluate", "--model_path", chain("llama", "0.8", "m.pt"), *options[2:], *offload), "m.pt")

    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    expect_sentence(run("evaluate", *options), str(folder), "GB of memory", "--offload_folder", "--dtype")
    assert run("evaluate", *options, *offload).code == 0


def test_bfloat16_keeps_the_rotary_frequencies_in_float32(chain, monkeypatch):
    from hisvd.cli import evaluate

    seen = []
    real = evaluate.perplexity
    monkeypatch.setattr(evaluate, "perplexity", lambda model, *a: seen.append(model) or real(model, *a))
    options = ["--datasets", "python-docs", "--nsamples", 1, "--seqlen", 32, "--dtype", "bfloat16"]
    assert run("evaluate", "--model_path", chain("llama", "0.8", "out"), *options).code == 0
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].model.rotary_emb.inv_freq.dtype == torch.float32


def test_seqlen_beyond_the_models_limit_is_refused(model_folders):
    options = ["--model_path", model_folders["llama"], "--datasets", "python-docs"]
    expect_sentence(run("evaluate", *options, "--seqlen", 129), "129", "128")
    assert run("evaluate", *options, "--nsamples", 1).code == 0  # by default the limit itself


def test_named_data_sets_from_the_data_dir(tmp_path):
    (tmp_path / "wikitext2-test.txt").write_text(" = A = \n text\n")
    (tmp_path / "ptb-test.txt").write_text("no it was n't\n")
    documents = [json.dumps({"text": f"document {i}", "url": ""}) for i in range(2005)]
    (tmp_path / "c4-validation.json").write_text("\n".join(documents))
    assert load_text("wikitext2", EVALUATION_SPLIT, str(tmp_path)) == " = A = \n text\n"
    assert load_text("ptb", EVALUATION_SPLIT, str(tmp_path)) == "no it was n't\n"
    c4 = load_text("c4", EVALUATION_SPLIT, str(tmp_path))
    assert c4.startswith("document 0\n\ndocument 1\n\n") and c4.endswith("document 1999")


def test_python_docs_splits_are_disjoint():
    train, test = (load_text("python-docs", s, "data") for s in (CALIBRATION_SPLIT, EVALUATION_SPLIT))
    assert len(train) > 2 * len(test) > 20_000
    paragraphs = [p for p in test.split("\n\n") if len(p) > 300]
    assert paragraphs and sum(p in train for p in paragraphs) < len(paragraphs) / 10


def test_data_dir_from_the_environment(model_folders, tmp_path, monkeypatch):
    (tmp_path / "ptb-test.txt").write_text("no it was n't black monday\n" * 50)
    monkeypatch.setenv("HISVD_DATA_DIR", str(tmp_path))
    assert run("evaluate", "--model_path", model_folders["llama"], "--datasets", "ptb", "--seqlen", 16).code == 0


def test_windows(tokenizer):
    ids = tokenize("word " * 400, tokenizer)
    first = calibration_windows(ids, 3, 10, "first", 0, "t")
    assert torch.equal(first.flatten(), ids[:30])
    drawn = [calibration_windows(ids, 3, 10, "random", seed, "t") for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].shape == (3, 10)
    text = torch.arange(105)
    assert torch.equal(evaluation_windows(text, 10, None, "t").flatten(), text[:100])
    assert evaluation_windows(text, 10, 4, "t").shape == (4, 10)
    starts = calibration_windows(text, 50, 10, "random", 5, "t")
    assert torch.equal(starts - starts[:, :1], torch.arange(10).expand(50, 10))
    with pytest.raises(HiSVDError, match="105 tokens"):
        evaluation_windows(text, 106, None, "t")
    assert tokenizer.decode(tokenize("word", tokenizer)) == "word"
