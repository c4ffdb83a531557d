"""Bad input to the programs: one sentence, exit code 2, nothing overwritten."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import calibrate_arguments, expect_sentence, run
from safetensors.torch import load_file, save_file

TEXT = ["--dataset", "python-docs"]


@pytest.fixture
def model(model_folders, tmp_path):
    return shutil.copytree(model_folders["llama"], tmp_path / "model")


@pytest.fixture
def cache(caches, tmp_path):
    return shutil.copytree(caches["llama"], tmp_path / "cache")


def calibrate(model, tmp_path, *options):
    return run("calibrate", *calibrate_arguments(model, tmp_path / "caches"), *options)


def compress(model, cache, tmp_path, *options, target="0.8"):
    where = ["--model_path", model, "--calib_cache", cache, "--save_model", tmp_path / "out"]
    result = run("compress", *where, "--target_compression", target, *options)
    assert not (tmp_path / "out").exists() or result.code == 0
    return result


def edit_weight(model, name, value):
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_empty_model_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    expect_sentence(calibrate(tmp_path / "nowhere", tmp_path), "nowhere", "does not exist")
    expect_sentence(calibrate(tmp_path / "empty", tmp_path), "empty")
    for path in ("nowhere", "empty"):
        expect_sentence(run("evaluate", "--model_path", tmp_path / path, "--datasets", "python-docs"), path)


def test_folder_without_config_or_with_a_broken_one(model, tmp_path):
    (model / "config.json").write_text('{"model_type": "no-such-family"}')
    expect_sentence(calibrate(model, tmp_path), "config.json")
    (model / "config.json").write_text("{")
    expect_sentence(calibrate(model, tmp_path), "config.json")
    (model / "config.json").unlink()
    expect_sentence(calibrate(model, tmp_path), "config.json")


def test_folder_without_safetensors_says_how_to_convert(model, tmp_path):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    expect_sentence(calibrate(model, tmp_path), str(model), "save_pretrained")


def test_truncated_checkpoint_and_missing_shard_are_named(model, tmp_path):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    expect_sentence(calibrate(model, tmp_path), "model.safetensors", "truncated")
    expect_sentence(run("evaluate", "--model_path", model, "--datasets", "python-docs"), str(model))
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_sentence(calibrate(model, tmp_path), "model-00001-of-00001.safetensors")


def test_missing_tensor_is_named(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expect_sentence(calibrate(model, tmp_path), "model.layers.1.mlp.up_proj.weight")


def test_cache_of_another_model_names_both(model_folders, caches, tmp_path):
    result = compress(model_folders["mistral"], caches["llama"], tmp_path)
    expect_sentence(result, str(caches["llama"]), str(model_folders["mistral"]), "another model")


def test_changed_weights_are_another_model(model, cache, tmp_path):
    tensors = {k: t + 1 if "layers.3.mlp.up" in k else t for k, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expect_sentence(compress(model, cache, tmp_path), "another model")


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing"])
def test_damaged_cache_shard_is_named(model, cache, tmp_path, damage):
    shard = cache / "layer_002.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(data[:-100])
    elif damage == "edited":
        for position in range(len(data) // 3, len(data), len(data) // 3):
            data[position] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    expect_sentence(compress(model, cache, tmp_path), "layer_002.safetensors")


def test_edited_spectra_do_not_pass_plan_only(cache):
    tensors = load_file(cache / "layer_001.safetensors")
    tensors["mlp.up_proj.singular_values"][0] *= 2
    save_file(tensors, cache / "layer_001.safetensors")
    options = ["--calib_cache", cache, "--target_compression", "0.8", "--plan_only"]
    expect_sentence(run("compress", *options), "layer_001.safetensors", "checksum")


def test_foreign_pickle_and_missing_or_foreign_cache(model, tmp_path):
    foreign = tmp_path / "llama_n256.pkl"
    foreign.write_bytes(pickle.dumps({"hessian": [1, 2]}))
    expect_sentence(compress(model, foreign, tmp_path), str(foreign), "pickle", "calibrate.py")
    assert foreign.read_bytes() == pickle.dumps({"hessian": [1, 2]})
    expect_sentence(compress(model, tmp_path / "nothing.pkl", tmp_path), "nothing", "does not exist")
    expect_sentence(compress(model, model, tmp_path), "manifest.json")


def test_unfinished_cache_says_how_to_finish(model, cache, tmp_path):
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["layers"] = manifest["layers"][:2]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    expect_sentence(compress(model, cache, tmp_path), "2 of 4 layers")


@pytest.mark.parametrize("target", ["0", "1.2", "-0.5", "nan", "eighty", "0.8,2", "", "0.001"])
def test_target_out_of_range(model, cache, tmp_path, target):
    expect_sentence(compress(model, cache, tmp_path, target=target), target.split(",")[-1])


def test_unknown_data_set_or_text_that_is_too_short(model, tmp_path):
    expect_sentence(calibrate(model, tmp_path, "--dataset", "wikitext3"), "wikitext3", "wikitext2")
    (tmp_path / "short.txt").write_text("short")
    expect_sentence(calibrate(model, tmp_path, "--dataset", tmp_path / "short.txt"), "short.txt", "32 are needed")
    options = ["--model_path", model, "--datasets", tmp_path / "short.txt", "--seqlen", 64]
    expect_sentence(run("evaluate", *options), "short.txt", "64")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    expect_sentence(calibrate(model, tmp_path, "--dataset", tmp_path / "lines.jsonl"), "lines.jsonl", "'text'")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 999)
    expect_sentence(calibrate(model, tmp_path, "--dataset", tmp_path / "latin.txt"), "latin.txt", "UTF-8")
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_data_set_with_the_hub_out_of_reach(model, tmp_path, name):
    result = calibrate(model, tmp_path, "--dataset", name, "--data_dir", tmp_path)
    expect_sentence(result, str(tmp_path / f"{name}-train"), "--dataset FILE", "python-docs")


def test_model_with_the_hub_out_of_reach(tmp_path):
    for program in ("calibrate", "evaluate"):
        options = [*TEXT, "--model_name", "x"] if program == "calibrate" else ["--datasets", "python-docs"]
        expect_sentence(run(program, "--model_path", "meta-llama/Llama-2-7b-hf", *options), "meta-llama/Llama-2-7b-hf")


def test_pt_of_unknown_content(tmp_path, chain):
    foreign = tmp_path / "foreign.pt"
    for content in ({"a": torch.ones(2)}, torch.nn.Linear(2, 2), [1, 2]):
        torch.save(content, foreign)
        expect_sentence(run("evaluate", "--model_path", foreign, "--datasets", "python-docs"), "foreign.pt")
    foreign.write_bytes(b"no zip at all")
    expect_sentence(run("evaluate", "--model_path", foreign, "--datasets", "python-docs"), "foreign.pt")
    whole = chain("llama", "0.8", "whole.pt").read_bytes()
    foreign.write_bytes(whole[: len(whole) // 2])
    expect_sentence(run("evaluate", "--model_path", foreign, "--datasets", "python-docs"), "foreign.pt")


def test_output_paths_that_cannot_be_written(model, cache, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    where = ["--model_path", model, "--calib_cache", cache, "--target_compression", "0.8"]
    for output in (blocker / "out", blocker / "deep" / "out.pt"):
        expect_sentence(run("compress", *where, "--save_model", output), str(blocker))
    arguments = calibrate_arguments(model, blocker / "caches")
    expect_sentence(run("calibrate", *arguments), str(blocker))
    options = ["--model_path", model, "--datasets", "python-docs", "--json", blocker / "e.json"]
    expect_sentence(run("evaluate", *options), str(blocker))
    assert blocker.read_text() == "in the way"


def test_nan_in_the_weights_is_named(model, cache, tmp_path):
    edit_weight(model, "model.layers.2.mlp.down_proj.weight", float("nan"))
    expect_sentence(calibrate(model, tmp_path), "model.layers.2.mlp.down_proj.weight", "NaN")


def test_nan_in_the_activations_names_the_layer(model, tmp_path):
    edit_weight(model, "model.layers.2.post_attention_layernorm.weight", 3e38)
    edit_weight(model, "model.layers.2.mlp.down_proj.weight", 1e30)
    expect_sentence(calibrate(model, tmp_path), "model.layers.2", "NaN")


def test_cache_of_other_settings_is_not_overwritten(model, tmp_path):
    assert calibrate(model, tmp_path).code == 0
    before = {f: f.read_bytes() for f in (tmp_path / "caches").rglob("*") if f.is_file()}
    expect_sentence(calibrate(model, tmp_path, "--seed", 4), "fingerprint", "--model_name")
    expect_sentence(calibrate(model, tmp_path, "--dtype", "bfloat16"), "dtype")
    assert before == {f: f.read_bytes() for f in (tmp_path / "caches").rglob("*") if f.is_file()}


@pytest.mark.parametrize("options", [[], ["--dry_run"]])
def test_too_few_positions_or_layers(model, tmp_path, options):
    expect_sentence(calibrate(model, tmp_path, "--seqlen", 129, *options), "--seqlen 129", "128 positions", str(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    expect_sentence(calibrate(model, tmp_path, *options), "num_hidden_layers", "is 0", str(model))
    assert not (tmp_path / "caches").exists()


def test_compressed_model_cannot_be_compressed_again(chain, cache, tmp_path):
    compressed = chain("llama", "0.8", "compressed")
    expect_sentence(calibrate(compressed, tmp_path), "compressed", "original")


def test_unknown_device(model, tmp_path):
    expect_sentence(calibrate(model, tmp_path, "--device", "cuda:99"), "cuda:99")


def test_options_that_are_missing_or_misspelt_exit_with_2(cache, tmp_path):
    assert run("compress", "--calib_cache", cache, "--target_compression", "0.8").code == 2
    assert run("calibrate", "--model_path", "x").code == 2
    assert run("compress", "--calib_cache", cache, "--target_compression", "0.8", "--rank_method", "best").code == 2
