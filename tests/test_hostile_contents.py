"""Values inside files that parse: positions, experts, permutations, dtypes, tokenizers, caches."""

import json

import pytest
import torch
from conftest import build_model, expect_sentence, run, saved_tensors, short_text
from hostile_files import CACHE, TINY, WAYS, Q, calibrate, compress, edit_json, expect_refusal, plan_only
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPTJConfig, MixtralConfig, Qwen2MoeConfig

import hisvd
from hisvd.component import low_rank
from hisvd.utils import model_utils
from hisvd.utils.files import sha256_of_file, sha256_of_tensor

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
EVALUATE = ["--datasets", short_text(), "--nsamples", 1, "--seqlen", 16]


def programs_on(folder):
    """What calibrate.py and evaluate.py say of the model."""
    return calibrate(folder, "--model_name", "new"), run("evaluate", "--model_path", folder / "model", *EVALUATE)


def unbuilt(monkeypatch):
    """Fail where a model is built."""

    def fail(config):
        raise AssertionError("was built")

    monkeypatch.setattr(model_utils, "_meta_model", fail)


@pytest.mark.parametrize("layers", [100, 9_000])
def test_more_layers_than_tensors_are_refused_before_they_are_built(files, layers, monkeypatch):
    edit_json(files / "model" / "config.json", lambda config: config.update(num_hidden_layers=layers))
    unbuilt(monkeypatch)
    expect_refusal(files / "model", "config.json")


EXPERTS = {
    "mixtral": (MixtralConfig(**TINY, **HEADS, num_local_experts=4), "num_local_experts"),
    "qwen2_moe": (Qwen2MoeConfig(**TINY, **HEADS, num_experts=4, moe_intermediate_size=16), "num_experts"),
}


@pytest.mark.parametrize(("config", "key"), EXPERTS.values(), ids=EXPERTS)
def test_numbers_of_experts(tmp_path, tokenizer, config, key, monkeypatch):
    folder = build_model(config, tmp_path / "model", tokenizer)
    for value in (0, 5, "2"):
        edit_json(folder / "config.json", lambda c, value=value: c.update(num_experts_per_tok=value))
        expect_refusal(folder, "config.json", "num_experts_per_tok")
    edit_json(folder / "config.json", lambda c: c.update({"num_experts_per_tok": 2, key: 100_000}))
    unbuilt(monkeypatch)
    expect_refusal(folder, "config.json")


def test_positions_whose_tables_no_memory_holds(tmp_path, tokenizer):
    config = GPTJConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    folder = build_model(config, tmp_path / "model", tokenizer)
    edit_json(folder / "config.json", lambda c: c.update(n_positions=10**8))
    expect_refusal(folder, "config.json", "max_position_embeddings")


@pytest.mark.parametrize("bos", [10**6, -1])
def test_a_first_token_without_an_embedding(tmp_path, tokenizer, bos):
    build_model(Gemma2Config(**TINY, **HEADS, head_dim=8), tmp_path / "model", tokenizer)
    edit_json(tmp_path / "model" / "config.json", lambda config: config.update(bos_token_id=bos))
    for result in programs_on(tmp_path):
        expect_sentence(result, str(tmp_path / "model"), "bos_token_id", str(bos))


PERMUTATIONS = {
    "too large": lambda order: order.scatter(0, torch.tensor([0]), 10**6),
    "negative": lambda order: order.scatter(0, torch.tensor([0]), -1),
    "twice": torch.zeros_like,
}


@pytest.mark.parametrize("change", PERMUTATIONS.values(), ids=PERMUTATIONS)
def test_permutations(files, change):
    out = files / "out" / "model.safetensors"
    name, tensors = f"{Q}.permutation", load_file(out)
    damaged = {name: change(tensors[name].long()).int()}
    save_file(tensors | damaged, out, metadata={"format": "pt"})
    where = ["--model_path", files / "out", *EVALUATE]
    expect_sentence(run("evaluate", *where), str(files / "out"), Q)
    expect_sentence(run("evaluate", *where, "--offload_folder", files / "offload"), Q)
    content = torch.load(files / "out.pt", weights_only=True)
    torch.save(content | damaged, files / "out.pt")
    expect_sentence(run("evaluate", "--model_path", files / "out.pt", *EVALUATE), str(files / "out.pt"), Q)


def test_an_intact_permutation_is_one():
    module = low_rank.PivotedLinear(6, 5, 2, bias=False)
    module.permutation = torch.tensor([4, 2, 0, 1, 3], dtype=torch.int32)
    module.check()
    module.permutation[0] = 3
    with pytest.raises(hisvd.HiSVDError, match="permutation"):
        module.check()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["model", "out", "out.pt"])
def test_weights_that_are_no_floating_point_numbers(files, name, dtype):
    path, key = files / name, "model.norm.weight"
    damaged = {key: saved_tensors(path)[key].to(dtype)}
    if path.is_file():
        torch.save(torch.load(path, weights_only=True) | damaged, path)
    else:
        save_file(load_file(path / "model.safetensors") | damaged, path / "model.safetensors", {"format": "pt"})
    for way, load in WAYS.items():
        if path.is_dir() or way == "hisvd.load":
            with pytest.raises(hisvd.HiSVDError, match="floating-point"):
                load(path)


