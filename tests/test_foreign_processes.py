"""Compressed folders in processes that never import hisvd: they load, or say that hisvd is missing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import build_model, calibrate_arguments, logits_of, run
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import hisvd
from hisvd.component.hf_quantizer import CODES_VERSION, FORMAT_VERSION, GUARD

NO_HOOK = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def foreign(script, *arguments, **environment):
    """Run `script` in a process of its own, outside the checkout."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | environment, cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


LOADS = """
import sys
{first}
assert "hisvd" not in sys.modules
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
torch.save(model.eval()(torch.arange(40).view(2, 20)).logits, sys.argv[2])
"""
TRANSFORMERS = "from transformers import AutoModelForCausalLM"
ORDERS = {
    "torch first": f"import torch\n{TRANSFORMERS}",
    "transformers first": f"{TRANSFORMERS}\nimport torch",
    "the look-up first": f"import transformers.quantizers.auto, torch\n{TRANSFORMERS}",
    "modeling_utils first": f"import transformers.modeling_utils, torch\n{TRANSFORMERS}",
}


@pytest.mark.parametrize("order", ORDERS)
def test_loads_without_an_import_of_hisvd(chain, tmp_path, order):
    folder = chain("llama", "0.6", "out", "--update", "none")
    foreign(LOADS.format(first=ORDERS[order]), folder, tmp_path / "logits")
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits_of(hisvd.load(folder)))


def test_torch_is_imported_without_hisvd_and_transformers():
    light = "{'hisvd', 'transformers', 'datasets'}.isdisjoint(sys.modules)"
    foreign(f"import sys, torch; assert 'hisvd_autoload' in sys.modules and {light}")
    foreign("import sys, torch, transformers.modeling_utils; assert 'hisvd' not in sys.modules")
    foreign(f"import sys, torch; assert 'hisvd_autoload' not in sys.modules and {light}", **NO_HOOK)


REFUSES = """
import sys
if sys.argv[1] == "missing":
    sys.modules["hisvd"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    for options in ({}, {"ignore_mismatched_sizes": True}, {"device_map": "cpu"}):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **options)
        except (ValueError, ImportError) as error:
            assert "hisvd" in str(error), error
        else:
            raise AssertionError(f"{folder} was loaded")
"""


@pytest.fixture
def folders(chain, tokenizer, tmp_path):
    """Factored, svd, INT6, int8, tied and Conv1D models, as compress.py and as save_pretrained write them."""
    gpt2 = build_model(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4), tmp_path / "gpt2", tokenizer)
    assert run("calibrate", *calibrate_arguments(gpt2, tmp_path, "gpt2")).code == 0
    where = ["--model_path", gpt2, "--calib_cache", tmp_path / "gpt2_n6_s32_with_hessian", "--update", "none"]
    result = run("compress", *where, "--target_compression", "0.7", "--save_model", tmp_path / "gpt2_out")
    assert result.code == 0, result
    once = ("--update", "none")
    written = [
        tmp_path / "gpt2_out",
        chain("llama", "0.6", "both", *once),  # tied; narrow and pivoted
        chain("qwen2", "0.6", "svd", *once, "--factors", "svd", "--moves", "low_rank"),
        chain("mistral", "0.95", "narrow", *once, "--moves", "neurons"),
        chain("llama", "1", "int6", *once, "--export", "int6", "--quality_gate_delta", "none"),
        chain("qwen2", "0.6", "int8", *once, "--linear_dtype", "int8"),
    ]
    for folder in written[:2]:
        again = folder.with_name(f"{folder.name}_again")
        hisvd.load(folder).save_pretrained(again)
        torch.testing.assert_close(logits_of(hisvd.load(again)), logits_of(hisvd.load(folder)))
        written.append(again)
    return written


def test_refused_where_hisvd_is_missing(folders):
    foreign(REFUSES, "disabled", *folders, **NO_HOOK)
    foreign(REFUSES, "missing", *folders)
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        version = config["quantization_config"]["format_version"]
        assert (version, CODES_VERSION) == (3, 3) if folder.name == "int8" else (version, FORMAT_VERSION) == (2, 2)


def test_version_1_loads_and_is_saved_as_version_2(chain, tmp_path):
    folder = chain("llama", "0.6", "out", "--update", "none")
    expected = logits_of(hisvd.load(folder))
    config = json.loads((folder / "config.json").read_text())
    for key in GUARD:
        del config[key]
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"]["format_version"] == 2 and saved.items() >= GUARD.items()


def test_a_later_version_is_refused(chain):
    folder = chain("llama", "0.6", "out", "--update", "none")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(hisvd.HiSVDError, match=r"version 4 .* newer"):
        hisvd.load(folder)


def test_other_models_are_saved_as_ever(model_folders, tmp_path):
    AutoConfig.from_pretrained(model_folders["llama"]).save_pretrained(tmp_path)
    assert GUARD.keys().isdisjoint(json.loads((tmp_path / "config.json").read_text()))
