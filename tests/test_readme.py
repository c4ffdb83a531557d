"""The README's examples, run from top to bottom in one folder as a reader would, on a tiny model."""

import ast
import importlib
import inspect
import json
import re
import shlex

import pytest
from conftest import PROGRAMS, ROOT, run

import hisvd
from hisvd.utils.data_utils import CALIBRATION_SPLIT, EVALUATION_SPLIT, load_text

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M))
# What stands in the README → what is run in its place; MODEL is the tiny model. Data sets are local copies in data/.
STAND_INS = {
    "/models/Llama-2-7b-hf": "MODEL",
    "--nsamples 256 --seqlen 2048": "--nsamples 6 --seqlen 32",
    "llama-7b_n256_s2048_with_hessian": "llama-7b_n6_s32_with_hessian",
    "nsamples=256, seqlen=2048": "nsamples=6, seqlen=32",
    "--model_path M ": "--model_path MODEL ",
    "--calib_cache C ": "--calib_cache calibration_cache/llama-7b_n6_s32_with_hessian ",
    "--layers 27,28,29 --d_r 1,2,4,8,16,32": "--layers 1,2,3 --d_r 1,2,4,8,16",
}
# Commands that take minutes, GPUs or the network: why they are not run here, and what runs in their place.
NOT_RUN = {
    "bash scripts/quickstart.sh": "fetches the real model; test_real.py runs the same chain on it",
    "bash scripts/test.sh": "runs these tests",
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
    documents = [json.dumps({"text": text}) for text in test.split("\n\n")[:20]]
    (tmp_path / "data" / "c4-validation.json").write_text("\n".join(documents))
    return tmp_path


def test_all_examples_run_from_top_to_bottom(model_folders, folder, capsys):
    assert README.count("```") == 2 * len(BLOCKS), "a block of another shape is run by nothing"
    used = set()
    for kind, block in BLOCKS:
        for text in STAND_INS:
            if text in block:
                block = block.replace(text, STAND_INS[text])
                used.add(text)
        block = block.replace("MODEL", str(model_folders["llama"]))
        if kind == "python":
            names = {}
            exec(compile(block, "README.md", "exec"), names)
            if "result" in names:
                assert 0.799 <= names["result"].report["linear_kept"] <= 0.8
                assert names["plan"].ranks == names["result"].plan.ranks
                assert names["figures"]["perplexity"].keys() == {"wikitext2", "c4"}
            else:
                assert "Low-rank factors are" in capsys.readouterr().out
            continue
        assert kind == "bash", f"a block of {kind or 'no language'} is run by nothing"
        for words in commands(block):
            if start := not_run(words):
                used.add(start)
                continue
            interpreter, file, *arguments = words
            assert interpreter == "python" and (ROOT / file).is_file(), f"neither run nor in NOT_RUN: {words}"
            result = run(file.removesuffix(".py"), *arguments)
            assert result.code == 0, (words, result.error)
    assert used == STAND_INS.keys() | NOT_RUN.keys(), "entries that no example needs any more"

    for made in ("calibration_cache/llama-7b_n6_s32_with_hessian/manifest.json", "results/llama7b.json", "study.png"):
        assert (folder / made).is_file(), made
    kept = [row["linear_kept"] for row in json.loads((folder / "results" / "llama7b.json").read_text())]
    assert kept[0] == 1 and 0.799 <= kept[1] <= 0.8
    assert json.loads((folder / "OUT" / "hisvd.json").read_text())["settings"]["export"] == "int6"


def test_what_is_not_run_exists_and_has_the_options_that_it_is_given(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for words in (words for kind, block in BLOCKS if kind == "bash" for words in commands(block) if not_run(words)):
        if "vllm" in " ".join(words):  # names no file
            continue
        files = [word for word in words if word.endswith((".sh", ".py", ".txt")) and not word.startswith("-")]
        assert (ROOT / files[0]).is_file(), words
        if words[0] == "python" and not words[1].startswith("examples/"):
            click_command(words[1]).make_context(words[1], words[2:])  # refuses what it does not know


def test_options_in_the_text_exist(monkeypatch):
    """Inline code that names a program has that program's options, other inline code some program's."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    any_program = set().union(*(option_names(command) for command in PROGRAMS.values()))
    for span in INLINE:
        file = re.search(r"[\w/]+\.py(?= -)", span.replace("\n", " "))
        known = option_names(click_command(file.group())) if file else any_program
        for option in re.findall(r"(?<![\w-])--\w+", span):
            assert option in known, span


def test_functions_in_the_text_take_the_arguments_that_they_are_shown_with():
    calls = [ast.parse(span, mode="eval").body for span in INLINE if re.match(r"hisvd\.\w+\(", span)]
    assert calls
    for call in calls:
        function = getattr(hisvd, call.func.attr)
        inspect.signature(function).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_options_table_lists_every_option_of_a_program(program):
    section = re.search(rf"^### {program}\.py\n(.*?)^##", README, re.S | re.M).group(1)
    listed = re.findall(r"--\w+", "".join(row.split("|")[1] for row in section.splitlines() if row.startswith("| `")))
    assert set(listed) == option_names(PROGRAMS[program])
