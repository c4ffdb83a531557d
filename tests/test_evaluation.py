"""evaluate.py and its text: perplexity against transformers' own loss, data sets, tables."""

import json
import math
import shutil
from dataclasses import replace

import datasets
import psutil
import pytest
import torch
from conftest import CONFIGS, HEADS, SHARED, build_model, calibrate_arguments, expect_sentence, run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

import hisvd
from hisvd import evaluation
from hisvd.calibration_cache import read_cache
from hisvd.cli import attention_study
from hisvd.errors import HiSVDError
from hisvd.settings import PROTOCOLS
from hisvd.utils import eval_utils, speed_utils
from hisvd.utils.data_utils import (
    CALIBRATION_SPLIT,
    EVALUATION_SPLIT,
    calibration_windows,
    evaluation_windows,
    load_documents,
    load_text,
    tokenize,
)
from hisvd.utils.load_utils import bytes_in_memory, load


def test_perplexity_equals_the_models_own_loss_in_any_chunking(model_folders, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    windows = torch.randint(300, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()
    for at_once in (2**26, 300 * 7):
        monkeypatch.setattr(eval_utils, "LOGITS_AT_ONCE", at_once)
        figures = eval_utils.perplexity(model, windows, "test", tokens_per_batch=32)
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


def test_original_folder_and_pt_in_one_table_with_json(chain, model_folders, tmp_path, monkeypatch):
    # A process for each takes long; test_readme.py starts them.
    peaks = ({"loading_peak_bytes": n * 10**6, "running_peak_bytes": 3 * 10**6} for n in (4, 2, 1))
    monkeypatch.setattr(evaluation, "peaks_on_cpu", lambda *_: next(peaks))
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
    names = [*speed_utils.TIMED, "loading_peak_bytes", "running_peak_bytes"]
    assert all(figures["speed"][name] > 0 for figures in (original, as_folder, as_file) for name in names)
    assert "reference" not in original["speed"] and "×)" not in row_of(result, model_folders["llama"], 1)
    for figures, path in ((as_folder, folder), (as_file, file)):
        assert figures["speed"]["reference"] == original["speed"] | {"model": str(model_folders["llama"])}
        row = row_of(result, path, 1)
        assert all(f"({figures['speed']['ratios'][name]:.2f}×)" in row for name in names)
        assert f"{figures['speed']['decode_tokens_per_s']:.1f} (" in row
        for name in names[-2:]:
            expected = figures["speed"][name] / original["speed"][name]
            assert figures["speed"]["ratios"][name] == pytest.approx(expected)
    for figures in (original, as_folder):
        assert f"{figures['perplexity']['python-docs']['perplexity']:.2f}" in result.output


def row_of(result, path, index):
    """The row of a model in one of the printed tables: 0 is that of perplexities, 1 that of speeds."""
    return [line for line in result.output.splitlines() if line.startswith(f"{path.name} ")][index]


def test_int6_layer_by_layer_and_what_cannot_be_combined_with_it(chain, tmp_path, monkeypatch):
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
    expect_sentence(
        run("evaluate", *options),
        str(folder),
        "of memory, but only 1,000 bytes are free",
        "--offload_folder",
        "--dtype",
    )
    assert run("evaluate", *options, *offload).code == 0


def test_bfloat16_keeps_the_rotary_frequencies_in_float32(chain, monkeypatch):
    seen = []
    real = evaluation.perplexity
    monkeypatch.setattr(evaluation, "perplexity", lambda model, *a: seen.append(model) or real(model, *a))
    options = ["--datasets", "python-docs", "--nsamples", 1, "--seqlen", 32, "--dtype", "bfloat16"]
    assert run("evaluate", "--model_path", chain("llama", "0.8", "out"), *options).code == 0
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].model.rotary_emb.inv_freq.dtype == torch.float32


def test_api_gives_the_programs_figures_and_shows_nothing(chain, tmp_path, capfd):
    folder = chain("llama", "0.8", "out")
    options = ["--datasets", "python-docs", "--seqlen", 32, "--nsamples", 3, "--json", tmp_path / "e.json"]
    assert run("evaluate", "--model_path", folder, *options).code == 0
    (expected,) = json.loads((tmp_path / "e.json").read_text())
    capfd.readouterr()
    settings, quiet = hisvd.EvaluationSettings(seqlen=32, nsamples=3), hisvd.Resources(progress=False)
    assert hisvd.evaluate(folder, ["python-docs"], settings, quiet) == expected
    offload = replace(settings, offload_folder=tmp_path / "offload")
    streamed = hisvd.evaluate(str(folder), ["python-docs"], offload, quiet)
    assert streamed["perplexity"]["python-docs"] == pytest.approx(expected["perplexity"]["python-docs"], rel=1e-5)
    assert capfd.readouterr() == ("", "")
    hisvd.evaluate(folder, ["python-docs"], settings)
    assert "perplexity on python-docs" in capfd.readouterr().err


def test_settings_that_no_run_could_use():
    for settings in ({"protocol": "gptq"}, {"dtype": "float8"}, {"seqlen": 1}, {"nsamples": 0}):
        (name, value), *_ = settings.items()
        with pytest.raises(HiSVDError, match=f"--{name} .*{value}"):
            hisvd.EvaluationSettings(**settings)
    with pytest.raises(HiSVDError, match="--datasets"):
        hisvd.evaluate("nowhere", [])


def test_perplexity_that_is_not_finite_is_refused(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    options = ["--model_path", folder, "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 2]
    study = [*options[:-2], "--n_blocks", 1, "--calib_blocks", 1, "--attention_residual"]
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expect_sentence(run("evaluate", *options, "--json", tmp_path / "e.json"), "python-docs", "nan")
    expect_sentence(run("evaluate", *study), "python-docs", "nan")
    assert not (tmp_path / "e.json").exists()
    tensors["model.norm.weight"][0] = 1
    tensors["model.layers.3.self_attn.q_proj.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expect_sentence(run("evaluate", *study), "layer 3", "NaN")


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator whose free memory a test sets; nothing can be computed on it."""
    free = {"bytes": 10**9}
    for module in (evaluation, attention_study):
        monkeypatch.setattr(module, "resolve_device", lambda device: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 10**10))
    return free


@pytest.mark.parametrize("output", ["out", "out.pt"])
def test_free_memory_is_the_accelerators(chain, accelerator, monkeypatch, output):
    path = chain("llama", "0.8", output)
    options = ["--model_path", path, "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 1]
    accelerator["bytes"] = 1000
    expect_sentence(run("evaluate", *options), str(path), "on cuda:0", "--offload_folder")
    expect_sentence(run("evaluate", *options[:4], "--attention_residual"), str(path), "on cuda:0")
    # The host's memory may be full: the model does not pass through it.
    accelerator["bytes"] = 10**9
    monkeypatch.setattr(psutil, "virtual_memory", lambda: None)
    loaded = []
    monkeypatch.setattr(evaluation, "load", lambda *arguments: loaded.append(arguments) or load(path))
    assert run("evaluate", *options).code == 0
    assert loaded == [(str(path), None, torch.device("cuda:0"))]


def test_pt_is_checked_against_the_hosts_memory(chain, monkeypatch):
    path = chain("llama", "0.8", "out.pt")
    needed = bytes_in_memory(path, None)
    assert 0.9 * path.stat().st_size < needed < path.stat().st_size
    options = ["--model_path", path, "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 1]
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed))
    assert run("evaluate", *options).code == 0
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed - 1))
    expect_sentence(run("evaluate", *options), "out.pt", "as a folder", "--offload_folder", "--dtype")


def test_bytes_in_memory_are_those_of_the_loaded_model(chain):
    for output in ("out", "out.pt"):
        path = chain("llama", "0.8", output)
        for dtype in (None, torch.bfloat16):
            state = load(path, dtype).state_dict()
            tensors = [tensor for name, tensor in state.items() if name != "lm_head.weight"]  # tied
            assert bytes_in_memory(path, dtype) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("stage", ["load", "perplexity"])
def test_exhausted_accelerator_names_the_way_out(chain, accelerator, monkeypatch, stage):
    path = chain("llama", "0.8", "out")

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(evaluation, "load", lambda path, *_: load(path))
    if stage == "load":
        monkeypatch.setattr(evaluation, "load", load)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exhausted)
    else:
        monkeypatch.setattr(evaluation, "perplexity", exhausted)
    result = run("evaluate", "--model_path", path, "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 1)
    expect_sentence(result, str(path), "memory is exhausted", "--offload_folder")


def test_seqlen_beyond_the_models_limit_is_refused(model_folders):
    options = ["--model_path", model_folders["llama"], "--datasets", "python-docs"]
    expect_sentence(run("evaluate", *options, "--seqlen", 129), "129", "128")
    assert run("evaluate", *options, "--nsamples", 1).code == 0  # by default the limit itself


RAW = {
    "wikitext2": " \r\n = A = \r\n \r\n text , and more \r\n \r\n",
    "ptb": " no it was n't black monday \n but while <unk> \n",
}
HUB_ROWS = {  # what the Hub's loading scripts make of those files
    "wikitext2": ["", " = A = \n", "", " text , and more \n", ""],
    "ptb": ["no it was n't black monday", "but while <unk>"],
    "c4": [f"document {i}" for i in range(2005)],
}


@pytest.fixture
def hub(monkeypatch):
    """The Hub's rows instead of the Hub."""
    names = {"Salesforce/wikitext": "wikitext2", "ptb-text-only/ptb_text_only": "ptb", "allenai/c4": "c4"}

    def load_dataset(repository, *_, split, streaming=False, **__):
        assert split in ("test", "train", "validation")
        rows = HUB_ROWS[names[repository]]
        return [{"text": row} for row in rows] if streaming else {"text": rows, "sentence": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("splits", [EVALUATION_SPLIT, CALIBRATION_SPLIT])
@pytest.mark.parametrize("name", HUB_ROWS)
def test_local_files_of_named_data_sets_are_joined_as_the_hubs_rows(tmp_path, hub, name, splits):
    rows = HUB_ROWS[name][: 2000 if splits is EVALUATION_SPLIT else None]
    from_hub = load_documents(name, splits, str(tmp_path))
    assert from_hub == rows
    if name == "c4":
        lines = "\n\n".join(json.dumps({"text": row, "url": ""}) for row in HUB_ROWS[name])
        (tmp_path / f"c4-{splits[name]}.json").write_text(lines)
    else:
        (tmp_path / f"{name}-{splits[name]}.txt").write_bytes(RAW[name].encode())
    datasets.load_dataset = None  # the local file is enough; the fixture restores it
    assert load_documents(name, splits, str(tmp_path)) == from_hub
    assert load_text(name, splits, str(tmp_path)) == "\n\n".join(rows)


def test_file_given_by_its_path_is_read_as_it_is(tmp_path):
    (tmp_path / "wikitext2-test.txt").write_bytes(RAW["wikitext2"].encode())
    documents = load_documents(str(tmp_path / "wikitext2-test.txt"), EVALUATION_SPLIT)
    assert documents == [RAW["wikitext2"].replace("\r\n", "\n")]
    (tmp_path / "text.md").write_text("a\n\nb")
    assert load_documents(str(tmp_path / "text.md"), EVALUATION_SPLIT) == ["a\n\nb"]
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert load_documents(str(tmp_path / "lines.jsonl"), EVALUATION_SPLIT) == ["a", "b"]
    (tmp_path / "lines.json").write_text('{"text": 1}\n')
    with pytest.raises(HiSVDError, match="'text' string"):
        load_documents(str(tmp_path / "lines.json"), EVALUATION_SPLIT)


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    """A tokenizer that starts a text with BOS, as those of Llama and Gemma do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = backend.token_to_id("~")
    backend.post_processor = processors.TemplateProcessing(single="~ $A", special_tokens=[("~", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="~")


@pytest.fixture(scope="module")
def bos_folders(tmp_path_factory, bos_tokenizer):
    root, gemma = tmp_path_factory.mktemp("bos"), Gemma2Config(**SHARED, **HEADS, head_dim=16)
    configs = {"gemma2": gemma, "llama": CONFIGS["llama"]}
    return {name: build_model(config, root / name, bos_tokenizer) for name, config in configs.items()}


def scored_windows(monkeypatch, measure, *arguments):
    """The windows that evaluate.py passes to `measure`."""
    seen, real = [], getattr(evaluation, measure)
    monkeypatch.setattr(
        evaluation, measure, lambda model, windows, *a: seen.append(windows) or real(model, windows, *a)
    )
    result = run("evaluate", *arguments, "--datasets", "python-docs", "--seqlen", 32, "--nsamples", 4)
    assert result.code == 0, result
    return seen[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_family_that_needs_bos_gets_it_in_every_window(bos_folders, bos_tokenizer, tmp_path, monkeypatch, protocol):
    text = load_text("python-docs", EVALUATION_SPLIT)
    ids = bos_tokenizer(text, add_special_tokens=False)["input_ids"]
    options = ["--model_path", bos_folders["gemma2"], "--protocol", protocol]
    windows = scored_windows(monkeypatch, "perplexity", *options)
    assert windows.shape == (4, 32) and (windows[:, 0] == bos_tokenizer.bos_token_id).all()
    assert windows[:, 1:].flatten().tolist() == ids[: 4 * 31]
    offload = ["--offload_folder", tmp_path / "offload"]
    assert torch.equal(scored_windows(monkeypatch, "streamed_perplexity", *options, *offload), windows)


def test_family_that_needs_bos_is_calibrated_with_it(bos_folders, bos_tokenizer, tmp_path):
    for name, folder in bos_folders.items():
        assert run("calibrate", *calibrate_arguments(folder, tmp_path, name)).code == 0
        cache = read_cache(tmp_path / f"{name}_n6_s32_with_hessian")
        assert cache.read_tokens().shape == (6, 32)
        for windows in (cache.read_tokens(), cache.read_held_out()):
            starts = windows[:, 0] == bos_tokenizer.bos_token_id
            assert starts.all() if name == "gemma2" else not starts.any()
    other = load_text("python-docs", CALIBRATION_SPLIT)
    assert bos_tokenizer.decode(read_cache(tmp_path / "gemma2_n6_s32_with_hessian").read_tokens()[0, 1:]) in other


def test_protocol_of_published_tables(bos_folders, bos_tokenizer, tmp_path, monkeypatch):
    """As SVD-LLM's code cuts windows: one BOS starts the stream, and every window shifts by one token."""
    documents = load_documents("python-docs", EVALUATION_SPLIT)
    published = torch.tensor(bos_tokenizer("\n\n".join(documents))["input_ids"])
    where = ["--model_path", bos_folders["llama"], "--json", tmp_path / "e.json"]
    windows = scored_windows(monkeypatch, "perplexity", *where, "--protocol", "svd-llm")
    assert torch.equal(windows.flatten(), published[: 4 * 32])
    (figures,) = json.loads((tmp_path / "e.json").read_text())
    assert figures["protocol"] == "svd-llm" and figures["documents"] == {"python-docs": len(documents)}
    assert torch.equal(scored_windows(monkeypatch, "perplexity", *where).flatten(), published[1 : 4 * 32 + 1])
    (figures,) = json.loads((tmp_path / "e.json").read_text())
    assert figures["protocol"] == "default"


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


@pytest.mark.parametrize("name", ["test.txt", "x" * 251 + ".txt"])
def test_layer_by_layer_files_of_one_name_are_two_data_sets(model_folders, tmp_path, name):
    """The first is shorter than the second, whose hidden states must not be cut to its length."""
    files = [tmp_path / language / name for language in ("en", "de")]
    for file, repeats in zip(files, (60, 240), strict=True):
        file.parent.mkdir()
        file.write_text("An apple a day. " * repeats)
    whole = hisvd.EvaluationSettings(seqlen=32)
    by_layer = replace(whole, offload_folder=tmp_path / "offload")
    found = [
        hisvd.evaluate(model_folders["llama"], list(map(str, files)), settings, hisvd.Resources(progress=False))
        for settings in (whole, by_layer)
    ]
    for file in map(str, files):
        expected, streamed = (figures["perplexity"][file] for figures in found)
        assert streamed["tokens_scored"] == expected["tokens_scored"]
        assert streamed["nll"] == pytest.approx(expected["nll"], rel=1e-5)
