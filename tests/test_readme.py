"""The examples of the README and of the other pages, run from top to bottom in one folder as a reader would, on a tiny
model."""

import ast
import importlib
import inspect
import json
import re
import shlex

import pytest
from conftest import PROGRAMS, ROOT, run
from pages import DOCS, README, blocks_of, spans_of, text_of

import hisvd
from hisvd.utils.data_utils import CALIBRATION_SPLIT, EVALUATION_SPLIT, load_text

CACHE = "calibration_cache/llama-7b_n6_s32_with_hessian"
# What stands on the pages → what is run in its place; MODEL is the tiny model. Data sets are local copies in data/.
STAND_INS = {
    "/models/Llama-2-7b-hf": "MODEL",
    "--nsamples 256 --seqlen 2048": "--nsamples 6 --seqlen 32",
    "llama-7b_n256_s2048_with_hessian": "llama-7b_n6_s32_with_hessian",
    "nsamples=256, seqlen=2048": "nsamples=6, seqlen=32",
    " models/smollm2-135m": " MODEL",
    "--dataset python-docs --nsamples 32 --grad_nsamples 16 --seqlen 512": "--nsamples 6 --seqlen 32",
    "smol_n32_s512": "smol_n6_s32",
    "--datasets python-docs --seqlen 512": "--datasets wikitext2 --seqlen 32",
    "--model_path M ": "--model_path MODEL ",
    "--calib_cache C ": f"--calib_cache {CACHE} ",
    '"M", "C"': f'"MODEL", "{CACHE}"',
    "--layers 27,28,29 --d_r 1,2,4,8,16,32": "--layers 1,2,3 --d_r 1,2,4,8,16",
}
# Commands that take minutes, GPUs or the network: why they are not run here, and what runs in their place.
NOT_RUN = {
    "bash scripts/quickstart.sh": "fetches the real model; test_real.py runs the same chain on it",
    "bash scripts/test.sh": "runs these tests",
    "hisvd calibrate --dry_run": "measures the machine; test_estimates.py runs it",
    "python examples/compress.py": "test_examples.py runs it on a tiny model",
    "python examples/finetune.py": "trains; test_finetuning.py runs it on a tiny model",
    "pip install hisvd[vllm]": "gigabytes; scripts/test_vllm.sh installs it",
    "vllm serve": "needs vLLM; test_vllm.py serves a tiny model",
    "pip install -r requirements.txt": "installs from the network; scripts/environment.sh does it for test.sh",
    "python benchmarks/quality.py": "hours; test_benchmarks.py runs it on a tiny model",
    "torchrun --nproc_per_node=8 calibrate.py": "8 GPUs; test_distributed.py starts 2 processes",
    "bash scripts/compress_llama7b.sh": "needs CUDA; test_scripts.py runs it on the CPU",
    "bash scripts/calibrate_all.sh": "needs CUDA; test_scripts.py runs it on the CPU",
    "bash scripts/evaluate_all.sh": "needs CUDA; test_scripts.py runs it on the CPU",
}
SHOWN = ("text", "bibtex")  # what such blocks hold is not ours to run
ELSEWHERE = {
    "extending.md": "test_docs.py runs it",
    "large_models.md": "its command has placeholders; running.md has the same",
    "options.md": "test_docs.py compares it with the programs",
}
PAGES = [README, *(page for page in DOCS if page.name not in ELSEWHERE)]


