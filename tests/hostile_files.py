"""A tiny model, its cache and the compressed model, to be damaged; and what must then be said."""

import json
import os

import pytest
import torch
from conftest import build_model, run, short_text
from transformers import LlamaConfig

import hisvd
from hisvd.evaluation import streamed_model

TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
CACHE = "tiny_n2_s16_with_hessian"
Q = "model.layers.0.self_attn.q_proj"
WAYS = {
    "hisvd.load": hisvd.load,
    "streamed": lambda path: streamed_model(str(path), torch.device("cpu"), "float32", 16),
}


def calibrate(folder, *options):
    where = ["--model_path", folder / "model", "--model_name", "tiny", "--output_dir", folder]
    return run("calibrate", *where, "--dataset", short_text(), "--nsamples", 2, "--seqlen", 16, *options)


def compress(folder, output, *options):
    where = ["--model_path", folder / "model", "--calib_cache", folder / CACHE, "--save_model", folder / output]
    return run("compress", *where, "--target_compression", "0.6", "--update", "none", *options)


def make_all(folder, tokenizer, config=CONFIG):
    """Fill `folder` with a model, its cache, and the compressed model as a folder and a file."""
    build_model(config, folder / "model", tokenizer)
    assert calibrate(folder).code == 0
    assert compress(folder, "out").code == 0 and compress(folder, "out.pt").code == 0


def plan_only(folder):
    return run("compress", "--calib_cache", folder / CACHE, "--target_compression", "0.7", "--plan_only")


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def expect_refusal(path, *fragments):
    """Neither hisvd.load nor streaming takes the model."""
    for load in WAYS.values():
        with pytest.raises(hisvd.HiSVDError) as refusal:
            load(path)
        for fragment in (str(path), *fragments):
            assert fragment in str(refusal.value), refusal.value


def replace_by(kind, path):
    """Put something that is no file at `path`."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path}[kind])
