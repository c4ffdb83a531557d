"""hisvd.load: a model is what its files say, or is refused with the tensors named; weights go straight to a device."""

import gc
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import IDS, build_model, calibrate_arguments, expect_sentence, run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, MixtralConfig, PreTrainedModel

import hisvd
from hisvd.utils import load_utils
from hisvd.utils.model_folders import local_folder

TINY = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = MixtralConfig(**TINY, intermediate_size=96, num_key_value_heads=2, num_local_experts=4)
GPT2 = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=128)
MAPS = Path("/proc/self/maps")
DOWN = "model.layers.1.mlp.down_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.{}.weight"


@pytest.fixture
def model(model_folders, tmp_path):
    return shutil.copytree(model_folders["llama"], tmp_path / "model")


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_pt(file, edit):
    content = torch.load(file, weights_only=True)
    torch.save(edit(content), file)


def expect_refusal(path, *fragments, folder_too=True):
    """The model is refused by hisvd.load and by evaluate.py, whole and (a folder) layer by layer."""
    with pytest.raises(hisvd.HiSVDError) as refusal:
        hisvd.load(path)
    for fragment in (str(path), *fragments):
        assert fragment in str(refusal.value), refusal.value
    options = ["--model_path", path, "--datasets", "python-docs", "--nsamples", 1]
    expect_sentence(run("evaluate", *options), str(path), *fragments)
    if folder_too:
        expect_sentence(run("evaluate", *options, "--offload_folder", path.parent / "offload"), str(path), *fragments)


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_missing_tensors_are_named(model):
    edit_tensors(model, without(DOWN))
    expect_refusal(model, "missing", DOWN)


def test_layers_that_the_file_lacks_are_named(model):
    edit_tensors(model, lambda tensors: {k: t for k, t in tensors.items() if "layers.2" not in k})
    expect_refusal(model, "missing", "model.layers.2.input_layernorm.weight", "6 more")


def test_more_layers_in_the_configuration_than_in_the_file(model):
    edit_config(model, num_hidden_layers=5)
    expect_refusal(model, "missing", "model.layers.4.input_layernorm.weight")


def test_fewer_layers_in_the_configuration_than_in_the_file(model):
    edit_config(model, num_hidden_layers=3)
    expect_refusal(model, "not part of the model", "model.layers.3.input_layernorm.weight")


EDITS = {
    "surplus": lambda tensors: tensors | {"model.layers.1.mlp.router.weight": torch.ones(4)},
    "missing": without(DOWN),
    "misshapen": lambda tensors: tensors | {DOWN: tensors[DOWN][:-1].clone()},
    "integers": lambda tensors: tensors | {DOWN: tensors[DOWN].int()},
    "scalar": lambda tensors: tensors | {DOWN: torch.tensor(1.0)},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_calibration_and_streaming_check_every_tensor_before_they_start(model, edit):
    edit_tensors(model, edit)
    result = run("calibrate", *calibrate_arguments(model, model.parent / "caches"))
    expect_sentence(result, str(model), "model.layers.1.mlp")
    options = ["--model_path", model, "--datasets", "python-docs", "--offload_folder", model.parent / "offload"]
    expect_sentence(run("evaluate", *options), str(model), "model.layers.1.mlp")


@pytest.mark.parametrize("name", ["base.weight", "permutation"])
def test_streaming_a_compressed_folder_without_a_part_of_a_factored_linear(chain, name):
    folder = chain("llama", "0.5", "out", "--update", "none")
    stored = next(k for file in folder.glob("*.safetensors") for k in load_file(file) if k.endswith(f"_proj.{name}"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[stored]
    save_file(tensors, folder / "model.safetensors")
    options = ["--model_path", folder, "--datasets", "python-docs", "--offload_folder", folder.parent / "offload"]
    expect_sentence(run("evaluate", *options), str(folder), "missing", stored)


def test_renamed_tensor_is_named_with_its_new_name(model):
    edit_tensors(
        model, lambda tensors: {k.replace("layers.1.mlp.down", "layers.1.mlp.out"): t for k, t in tensors.items()}
    )
    expect_refusal(model, DOWN)
    expect_refusal(model, DOWN.replace("down", "out"))


def test_name_changed_in_the_header(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data.replace(b"layers.1.mlp.down", b"layers.1.mlp.dowm", 1))
    expect_refusal(model, DOWN)


def test_header_that_is_not_json(model):
    data = bytearray((model / "model.safetensors").read_bytes())
    data[8] = 0
    (model / "model.safetensors").write_bytes(data)
    expect_refusal(model, "model.safetensors")


def test_wrong_shapes_are_reported(model):
    edit_tensors(model, lambda tensors: tensors | {DOWN: tensors[DOWN][:-1].clone()})
    expect_refusal(model, "wrong shape", DOWN, "(63, 160) instead of (64, 160)")


def test_pt_without_two_weights(chain):
    file = chain("llama", "0.6", "out.pt")
    names = [n for n in load_utils.read_pt(file)[1] if "layers.2.mlp.up_proj" in n][:2]
    assert len(names) == 2
    edit_pt(file, without(*names))
    expect_refusal(file, "missing", *names, folder_too=False)


def test_emptied_table_of_factored_modules(chain):
    folder = chain("llama", "0.5", "out")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | {"modules": {}})
    expect_refusal(folder, "missing", "not part of the model", "_proj")
    file = chain("llama", "0.5", "out.pt")
    edit_pt(file, lambda content: content | {"file:config.json": (folder / "config.json").read_text()})
    expect_refusal(file, "missing", "not part of the model", "_proj", folder_too=False)


def test_pt_with_an_unusable_configuration(chain):
    file = chain("llama", "0.6", "out.pt")
    for config in ("{", '{"model_type": "no-such-family"}', "{}"):
        edit_pt(file, lambda content, config=config: content | {"file:config.json": config})
        expect_refusal(file, "config.json", folder_too=False)


@pytest.mark.parametrize("missing", [("w1",), ("w2",), ("w1", "w2", "w3")])
def test_missing_weights_of_an_expert(tokenizer, tmp_path, missing):
    folder = build_model(EXPERTS, tmp_path / "mixtral", tokenizer)
    edit_tensors(folder, without(*map(EXPERT.format, missing)))
    expect_refusal(folder, "layers.1.mlp.experts")


def test_tied_weights_and_former_buffers_are_accepted(model, tokenizer, tmp_path):
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    before = hisvd.load(model)(IDS).logits
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    edit_tensors(model, lambda tensors: tensors | frequencies)
    assert torch.equal(hisvd.load(model)(IDS).logits, before)
    gpt2 = build_model(GPT2, tmp_path / "gpt2", tokenizer)
    masks = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 4, 4) for i in range(2) for name in ("bias", "masked_bias")
    }
    before = hisvd.load(gpt2)(IDS).logits
    edit_tensors(gpt2, lambda tensors: tensors | masks)
    assert torch.equal(hisvd.load(gpt2)(IDS).logits, before)
    options = ["--datasets", "python-docs", "--nsamples", 1, "--offload_folder", tmp_path / "offload"]
    for folder in (model, gpt2):
        assert run("evaluate", "--model_path", folder, *options).code == 0