def commands(block):
    """The words of every command of a bash block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def not_run(words):
    return next((start for start in NOT_RUN if words[: len(start.split())] == start.split()), None)


def click_command(file):
    """The click command of a program or benchmark, by its path from the root."""
    name = file.removesuffix(".py")
    return PROGRAMS[name] if name in PROGRAMS else importlib.import_module(name.removeprefix("benchmarks/")).main


def option_names(command):
    names = (name for option in command.params for name in (*option.opts, *option.secondary_opts))
    return {name for name in names if name.startswith("--")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the reader, with small local copies of the data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HISVD_DATA_DIR", raising=False)
    train, test = (load_text("python-docs", split, "data")[:40_000] for split in (CALIBRATION_SPLIT, EVALUATION_SPLIT))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext2-train.txt").write_text(train)
    (tmp_path / "data" / "wikitext2-test.txt").write_text(test)
    (tmp_path / "notes.txt").write_text(test)
    documents = [json.dumps({"text": text}) for text in test.split("\n\n")[:20]]
    (tmp_path / "data" / "c4-validation.json").write_text("\n".join(documents))
    return tmp_path


def test_all_examples_run_from_top_to_bottom(model_folders, folder, capsys):
    used, found = set(), {}
    for page in PAGES:
        for kind, block in blocks_of(page):
            for text in STAND_INS:
                if text in block:
                    block = block.replace(text, STAND_INS[text])
                    used.add(text)
            block = block.replace("MODEL", str(model_folders["llama"]))
            if kind == "python":
                names = {}
                exec(compile(block, page.name, "exec"), names)
                found |= names
            elif kind == "json":
                json.loads(block)
            elif kind == "bash":
                used |= run_commands(commands(block))
            else:
                assert kind in SHOWN, f"a block of {kind or 'no language'} in {page.name} is checked by nothing"
    assert used == STAND_INS.keys() | NOT_RUN.keys(), "entries that no example needs any more"

    assert "Low-rank factors are" in capsys.readouterr().out
    assert 0.799 <= found["result"].report["linear_kept"] <= 0.8
    assert found["plan"].ranks == found["result"].plan.ranks
    assert found["figures"]["perplexity"].keys() == {"wikitext2", "c4"}
    for made in (f"{CACHE}/manifest.json", "results/llama7b.json", "study.png", "OUT_within_5_percent/hisvd.json"):
        assert (folder / made).is_file(), made
    kept = [row["linear_kept"] for row in json.loads((folder / "results" / "llama7b.json").read_text())]
    assert kept[0] == 1 and 0.799 <= kept[1] <= 0.8
    assert json.loads((folder / "OUT" / "hisvd.json").read_text())["settings"]["export"] == "int6"


def run_commands(lines):
    """Run each of a block's commands; returns the entries of NOT_RUN that it used."""
    used = set()
    for words in lines:
        if start := not_run(words):
            used.add(start)
            continue
        program, name, *arguments = words
        assert program == "hisvd" and name in PROGRAMS, f"neither run nor in NOT_RUN: {words}"
        result = run(name, *arguments)
        assert result.code == 0, (words, result.error)
    return used


def test_what_is_not_run_exists_and_has_the_options_that_it_is_given(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    blocks = [block for page in PAGES for kind, block in blocks_of(page) if kind == "bash"]
    for words in (words for block in blocks for words in commands(block) if not_run(words)):
        if "vllm" in " ".join(words):  # names no file
            continue
        if words[0] == "hisvd":
            PROGRAMS[words[1]].make_context(words[1], words[2:])
            continue
        files = [word for word in words if word.endswith((".sh", ".py", ".txt")) and not word.startswith("-")]
        assert (ROOT / files[0]).is_file(), words
        if words[0] == "python" and not words[1].startswith("examples/"):
            click_command(words[1]).make_context(words[1], words[2:])  # refuses what it does not know


@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if page.name != "options.md"], ids=lambda p: p.name)
def test_options_in_the_text_exist(page, monkeypatch):
    """Inline code that names a program has that program's options, other inline code some program's."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    any_program = set().union(*(option_names(command) for command in PROGRAMS.values()))
    for span in spans_of(page):
        line = re.sub(r"\bhisvd (calibrate|compress|evaluate)(?= -)", r"\1.py", span.replace("\n", " "))
        file = re.search(r"[\w/]+\.py(?= -)", line)
        known = option_names(click_command(file.group())) if file else any_program
        for option in re.findall(r"(?<![\w-])--\w+", span):
            assert option in known, span


def test_functions_in_the_text_take_the_arguments_that_they_are_shown_with():
    spans = [span for page in (README, *DOCS) for span in spans_of(page)]
    calls = [ast.parse(span, mode="eval").body for span in spans if re.match(r"hisvd\.\w+\(", span)]
    assert calls
    for call in calls:
        function = getattr(hisvd, call.func.attr)
        inspect.signature(function).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 200
