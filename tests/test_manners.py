"""How the programs behave towards who types: help, spelling, what is printed where, sentences for bad values."""

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.shell_completion import shell_complete
from conftest import PROGRAMS, ROOT, build_model, calibrate_arguments, expect_sentence, run, short_text
from huggingface_hub import ModelCard
from transformers import AutoConfig, LlamaConfig

import hisvd
from hisvd import choices, exports, settings
from hisvd.allocations import ALLOCATIONS, CLUSTERINGS
from hisvd.calibration_cache import read_cache
from hisvd.cli.options import Option
from hisvd.cli.programs import main as group
from hisvd.compression_figures import acting_settings
from hisvd.estimates import shapes_of
from hisvd.factor_forms import FORMS
from hisvd.moves import MOVES
from hisvd.planning import Plan
from hisvd.rank_metrics import RANK_METRICS
from hisvd.refinement import MODULATIONS
from hisvd.report import license_of, model_card, ranges, rank_table
from hisvd.updates import UPDATES
from hisvd.utils import progress
from hisvd.utils.data_utils import PROTOCOLS
from hisvd.utils.model_utils import empty_model
from hisvd.whitening_svd import WHITENINGS

DICTS = {"ALLOCATIONS": ALLOCATIONS, "CLUSTERINGS": CLUSTERINGS, "FORMS": FORMS, "MOVES": MOVES, "UPDATES": UPDATES}
DICTS |= {"RANK_METRICS": RANK_METRICS, "MODULATIONS": MODULATIONS, "WHITENINGS": WHITENINGS, "PROTOCOLS": PROTOCOLS}
DICTS |= {"EXPORTS": exports.EXPORTS, "LINEAR_DTYPES": exports.LINEAR_DTYPES}
OPTIONS = [(program, option) for program, main in PROGRAMS.items() for option in main.params]


def test_choices_are_the_keys_of_what_they_stand_for():
    listed = {name: value for name, value in vars(choices).items() if name.isupper()}
    for name, value in listed.items():
        assert value == tuple(DICTS[name]) if name in DICTS else getattr(settings, name) == value, name


def test_public_names_are_those_that_type_checkers_see():
    (seen,) = (node for node in ast.parse(inspect.getsource(hisvd)).body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in seen.body for alias in node.names}
    assert imported == {name: f"hisvd.{module}" for name, module in hisvd._MODULES.items()}
    assert set(hisvd.__all__) == imported.keys() <= set(dir(hisvd))
    for name, module in imported.items():
        assert getattr(hisvd, name).__module__ == module
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        hisvd.shrink  # noqa: B018


LIGHT = """
import sys
from hisvd.cli.programs import main
for line in sys.argv[1:]:
    try:
        main(line.split(), prog_name="hisvd")
    except SystemExit as end:
        assert end.code == 2 * ("best" in line), line
import hisvd
assert "compress" in dir(hisvd) and not {"torch", "transformers", "datasets"} & sys.modules.keys()
"""


def test_help_and_usage_errors_come_without_pytorch():
    lines = [f"{program} {option}" for program in PROGRAMS for option in ("-h", "--help", "--version")]
    lines += ["compress --calib_cache C --update best", "calibrate --seqlen best", "evaluate --best", "--version"]
    result = subprocess.run([sys.executable, "-c", LIGHT, *lines], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "report"])