@pytest.mark.parametrize("output", ["out", "out.pt"])
def test_weights_go_straight_to_the_device(chain, monkeypatch, output):
    """On the meta device, which stands for an accelerator; a model loaded to the CPU first would be moved then."""
    moved_from, real = [], PreTrainedModel.to

    def recording(model, *arguments, **options):
        moved_from.append({tensor.device.type for tensor in model.parameters()})
        return real(model, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "to", recording)
    model = hisvd.load(chain("llama", "0.6", output), device="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert all(places == {"meta"} for places in moved_from)


def test_weights_outside_the_index_are_neither_fetched_nor_counted(model_folders, tmp_path, monkeypatch):
    hub, snapshot = tmp_path / "hub", tmp_path / "snapshots" / "0123abc"
    hisvd.load(model_folders["llama"]).save_pretrained(hub, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(model_folders["llama"]).save_pretrained(hub)
    shards = {file.name: file.stat().st_size for file in hub.glob("model-*.safetensors")}
    save_file({"tok_embeddings.weight": torch.zeros(1000)}, hub / "consolidated.safetensors")

    asked: list[str | None] = []

    def fetch(name, revision=None, *, allow_patterns):
        assert name == "someone/model" and revision in (None, snapshot.name)
        asked.append(revision)
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in hub.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    settings = hisvd.EvaluationSettings(seqlen=32, nsamples=1)
    figures = hisvd.evaluate("someone/model", ["python-docs"], settings)
    assert figures["model"] == "someone/model" and asked == [None, snapshot.name]
    assert {file.name for file in snapshot.glob("*.safetensors")} == set(shards)
    assert figures["weight_file_bytes"] == sum(shards.values())
    shutil.copy(hub / "consolidated.safetensors", snapshot)
    assert hisvd.evaluate(snapshot, ["python-docs"], settings)["weight_file_bytes"] == sum(shards.values())
    assert local_folder("someone/model", config_only=True) == snapshot


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not list mapped files")
@pytest.mark.parametrize("export", ["none", "int6"])
def test_files_do_not_stay_mapped_for_the_buffers_alone(chain, export):
    """In another dtype all parameters are copies; index and code buffers keep theirs."""
    options = ["--export", export, "--quality_gate_delta", "none", "--update", "none"] if export == "int6" else []
    for output in ("out", "out.pt") if export == "none" else ("out",):
        path = chain("llama", "0.8", output, *options)
        stored, other = hisvd.load(path), hisvd.load(path, torch.bfloat16)
        assert str(path) in MAPS.read_text()
        del stored
        gc.collect()
        assert other.dtype == torch.bfloat16 and str(path) not in MAPS.read_text()
