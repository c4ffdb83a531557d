"""evaluate.py --tasks: scores of lm-evaluation-harness on tasks in local files; what cannot be scored is refused."""

import importlib.util
import json
import shutil

import datasets
import pytest
import torch
from conftest import expect_sentence, run
from transformers import AutoTokenizer

import hisvd
from hisvd.cli.evaluation_tables import result_table
from hisvd.evaluation_page import task_table
from hisvd.utils import distributed

TEXT = ("--datasets", "python-docs", "--seqlen", 32, "--nsamples", 1)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
DOCUMENTS = [
    {"question": f"Return {word} of the list", "choices": ["the first", "nothing", "x = 1"], "answer": i % 3}
    for i, word in enumerate(["all", "none", "some", "most", "few", "each", "any", "both"])
]


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[tasks]'")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Two task files on one file of documents."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "documents.json"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    files = [tmp_path / f"{name}.yaml" for name in ("quiz", "exam")]
    for file in files:
        file.write_text(TASK.format(name=file.stem, data=data))
    return files


def with_eos(folder):
    """The folder, whose tokenizer now has the EOS token that lm_eval needs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(folder)
    return folder


def accuracy(folder, documents):
    """The share of documents whose right choice has the highest likelihood after its question."""
    model, tokenizer = hisvd.load(folder), AutoTokenizer.from_pretrained(folder)

    def likelihood(question, choice):
        context, whole = (tokenizer(t, return_tensors="pt").input_ids for t in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_probabilities = model(whole).logits[0, :-1].log_softmax(-1)
        chosen = log_probabilities.gather(1, whole[0, 1:, None])
        return chosen[context.shape[1] - 1 :].sum().item()

    guesses = [max(range(3), key=lambda i, d=d: likelihood(d["question"], d["choices"][i])) for d in documents]
    return sum(g == d["answer"] for g, d in zip(guesses, documents, strict=True)) / len(documents)


def test_scores_are_in_the_table_and_in_the_file(lm_eval, tasks, chain, model_folders, tmp_path):
    original = with_eos(shutil.copytree(model_folders["llama"], tmp_path / "original"))
    folder = with_eos(chain("llama", "0.6", "out", "--update", "none"))
    paths = ["--model_path", original, "--model_path", folder]
    options = ["--tasks", ",".join(map(str, tasks)), "--json", tmp_path / "e.json"]
    result = run("evaluate", *paths, *TEXT, *options)
    assert result.code == 0, result
    assert "quiz acc_norm" in result.output and "exam acc_norm" in result.output
    written = json.loads((tmp_path / "e.json").read_text())
    for path, figures in zip((original, folder), written, strict=True):
        assert figures["perplexity"].keys() == {"python-docs"}
        assert figures["tasks"].keys() == {"quiz", "exam"}
        quiz = figures["tasks"]["quiz"]
        assert quiz["acc"] == pytest.approx(accuracy(path, DOCUMENTS)) and quiz["acc_stderr"] > 0
        assert quiz["samples"] == len(DOCUMENTS) and quiz["shots"] == 0 and "subtask_of" not in quiz
        assert f"{quiz['acc_norm']:.4f}" in result.output


def test_tasks_alone_and_few_documents_through_the_api(lm_eval, tasks, chain, capfd):
    folder = with_eos(chain("llama", "0.6", "out", "--update", "none"))
    settings = hisvd.EvaluationSettings(tasks=(str(tasks[0]),), task_limit=3)
    figures = hisvd.evaluate(folder, [], settings, hisvd.Resources(progress=False))
    assert capfd.readouterr().out == ""
    assert figures["perplexity"] == {} and figures["tasks"]["quiz"]["samples"] == 3
    alone = ["--datasets", "", "--tasks", tasks[0], "--task_limit", 3]
    result = run("evaluate", "--model_path", folder, *alone)
    assert result.code == 0 and "quiz acc_norm" in result.output and "ppl" not in result.output
    without = chain("llama", "0.6", "without.pt", "--update", "none")
    expect_sentence(run("evaluate", "--model_path", without, *alone), "BOS or EOS")


def test_unusable_tasks_are_refused_before_the_model_is_loaded(lm_eval, tasks, tmp_path, monkeypatch):
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: real(include_defaults=False))  # thousands of files
    options = ["--model_path", tmp_path, *TEXT, "--tasks"]
    expect_sentence(run("evaluate", *options, f"{tasks[0]},no_such_task"), "'no_such_task'", "lm_eval ls tasks")
    expect_sentence(run("evaluate", *options, tmp_path / "missing.yaml"), "missing.yaml")
    (tmp_path / "documents.json").unlink()
    expect_sentence(run("evaluate", *options, tasks[0]), str(tasks[0]))


def test_what_tasks_cannot_be_combined_with(model_folders, tmp_path, monkeypatch):
    options = ["--model_path", model_folders["llama"], *TEXT, "--tasks", "hellaswag"]
    expect_sentence(run("evaluate", *options, "--offload_folder", tmp_path), "--tasks", "--offload_folder")
    expect_sentence(run("evaluate", *options, "--attention_residual"), "--attention_residual")
    expect_sentence(run("evaluate", *options[:2], "--datasets", "", "--speed", *options[-2:]), "--datasets")
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "count", lambda: 2)
        with pytest.raises(hisvd.HiSVDError, match="torchrun"):
            hisvd.evaluate(model_folders["llama"], [], hisvd.EvaluationSettings(tasks=("hellaswag",)))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find_spec(name, *a)
    )
    expect_sentence(run("evaluate", *options), "lm_eval", "pip install 'hisvd[tasks]'")


def test_members_of_a_group_are_in_the_table_only_if_it_has_no_score():
    figures = {"model": "m", "linear_kept": 1, "weight_file_bytes": 10**6, "perplexity": {}}
    member = {"acc": 0.5, "acc_stderr": 0.1, "samples": 2, "shots": 0, "subtask_of": "group"}
    for group, header in (({"acc": 0.25}, "group acc"), ({"samples": 2}, "member acc")):
        results = [figures | {"tasks": {"group": group, "member": member}}]
        table = result_table(results)
        assert table.splitlines()[0].endswith(f"file MB  {header}")
        page = task_table(results, ["m"])
        assert f">{header}<" in page and page.count('scope="col"') == 2
