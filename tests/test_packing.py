"""The files with weights of a finished folder: few and large, whatever the number of layers."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import IDS, run, saved_tensors
from safetensors.torch import load_file, save_file

import hisvd
from hisvd.errors import HiSVDError
from hisvd.utils import save_utils
from hisvd.utils.files import write_json
from hisvd.utils.model_folders import safetensors_header
from hisvd.utils.safetensors_merge import merge_safetensors


def test_merged_files_hold_the_same_tensors_each_aligned(tmp_path):
    """Odd numbers of bytes in one file must not shift the wide dtypes of the next."""
    files = {
        "a": {"a.codes": torch.arange(7, dtype=torch.uint8), "a.half": torch.randn(3).bfloat16()},
        "b": {
            "b.weight": torch.randn(5, 3),
            "b.order": torch.arange(9, dtype=torch.int32),
            "b.none": torch.empty(0, 4),
        },
        "c": {"c.wide": torch.randn(2, dtype=torch.float64), "c.flag": torch.tensor([True])},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    merge_safetensors([tmp_path / name for name in files], tmp_path / "all.safetensors")
    merged, expected = load_file(tmp_path / "all.safetensors"), {k: t for f in files.values() for k, t in f.items()}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[k], t) and merged[k].dtype == t.dtype for k, t in expected.items())
    start, header = safetensors_header(tmp_path / "all.safetensors")
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (start + entry["data_offsets"][0]) % expected[name].element_size() == 0, name


def test_a_small_model_is_one_file_without_an_index(chain):
    folder = chain("llama", "0.7", "out")
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("limit", [60_000, 150_000])
def test_a_larger_one_is_as_few_files_as_the_limit_allows(chain, monkeypatch, limit):
    whole = chain("llama", "0.7", "whole")
    monkeypatch.setattr(save_utils, "MAX_SHARD_BYTES", limit)
    folder = chain("llama", "0.7", "several")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files] and len(files) > 1
    sizes = [file.stat().st_size for file in files]
    assert all(a + b > limit for a, b in pairwise(sizes)), "two could be one"
    one, several = saved_tensors(whole), saved_tensors(folder)
    assert one.keys() == several.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in several.values())
    with torch.no_grad():
        assert torch.equal(hisvd.load(whole)(IDS).logits, hisvd.load(folder, verify=True)(IDS).logits)


@pytest.mark.parametrize("stop", ["merge_safetensors", "write_text", "_place_packed", "_remove_work"])
def test_a_run_that_ends_while_files_are_packed_resumes(chain, model_folders, caches, tmp_path, monkeypatch, stop):
    clean = chain("llama", "0.7", "clean")
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--target_compression", 0.7]
    owner = save_utils if hasattr(save_utils, stop) else save_utils.ModelWriter
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(owner, stop, interrupted)
        assert run("compress", *where, "--save_model", tmp_path / "out").code == 130
    shards = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(shards) == (1 if stop == "_remove_work" else 5)
    assert run("compress", *where, "--save_model", tmp_path / "out").code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["clean", "out"]
    for file in clean.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_packed_files_that_are_in_place_are_not_taken_for_shards(tmp_path, monkeypatch):
    """A shard cut in two, of which one part fits beside the other shard: as many files as shards, of the same names."""
    monkeypatch.setattr(save_utils, "MAX_SHARD_BYTES", 1000)
    tensors = {"a": torch.ones(90), "b": torch.ones(200), "c": torch.ones(90)}

    def writer():
        return save_utils.ModelWriter(tmp_path / "out", {"linear_numbers_before": 1}, 2)

    unfinished, move, moved = writer(), Path.rename, []
    unfinished.write_shard(0, {"a": tensors["a"]})
    unfinished.write_shard(1, {"b": tensors["b"], "c": tensors["c"]})
    unfinished.pack()
    assert [file.name for file in unfinished.weight_files()] == [unfinished._shard(index).name for index in range(2)]
    write_json(unfinished.folder / "hisvd.json", unfinished.plan)

    def interrupted(path, target):
        moved.append(path)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        unfinished.finish()
    writer().finish()
    found = saved_tensors(tmp_path / "out")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], t) for name, t in tensors.items())


def test_a_shard_that_is_cut_off_is_named_and_not_read_without_an_end(tmp_path):
    shard = tmp_path / "shard.safetensors"
    save_file({"weight": torch.ones(1000)}, shard)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(HiSVDError, match=r"shard\.safetensors"):
        merge_safetensors([shard], tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()
