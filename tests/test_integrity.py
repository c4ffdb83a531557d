"""What is on disk is what was written: flipped bits, missing and surplus weight files are named."""

import json
import random
import shutil

import pytest
import torch
from conftest import expect_sentence, run, short_text

import hisvd
from hisvd.utils import save_utils


@pytest.fixture(scope="module")
def outputs(model_folders, caches, tmp_path_factory):
    """A compressed model as a folder of several files and as one file."""
    root = tmp_path_factory.mktemp("outputs")
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--update", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_utils, "MAX_SHARD_BYTES", 150_000)  # one decoder layer
        for name in ("out", "out.pt"):
            result = run("compress", *where, "--target_compression", "0.6", "--save_model", root / name)
            assert result.code == 0, result
    return root


@pytest.fixture
def folder(outputs, tmp_path):
    return shutil.copytree(outputs / "out", tmp_path / "out")


def verify(*paths):
    models = [part for path in paths for part in ("--model_path", path)]
    return run("evaluate", *models, "--datasets", short_text(), "--nsamples", 1, "--seqlen", 16, "--verify")


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def expect_refusal(path, *fragments):
    with pytest.raises(hisvd.HiSVDError) as refusal:
        hisvd.load(path, verify=True)
    for fragment in fragments:
        assert str(fragment) in str(refusal.value), refusal.value


def test_intact_models_pass_beside_their_original(outputs, model_folders):
    assert verify(model_folders["llama"], outputs / "out", outputs / "out.pt").code == 0
    for name in ("out", "out.pt"):
        assert hisvd.load(outputs / name, verify=True) is not None
    expect_refusal(model_folders["llama"], model_folders["llama"], "no checksums")


def test_a_flipped_bit_in_any_weight_file_is_named(folder):
    files, draw = sorted(folder.glob("*.safetensors")), random.Random(0)
    assert len(files) == 5
    for file in files:
        whole = file.read_bytes()
        flip(file, draw.randrange(8 * len(whole)))
        expect_refusal(folder, file, "checksum")
        if file == files[-1]:
            expect_sentence(verify(folder), str(file), "checksum")
        file.write_bytes(whole)
    assert hisvd.load(folder, verify=True) is not None


def test_a_flipped_bit_in_a_file_is_found_unless_nothing_reads_it(outputs, tmp_path):
    file, draw, found = tmp_path / "out.pt", random.Random(0), 0
    whole = (outputs / "out.pt").read_bytes()
    intact = torch.load(outputs / "out.pt", weights_only=True)
    for _ in range(12):
        file.write_bytes(whole)
        flip(file, draw.randrange(8 * len(whole)))
        try:
            hisvd.load(file, verify=True)
        except hisvd.HiSVDError as error:
            assert str(file) in str(error)
            found += 1
        else:
            content = torch.load(file, weights_only=True)
            assert all(
                torch.equal(v, content[k]) if isinstance(v, torch.Tensor) else v == content[k]
                for k, v in intact.items()
            )
    assert found >= 9
    weight = intact["model.embed_tokens.weight"]
    file.write_bytes(whole)
    flip(file, 8 * whole.index(weight.numpy().tobytes()) + 5)
    assert not torch.equal(hisvd.load(file).get_input_embeddings().weight, weight)
    expect_sentence(verify(file), str(file), "checksum")


def test_missing_and_surplus_weight_files_are_named(folder):
    file = folder / "model-00002-of-00005.safetensors"
    file.rename(folder / "model.safetensors")
    expect_refusal(folder, folder / "model.safetensors", "no weight file")
    (folder / "model.safetensors").unlink()
    expect_refusal(folder, file, "missing")


def test_files_that_the_index_alone_names_are_surplus(folder):
    (folder / "more").mkdir()
    shutil.copy(folder / "model-00001-of-00005.safetensors", folder / "more" / "a.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == "model-00001-of-00005.safetensors")
    index["weight_map"][name] = "more/a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_refusal(folder, folder / "more" / "a.safetensors", "no weight file")


@pytest.mark.parametrize("report", [None, {"linear_numbers_before": 1}])
def test_a_model_without_checksums_is_not_called_intact(folder, report):
    (folder / "hisvd.json").unlink()
    if report:
        (folder / "hisvd.json").write_text(json.dumps(report))
    expect_sentence(verify(folder), str(folder), "no checksums")
    expect_refusal(folder, folder, "no checksums")