def test_ctrl_c_while_libraries_are_imported_is_no_traceback(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    needed = {"calibrate": ["--model_name", "x"], "compress": ["--calib_cache", "C", "--save_model", "O"]}
    command = [sys.executable, ROOT / f"{program}.py", "--model_path", "M", *needed.get(program, [])]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (130, ""), result
    assert result.stderr == "Interrupted; run the same command again to resume where it stopped.\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_page_has_every_option_in_a_group_and_examples_that_parse(program):
    main = PROGRAMS[program]
    page = run(program, "-h").output
    assert page == run(program, "--help").output and "\nCommon options:\n" in page and "\nOutput:\n" in page
    for option in main.params:
        assert isinstance(option, Option) and len(option.help) > 15, option.name
        assert option.opts[0] in page, option.name
    assert ("[default" in page) == (program != "report")  # whose options have none
    for line in page.partition("Examples:\n")[2].splitlines():
        hisvd_, name, *words = shlex.split(line)
        assert (hisvd_, name) == ("hisvd", program) and group.get_command(None, name) is main
        assert not main.make_context(name, words).args


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_are_known_by_dashes_as_well(program):
    main = PROGRAMS[program]
    for option in main.params:
        for name in (*option.opts, *option.secondary_opts):
            value = option.type.choices[-1] if isinstance(option.type, click.Choice) else "7"
            if "_" in name:
                dashed = f"--{name[2:].replace('_', '-')}"
                pairs = [([name], [dashed])]
                if not option.is_flag:
                    pairs = [([name, value], [dashed, value]), ([name, value], [f"{dashed}={value}"])]
                for words, others in pairs:
                    found, same = (main.make_context("x", w, resilient_parsing=True).params for w in (words, others))
                    assert found[option.name] == same[option.name] != option.default, name


def test_options_of_other_programs_are_known(caches):
    result = run("compress", "--calib-cache", caches["llama"], "--grad-nsamples", 8)
    assert result.code == 2 and "'--grad-nsamples'. It belongs to hisvd calibrate." in result.error
    result = run("evaluate", "--dataset", "mine.txt")
    assert "It belongs to hisvd calibrate." in result.error and "'--datasets'" in result.error
    assert "belongs" not in run("evaluate", "--best").error


def test_the_shell_completes_choices_and_paths(monkeypatch, capsys):
    def completed(line):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        shell_complete(group, {}, "hisvd", "_HISVD_COMPLETE", "bash_complete")
        return capsys.readouterr().out.split()

    assert completed("hisvd comp") == ["plain,compress"]
    assert completed("hisvd compress --update n") == ["plain,none"]
    paths = {"calibrate": ["dataset", "output_dir"], "compress": ["calib_cache", "save_model", "report"]}
    paths |= {"evaluate": ["datasets", "json"], "report": ["figures", "calib_cache"]}
    for program, names in paths.items():
        for name in ("model_path", *names):
            assert completed(f"hisvd {program} --{name} mod") == ["file,mod"], (program, name)


def test_what_is_written_goes_to_json_and_nothing_else_is_said(model_folders, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    made = run("calibrate", *arguments, "--quiet", "--json", tmp_path / "c.json")
    cache = tmp_path / "tiny_n6_s32_with_hessian"
    assert (
        made.code == 0
        and made.error == ""
        and made.output.splitlines()[1:] == [f"Figures written to {tmp_path / 'c.json'}"]
    )
    assert made.output.count("\n") == 2 and str(cache) in made.output.splitlines()[0]
    figures = json.loads((tmp_path / "c.json").read_text())
    assert (figures["cache"], figures["layers"], figures["tokens"], figures["gradients"]) == (str(cache), 4, 192, True)

    where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--target_compression", 0.6]
    made = run("compress", *where, "--update", "none", "--save_model", tmp_path / "out", "--json", "-")
    (report,) = json.loads(made.output)
    assert report["linear_kept"] <= 0.6 and f"Saved to {tmp_path / 'out'}\n" in made.error
    assert "compressing layers\n" in made.error and "it/s" not in made.error  # a line, since this is no terminal
    assert f"--model_path {tmp_path / 'out'}\n" in made.error and "from_pretrained" in made.error

    options = ["--datasets", short_text(), "--seqlen", 32, "--nsamples", 1]
    shown = run("evaluate", "--model_path", tmp_path / "out", *options, "--verbose")
    assert re.search(r"hisvd \S+ torch \S+ transformers \S+, Python", shown.error) and "lower is better" in shown.output
    quiet = run("evaluate", "--model_path", tmp_path / "out", *options, "-q", "--json", "-")
    assert json.loads(quiet.output)[0]["seqlen"] == 32 and quiet.error == ""
    expect_sentence(run("evaluate", "--model_path", tmp_path / "out", "-q", "-v"), "--quiet", "--verbose")


def test_bars_are_for_terminals(monkeypatch, capsys):
    list(progress.progress_bar(range(3), "counting"))
    assert capsys.readouterr().err == "counting\n"
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    list(progress.progress_bar(range(1, 3), "counting", total=3, initial=1))
    with progress.progress_bar(None, "trying") as bar:
        bar.update()
    assert capsys.readouterr().err == "counting\ncounting: 2 of 3\ncounting: 3 of 3\ntrying\ntrying: 1\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(progress.progress_bar(range(3), "counting"))
    assert "3/3" in capsys.readouterr().err
    with progress.progress_shown(False):
        list(progress.progress_bar(range(3), "counting"))
    assert capsys.readouterr().err == ""


def test_layers_that_are_alike_share_a_row_and_unchanged_ones_are_named(caches):
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    options = ["--target_compression", 1, "--moves", "low_rank"]
    printed = run("compress", "--calib_cache", caches["llama"], "--plan_only", *options).output
    assert printed.startswith("Unchanged: all linears of layers 0–3\n") and "dense" not in printed
    sublayers = read_cache(caches["llama"]).sublayers
    ranks = {s.name: s.full_rank if s.layer == 1 else 8 for s in sublayers}
    _, _, row, _, unchanged = rank_table(Plan(0.7, "svd", ranks), sublayers).splitlines()
    assert row.startswith("0, 2–3 ") and unchanged == "Unchanged: all linears of layer 1"


def test_exported_linears_are_named(model_folders, caches, tmp_path):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"]
    options = ["--export", "int6", "--update", "none", "--quality_gate_delta", 0.01, "--target_compression", 1]
    result = run("compress", *where, *options)
    gate = json.loads((tmp_path / "out" / "hisvd.json").read_text())["quality_gate"]
    assert gate["exported"], "nothing to name"
    lines = dict(re.findall(r"^  ([\w.]+) of layers? (.*)$", result.output, re.M))
    for name in gate["exported"]:
        assert name.partition(".layers.")[2].split(".", 1)[1] in lines


@pytest.fixture
def model(model_folders):
    return model_folders["llama"]


BLOCKED = "FILE/inside"  # FILE is a file
BAD = {
    "calibrate": {
        "model_path": ["nowhere"],
        "model_name": ["", "x" * 300],
        "nsamples": ["0", "x"],
        "seqlen": ["1", "9999999999999999999999"],
        "dataset": ["nowhere"],
        "output_dir": [BLOCKED],
        "device": ["nowhere", ""],
        "data_dir": ["nowhere --dataset ptb"],
        "seed": ["x", "9999999999999999999999"],
        "grad_nsamples": ["0"],
        "batch_size": ["0"],
        "activation_budget_gb": ["-1", "nan"],
        "json_path": [BLOCKED, "FOLDER"],
    },
    "compress": {
        "model_path": ["nowhere"],
        "calib_cache": ["nowhere"],
        "target_compression": ["2", "x"],
        "target_bytes": ["0.5"],  # beside --target_compression
        "max_ppl_increase": ["x", "0.5"],  # beside --target_compression
        "save_model": [BLOCKED, f"{BLOCKED}/x.pt"],
        "device": ["nowhere"],
        "rank_multiple": ["0", "x"],
        "min_saving": ["-1", "nan"],
        "width_multiple": ["0"],
        "activation_budget_gb": ["-1", "nan"],
        "alpha": ["-1", "nan", "x"],
        "lwe_strength": ["-1", "nan"],
        "tail_redundancy_weight": ["-1", "inf"],
        "quality_gate_delta": ["-1", "x"],
        "json_path": [BLOCKED, "FOLDER"],
        "report": [BLOCKED],
    },
    "evaluate": {
        "model_paths": ["nowhere"],
        "datasets": ["nowhere", ""],
        "seqlen": ["1", "99999"],
        "nsamples": ["0"],
        "device": ["nowhere"],
        "data_dir": ["nowhere --datasets ptb"],
        "offload_folder": [BLOCKED],
        "reference": ["nowhere", "nowhere --speed"],
        "tasks": ["nowhere"],
        "task_limit": ["0"],
        "layers": ["x --attention_residual", "99 --attention_residual", "1"],
        "d_r": ["x --attention_residual", "-1 --attention_residual"],
        "n_blocks": ["0"],
        "calib_blocks": ["0", "99999 --attention_residual"],
        "plot": ["FOLDER/x.nothing --attention_residual", f"{BLOCKED}/x.png --attention_residual"],
        "json_path": [BLOCKED, "FOLDER"],
        "report": [BLOCKED],
        "prompts": ["x --offload_folder FOLDER"],
    },
    "report": {
        "figures": ["nowhere", "FOLDER", "FILE"],
        "model_paths": ["nowhere", "nowhere --calib_cache nowhere"],
        "calib_cache": ["nowhere"],
        "report": [BLOCKED],
    },
}


def bad_values():
    for program, option in OPTIONS:
        if isinstance(option.type, click.Choice):
            yield program, option, "no-such-choice"
        elif not option.is_flag:
            for value in BAD[program][option.name]:
                yield program, option, value


@pytest.mark.parametrize(("program", "option", "value"), bad_values(), ids=lambda v: getattr(v, "name", v) or "empty")
def test_a_bad_value_gives_a_sentence(program, option, value, model, caches, tmp_path):
    (tmp_path / "FILE").write_text("in the way")
    arguments = {
        "calibrate": calibrate_arguments(model, tmp_path / "caches"),
        "compress": ["--model_path", model, "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"],
        "evaluate": ["--model_path", model, "--datasets", short_text(), "--seqlen", 32, "--nsamples", 1],
        "report": ["--report", tmp_path / "pages"],
    }[program]
    if program == "compress":
        arguments += ["--target_compression", "0.8", "--update", "none"]
    if "--attention_residual" in value:
        arguments = arguments[:-2]
    words = [word.replace("FILE", str(tmp_path / "FILE")).replace("FOLDER", str(tmp_path)) for word in value.split()]
    expect_sentence(run(program, *arguments, option.opts[0], *(words or [""])))
    assert not (tmp_path / "out").exists()


def test_a_tied_head_counts_once():
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1}
    tied, untied = (
        shapes_of(empty_model(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=tie))).parameters
        for tie in (True, False)
    )
    assert untied - tied == 300 * 64


