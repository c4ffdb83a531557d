"""Every figure that is printed or stored, counted again from the bytes of the files by code of its own."""

import json
import math
import struct

import pytest
import torch
from conftest import build_model, calibrate_arguments, run, short_text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
LINEARS = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
KINDS = {
    "none": ("--target_compression", "0.6"),
    "svd": ("--target_compression", "0.5", "--factors", "svd", "--moves", "low_rank"),
    "int8": ("--target_compression", "0.8", "--linear_dtype", "int8"),
    "int4": ("--target_compression", "0.7", "--linear_dtype", "int4", "--factors", "svd"),
    "bytes": ("--target_bytes", "0.3"),
    "int6": ("--target_compression", "0.8", "--export", "int6", "--quality_gate_delta", "none"),
    "gated": ("--target_compression", "1", "--export", "int6", "--quality_gate_delta", "0.02"),
    "plain": ("--target_compression", "0.7", "--export", "plain", "--width_multiple", "8"),
    "dense": ("--target_compression", "0.7", "--export", "dense"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer):
    """A model in bfloat16 and its cache."""
    root = tmp_path_factory.mktemp("figures")
    build_model(CONFIG, root / "model", tokenizer, torch.bfloat16)
    assert run("calibrate", *calibrate_arguments(root / "model", root, "tiny")).code == 0
    return root


def headers(folder):
    """Tensor name → (shape, bytes), from the headers of the safetensors files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["shape"], last - first)
        assert len(data) == 8 + length + max(
            e["data_offsets"][1] for n, e in json.loads(data[8 : 8 + length]).items() if n != "__metadata__"
        )
    return found


def values(found, prefix, columns):
    """(rows, values that a model reads) of the matrix at `prefix`, in whatever form; None: there is none."""
    for key, share in (("weight", 1), ("weight_int8", 1), ("weight_int4", 1), ("packed_weight", 2)):
        if f"{prefix}.{key}" in found:
            rows = found[f"{prefix}.{key}"][0][0]
            return rows, rows * columns // share
    return None


def linear(found, name, columns):
    """(outputs, values) of a linear that reads `columns` inputs."""
    for inner, outer in (("base", "coefficients"), ("right", "left")):
        first = values(found, f"{name}.{inner}", columns)
        if first:
            second = values(found, f"{name}.{outer}", first[0])
            return second[0] + (first[0] if inner == "base" else 0), first[1] + second[1]
    return values(found, name, columns)


def recount(folder):
    """(values in the decoder's linears, values in the model, bytes of the linears' tensors)."""
    found, linears = headers(folder), 0
    names = [f"model.layers.{layer}.{path}" for layer in range(2) for path in LINEARS]
    inputs = {}
    for name in names:
        inputs[name], count = linear(found, name, inputs[name.replace("down", "up")] if "down" in name else 64)
        linears += count
    inside = {k: v for k, v in found.items() if k.startswith(tuple(f"{name}." for name in names))}
    others = sum(math.prod(shape) for k, (shape, _) in found.items() if k not in inside)
    return linears, linears + others, sum(size for _, size in inside.values())


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(work, tmp_path, kind):
    out = tmp_path / "out"
    where = ["--model_path", work / "model", "--calib_cache", work / "tiny_n6_s32_with_hessian", "--update", "none"]
    printed = run("compress", *where, *KINDS[kind], "--save_model", out, "--json", tmp_path / "c.json")
    assert printed.code == 0, printed
    before, model_before, bytes_before = recount(work / "model")
    after, model_after, bytes_after = recount(out)
    file_bytes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (work / "model", out)]
    report = json.loads((out / "hisvd.json").read_text())
    expected = {
        "linear_numbers_before": before,
        "linear_numbers_after": after,
        "linear_kept": after / before,
        "model_numbers_before": model_before,
        "model_numbers_after": model_after,
        "model_kept": model_after / model_before,
        "weight_bytes_before": file_bytes[0],
        "weight_bytes_after": file_bytes[1],
        "bits_per_number": 8 * file_bytes[1] / model_before,
    }
    assert {key: report[key] for key in expected} == expected
    if kind == "bytes":
        assert (report["linear_bytes_before"], report["linear_bytes_after"]) == (bytes_before, bytes_after)
        assert f"{bytes_after:,} of {bytes_before:,} bytes ({bytes_after / bytes_before:.3%}" in printed.output
    assert json.loads((tmp_path / "c.json").read_text()) == [report]
    assert f"{after:,} of {before:,} linear parameters kept ({after / before:.3%})" in printed.output
    assert f"{model_after:,} of {model_before:,} parameters ({model_after / model_before:.1%})" in printed.output
    assert (
        f"{file_bytes[1]:,} of {file_bytes[0]:,} bytes ({8 * file_bytes[1] / model_before:.2f} bits" in printed.output
    )
    found, card = headers(out), (out / "README.md").read_text()
    assert f"{after:,} of {before:,};" in card and f"{model_after:,} of {model_before:,}." in card
    planned = sum(row["numbers"] for row in report["sublayers"])
    assert planned == report["linear_numbers_planned"] == sum(t["stored"] for t in report["by_type"].values())
    coded = {name.rpartition(".")[0] for name in found if name.endswith("packed_weight")}
    if coded:
        bits = 8 * sum(found[f"{name}.{part}"][1] for name in coded for part in ("packed_weight", "metadata", "scales"))
        weights = 64 * sum(math.prod(found[f"{name}.metadata"][0]) for name in coded)
        assert report["int6"]["weights"] == len(coded) and report["int6"]["total_bits_per_weight"] == bits / weights
        assert f"{len(coded)} weights, {bits / weights:.3f} bits per weight" in printed.output
    elif kind != "dense":
        assert planned == after
    options = ["--datasets", short_text(), "--nsamples", 1, "--seqlen", 16, "--json", tmp_path / "e.json"]
    table = run("evaluate", "--model_path", out, *options)
    assert table.code == 0, table
    (figures,) = json.loads((tmp_path / "e.json").read_text())
    stored = ("linear_numbers_dense", "linear_numbers_stored", "linear_kept", "weight_file_bytes")
    assert [figures[key] for key in stored] == [before, after, after / before, file_bytes[1]]
    assert f" {after / before:.2%} " in table.output and f" {file_bytes[1] / 1e6:.1f} " in table.output


def test_perplexity(work, tmp_path):
    options = ["--datasets", short_text(), "--nsamples", 20, "--seqlen", 32, "--json", tmp_path / "e.json"]
    assert run("evaluate", "--model_path", work / "model", *options).code == 0
    (figures,) = json.loads((tmp_path / "e.json").read_text())
    with open(short_text(), encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(work / "model")(file.read(), add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    losses = []
    for window in torch.tensor(ids[: 20 * 32]).view(20, 1, 32):
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.double())
    loss = torch.stack(losses).mean().item()
    measured = figures["perplexity"][short_text()]
    assert measured["tokens_scored"] == 20 * 31
    assert measured["nll"] == pytest.approx(loss, rel=1e-5) and measured["perplexity"] == pytest.approx(
        math.exp(loss), rel=1e-5
    )
