"""Compressed models are trained and cast like any other: Trainer, .float(), peft's LoRA, examples/finetune.py."""

import json
import re
import runpy
import sys

import pytest
import torch
from conftest import IDS, ROOT, logits_of, run
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hisvd
from hisvd.component.hf_quantizer import GUARD
from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.component.low_rank import LowRankLinear, PivotedLinear

# svd: also modules with biases. int6: linears with at least 64 inputs, factors among them, are INT6.
FORMS = {
    "pivoted": ("llama",),
    "svd": ("qwen2", "--factors", "svd"),
    "int6": ("llama", "--export", "int6", "--quality_gate_delta", "none"),
}
FACTORED = {"pivoted": PivotedLinear, "svd": LowRankLinear, "int6": PivotedLinear}


@pytest.fixture(scope="module")
def compressed(model_folders, caches, tmp_path_factory):
    """compressed(form) → the folder of a tiny model; every form is compressed once."""
    root = tmp_path_factory.mktemp("compressed")

    def call(form):
        family, *options = FORMS[form]
        if not (root / form).exists():
            where = [
                "--model_path",
                model_folders[family],
                "--calib_cache",
                caches[family],
                "--save_model",
                root / form,
            ]
            how = ["--target_compression", "0.6", "--update", "none", "--moves", "low_rank"]
            assert run("compress", *where, *how, *options).code == 0
        return root / form

    return call


def trainer_of(model, folder):
    windows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        folder, max_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=windows)


def losses_around_training(model, folder):
    losses = [model.eval()(IDS, labels=IDS).loss.item()]
    trainer_of(model, folder).train()
    return [*losses, model.eval()(IDS, labels=IDS).loss.item()]


def test_trainer_trains_all_factors_and_saves_the_format(compressed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed("pivoted"))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    before, after = losses_around_training(model, tmp_path / "trainer")
    assert after < before
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, initial[name])}
    assert moved >= {name for name in initial if "_proj" in name} and any("coefficients" in name for name in moved)

    trainer_of(model, tmp_path / "trainer").save_model(tmp_path / "tuned")
    torch.testing.assert_close(logits_of(hisvd.load(tmp_path / "tuned")), logits_of(model))
    saved, config = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "tuned", compressed("pivoted"))
    )
    assert saved["quantization_config"] == config["quantization_config"] and saved.items() >= GUARD.items()


def test_casts(compressed):
    model = hisvd.load(compressed("pivoted"))
    expected = logits_of(model)
    for cast, dtype in ((model.half, torch.float16), (lambda: model.to(torch.bfloat16), torch.bfloat16)):
        assert {p.dtype for p in cast().parameters()} == {dtype}
    torch.testing.assert_close(logits_of(model.float()), expected, rtol=0.1, atol=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.is_quantized and not hasattr(model.config, "_is_quantized")


def test_int6_models_are_not_trained_or_cast(compressed, tmp_path):
    model = hisvd.load(compressed("int6"))
    assert any(isinstance(module, INT6SparseLinear) for module in model.modules())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_of(model, tmp_path)
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.float()


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(peft, model, *targets, **options):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), **options))


@pytest.mark.parametrize("form", FORMS)
def test_lora_beside_whole_modules(peft, compressed, tmp_path, form):
    expected = logits_of(hisvd.load(compressed(form)))
    model = adapted(peft, hisvd.load(compressed(form)), "q_proj", "v_proj")
    wrapped = [m.get_base_layer() for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == 2 * 4 and any(isinstance(m, FACTORED[form]) for m in wrapped)
    torch.testing.assert_close(logits_of(model), expected)  # B is zero at first
    before, after = losses_around_training(model, tmp_path / "trainer")
    assert after < before
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(hisvd.load(compressed(form)), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), logits_of(model))
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), expected)


def test_lora_on_the_factors_can_be_merged_and_on_whole_modules_cannot(peft, compressed, tmp_path):
    folder = compressed("pivoted")
    model = adapted(peft, hisvd.load(folder), "base", "coefficients", init_lora_weights=False)
    expected = logits_of(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(hisvd.load(tmp_path / "merged")), expected, rtol=1e-3, atol=1e-4)
    beside = adapted(peft, hisvd.load(folder), "q_proj", "v_proj")
    with pytest.raises(hisvd.HiSVDError, match=r"_proj .* cannot be merged.*base, coefficients"):
        beside.merge_and_unload()
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(hisvd.HiSVDError, match="no weight matrix"):
            adapted(peft, hisvd.load(folder), "q_proj", "k_proj", "v_proj", "o_proj", **options)


def test_lora_of_transformers_itself(peft, compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed("pivoted"))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert {name.partition("q_proj.")[2][:5] for name, p in model.named_parameters() if p.requires_grad} == {"lora_"}


def test_the_example_lowers_the_perplexity_on_text_of_the_same_kind(peft, compressed, tmp_path, monkeypatch, capsys):
    text = tmp_path / "train.txt"
    text.write_text("def f(x):\n    return x\n" * 150)
    sizes = ["--seqlen", "64", "--batch_size", "4", "--learning_rate", "1e-3"]
    example = ROOT / "examples" / "finetune.py"
    arguments = [example, compressed("pivoted"), text, tmp_path / "tuned", *sizes]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    runpy.run_path(str(example), run_name="__main__")
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", capsys.readouterr().out).groups())
    assert after < before
    original, tuned = hisvd.load(compressed("pivoted")), hisvd.load(tmp_path / "tuned")
    assert tuned.num_parameters() == original.num_parameters()
    assert not torch.equal(logits_of(tuned), logits_of(original))