def test_the_card_names_the_original(chain, model_folders, tmp_path):
    out = chain("llama", "0.6", "out", "--update", "none", "--allocation", "loss")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == model_folders["llama"].name and card.data.library_name == "transformers"
    assert card.data.license is None and "lwe_strength" not in card.content and "| allocation | loss |" in card.content
    report = json.loads((out / "hisvd.json").read_text()) | {"source_model": "."}
    unnamed = model_card(report, model_folders["llama"])
    assert ModelCard(unnamed).data.base_model == model_folders["llama"].name and "# llama, " in unnamed


def test_the_card_takes_over_the_license(tokenizer, tmp_path):
    folder = build_model(
        AutoConfig.for_model(
            "llama", vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        tmp_path / "m",
        tokenizer,
    )
    assert license_of(folder) == {}
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\ntags: [a]\n---\n# A model\n")
    assert license_of(folder) == {"license": "other", "license_name": "llama2"}
    (folder / "README.md").write_text("---\nlicense: [\n---\n# A damaged card\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"license": "mit"}))
    assert license_of(folder) == {"license": "mit"}


def test_settings_without_effect_are_left_out():
    defaults = vars(hisvd.CompressionSettings(allocation="hisvd", whitening="input", moves="low_rank"))
    shown = acting_settings(defaults)
    assert "alpha" in shown and not {"min_saving", "int6_mode", "width_multiple", "linear_dtype"} & shown.keys()
    stock = vars(hisvd.CompressionSettings(allocation="loss", whitening="two_sided", moves="neurons", export="plain"))
    shown = acting_settings(stock)
    assert "width_multiple" in shown and not {"factors", "allocation", "rank_multiple", "alpha"} & shown.keys()
