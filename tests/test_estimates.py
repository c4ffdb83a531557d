"""The dry run and the disk check agree with what a run takes; large results are split into several shards."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import HEADS, SHARED, calibrate_arguments, expect_sentence, run, saved_tensors
from safetensors.torch import load_file
from transformers import LlamaConfig, MixtralConfig

import hisvd
from hisvd.estimates import shapes_of
from hisvd.machine_rates import MOVED, Rates, Work, measure_rates
from hisvd.stage_estimates import RunSizes, activation_bytes, cache_bytes, estimated_stages, stream_bytes
from hisvd.utils import save_utils
from hisvd.utils.activation_files import ActivationFile
from hisvd.utils.model_utils import empty_model, open_checkpoint
from hisvd.utils.save_utils import split_by_bytes

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TB = 10**12


def test_shapes_are_those_of_the_model():
    shapes = shapes_of(empty_model(LlamaConfig(**LLAMA_7B)))
    assert shapes.parameters == 6_738_415_616  # the published count
    assert shapes.layers[0].shapes == [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    mixture = shapes_of(empty_model(MixtralConfig(**SHARED, **HEADS, num_local_experts=3)))
    assert len(mixture.layers[0].shapes) == 4 + 9


def test_disk_of_a_calibration_is_what_its_files_take(model_folders, caches, tmp_path, monkeypatch):
    written = {}
    write = ActivationFile.write

    def recording(self, batches, head=None):
        write(self, batches, head)
        for file in (self, head) if head else (self,):
            written[file.path] = file.path.stat().st_size

    monkeypatch.setattr(ActivationFile, "write", recording)
    assert run("calibrate", *calibrate_arguments(model_folders["llama"], tmp_path)).code == 0
    checkpoint = open_checkpoint(str(model_folders["llama"]))
    shapes = shapes_of(empty_model(checkpoint.config))
    sizes = RunSizes(nsamples=6, grad_nsamples=6, seqlen=32, compute=torch.float32, stored=torch.float32)
    assert sum(written.values()) == activation_bytes(shapes, sizes)
    stored = [file for file in caches["llama"].glob("*.safetensors") if file.name != "tokens.safetensors"]
    in_files = sum(t.nbytes for file in stored for t in load_file(file).values())
    assert in_files == cache_bytes(shapes, gradients=True)

    written.clear()
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"]
    assert run("compress", *where, "--target_compression", "0.8,0.6").code == 0
    assert sum(written.values()) == stream_bytes(64, 6 * 32, torch.float32, 2)


def test_a_full_disk_is_reported_before_the_start(model_folders, caches, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(TB, TB, 1000))
    result = run("calibrate", *calibrate_arguments(model_folders["llama"], tmp_path))
    expect_sentence(result, "MB on the disk of", str(tmp_path), "1,000 bytes left", "free some")
    assert not list(tmp_path.rglob("layer_*"))
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "out"]
    expect_sentence(
        run("compress", *where, "--target_compression", 0.8), "MB on the disk of", "out.partial", "1,000 bytes left"
    )
    assert not list(tmp_path.rglob("model-*"))


def test_dry_run_needs_a_config_alone(tmp_path):
    LlamaConfig(**LLAMA_7B, dtype="bfloat16").save_pretrained(tmp_path / "model")
    arguments = ["--model_path", tmp_path / "model", "--model_name", "x", "--output_dir", tmp_path / "cache"]
    result = run("calibrate", *arguments, "--dry_run", "--device", "cpu", "--json", tmp_path / "dry.json")
    assert result.code == 0, result
    assert not (tmp_path / "cache").exists()
    figures = json.loads((tmp_path / "dry.json").read_text())
    names = [
        "calibrate: inputs",
        "calibrate: gradients",
        "compress",
        "compress: --refine weights",
        "evaluate --offload_folder",
    ]
    assert [stage["stage"] for stage in figures["stages"]] == names
    for stage in figures["stages"]:
        assert stage["stage"] in result.output
        assert 2**30 < stage["memory_bytes"] < 16 * 2**30  # a machine of 24 GiB has room for a 7B model
        assert stage["stage"] not in names[:3] or stage["memory_bytes"] > 2 * 11008**2 * 8
        assert (
            f"{stage['memory_bytes'] / 2**30:.1f}" in result.output
            and f"{stage['disk_bytes'] / 1e9:.1f}" in result.output
        )
        assert stage["seconds"] > 0
    expect_sentence(run("calibrate", *arguments[:1], tmp_path / "none", *arguments[2:], "--dry_run"), "none")


def test_estimates_grow_with_what_they_depend_on():
    def peak(layers=2, nsamples=8, targets=1, **shape):
        config = LlamaConfig(**{**SHARED, **HEADS, **shape, "num_hidden_layers": layers})
        sizes = RunSizes(nsamples, 4, 32, torch.float32, torch.float32, targets)
        return estimated_stages(shapes_of(empty_model(config)), sizes)[:3]

    one, deeper, longer = peak(), peak(layers=20), peak(nsamples=16)
    for base, deep, long in zip(one, deeper, longer, strict=True):
        assert base.memory == deep.memory == long.memory  # that of one layer
        assert base.disk < deep.disk and base.disk < long.disk
        more = [long.work.products[d] > base.work.products[d] for d in (torch.float32, torch.float64)]
        assert more == ["gradients" not in base.name, False]  # whose number of sequences is unchanged
        assert deep.work.decompositions == {kind: 10 * count for kind, count in base.work.decompositions.items()}
    wider, more = peak(intermediate_size=16000), peak(targets=3)
    assert all(a.memory < b.memory for a, b in zip(one, wider, strict=True)) and one[2].memory < more[2].memory


def test_parts_keep_to_the_limit():
    tensors = {str(i): torch.zeros(size, dtype=torch.uint8) for i, size in enumerate((3, 4, 9, 1, 1, 5, 2))}
    parts = split_by_bytes(tensors, 6)
    assert [list(part) for part in parts] == [["0"], ["1"], ["2"], ["3", "4"], ["5"], ["6"]]


@pytest.mark.parametrize("output", ["out", "out.pt"])
def test_large_shards_go_into_several_files(model_folders, caches, tmp_path, monkeypatch, output):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--target_compression", 0.9]
    options = ["--update", "none", "--export", "int6", "--quality_gate_delta", 0.5]
    assert run("compress", *where, *options, "--save_model", tmp_path / "whole").code == 0
    monkeypatch.setattr(save_utils, "MAX_SHARD_BYTES", 40_000)
    assert run("compress", *where, *options, "--save_model", tmp_path / output).code == 0
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert output == "out.pt" or len(files) > 2
    whole, split = saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / output)
    weights = {name: tensor for name, tensor in split.items() if isinstance(tensor, torch.Tensor)}
    assert weights.keys() == whole.keys() and all(torch.equal(whole[name], weights[name]) for name in whole)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            hisvd.load(tmp_path / output)(ids).logits, hisvd.load(tmp_path / "whole")(ids).logits
        )


def test_seconds_add_up_from_rates_and_scale_decompositions_from_the_nearest_size():
    f64, work = torch.float64, Work(memory=6.0, disk=8.0)
    work.products[f64] = 100.0
    work.decompositions["eigh", f64, 512] = 3
    both = work + work
    rates = Rates({f64: 50.0}, {("eigh", f64, 256): 1.0, ("eigh", f64, 2048): 100.0}, memory=2.0, disk=4.0)
    assert rates.seconds(work) == 2 + 3 * 8 + 3 + 2 and rates.seconds(both) == 2 * rates.seconds(work)


def test_rates_are_measured_for_all_that_is_to_be_done(monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or fsync(fd))
    work = Work(memory=1.0)
    work.products[torch.bfloat16] = 1.0
    work.decompositions["cholesky", torch.float64, 300] = 1
    rates = measure_rates(torch.device("cpu"), work)
    assert rates.products.keys() == {torch.bfloat16} and 0 < rates.seconds(work) < 60
    assert list(rates.decompositions) == [("cholesky", torch.float64, 256)]
    assert synced == [MOVED], "a disk is as quick as what has reached it"