PT_CHANGES = {
    "huge side file": {"file:vocab.txt": torch.zeros(1, dtype=torch.uint8).expand(10**12)},
    "half a surrogate pair": {"file:vocab.txt": "\ud800"},
    "half a surrogate pair in a name": {"file:\ud800.txt": "x"},
    "generation config": {"file:generation_config.json": '{"watermarking_config": [1]}'},
}


@pytest.mark.parametrize("change", PT_CHANGES.values(), ids=PT_CHANGES)
def test_pt_files(files, change):
    torch.save(torch.load(files / "out.pt", weights_only=True) | change, files / "out.pt")
    expect_sentence(run("evaluate", "--model_path", files / "out.pt", *EVALUATE), str(files / "out.pt"))


def test_a_tokenizer_that_panics(files):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    edit_json(files / "model" / "tokenizer.json", lambda content: content.update(normalizer=normalizer))
    for result in programs_on(files):
        expect_sentence(result, str(files / "model"), "tokenizer")


def test_a_maximal_length_that_is_no_number(files):
    edit_json(files / "model" / "tokenizer_config.json", lambda content: content.update(model_max_length="x"))
    for result in programs_on(files):
        expect_sentence(result, str(files / "model"), "model_max_length")


def test_a_generation_config_that_cannot_be_used(files):
    edit_json(files / "model" / "generation_config.json", lambda content: content.update(watermarking_config=[1]))
    with pytest.raises(hisvd.HiSVDError, match=str(files / "model")):
        hisvd.load(files / "model")


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": [1]}], ids=str)
def test_an_index_without_metadata(files, metadata):
    weights = files / "model" / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(weights), "a.safetensors")} | metadata
    weights.rename(files / "model" / "a.safetensors")
    (files / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_refusal(files / "model", "model.safetensors.index.json", "metadata")


def change_cache(files, file, change):
    """Edit the tensors of a cache file, and its checksums with them."""
    path = files / CACHE / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

    def sums(manifest):
        for entry in (*manifest["layers"], *manifest["gradients"]):
            if entry["file"] == file:
                small = {n: sha256_of_tensor(tensors[n]) for n in entry["small_tensors_sha256"] if n in tensors}
                entry |= {"sha256": sha256_of_file(path), "small_tensors_sha256": small}

    edit_json(files / CACHE / "manifest.json", sums)


LOSSES, ORDER, ROUNDING = (f"mlp.down_proj.{n}" for n in ("removal_losses", "removal_order", "rounding_errors"))
CHANGES = {
    "losses dropped": lambda tensors: tensors.pop(LOSSES),
    "losses of another shape": lambda tensors: tensors.update({LOSSES: torch.ones(3)}),
    "losses NaN": lambda tensors: tensors[LOSSES].fill_(torch.nan),
    "order of another shape": lambda tensors: tensors.update({ORDER: tensors[ORDER][:-1].clone()}),
    "rounding errors dropped": lambda tensors: tensors.pop(ROUNDING),
    "rounding errors NaN": lambda tensors: tensors[ROUNDING].fill_(torch.nan),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_caches_whose_checksums_fit(files, change):
    change_cache(files, "gradients_001.safetensors", change)
    expect_sentence(plan_only(files), str(files / CACHE))
    expect_sentence(compress(files, "new", "--linear_dtype", "int8"), str(files / CACHE))


@pytest.mark.parametrize("name", ["F", "H"])
def test_moments_that_are_no_numbers(files, name):
    file, key = {
        "F": ("gradients_001.safetensors", "mlp.down_proj.F"),
        "H": ("layer_001.safetensors", "mlp_mid.H"),
    }[name]
    change_cache(files, file, lambda tensors: tensors[key].fill_(torch.nan))
    expect_sentence(compress(files, "new"), file, key)


def test_another_number_of_tokens_than_the_manifest_says(files):
    edit_json(files / CACHE / "manifest.json", lambda manifest: manifest["identity"].update(nsamples=10**11))
    for update in ("none", "sequential"):
        expect_sentence(compress(files, "new", "--update", update), str(files / CACHE), "tokens")


@pytest.mark.parametrize("name", ["text\udcff.txt", "texts\udcff/text.txt"])
def test_a_text_whose_name_is_not_in_utf8(files, name):
    (files / name).parent.mkdir(exist_ok=True)
    (files / name).write_text("some text")
    options = ["--model_path", files / "model", "--datasets", files / name]
    for result in (calibrate(files, "--model_name", "odd", "--dataset", files / name), run("evaluate", *options)):
        expect_sentence(result, "UTF-8")


def test_a_device_that_there_is_not(files):
    with pytest.raises(hisvd.HiSVDError, match="nope"):
        hisvd.load(files / "model", device="nope")
