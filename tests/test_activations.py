"""Hidden states between layers: always in files, in memory up to a budget, with the same results."""

import pytest
import torch
from conftest import calibrate_arguments, run, saved_tensors

from hisvd.utils.activation_files import ActivationFile
from hisvd.utils.model_utils import open_checkpoint
from hisvd.utils.streaming import StreamedModel


def batches_of(hidden, size):
    return iter(hidden.split(size))


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_written_is_read_again(tmp_path, in_memory):
    hidden = torch.randn(7, 3, 5)
    file = ActivationFile(tmp_path / "a.bin", (7, 3, 5), torch.float32, in_memory)
    head = ActivationFile(tmp_path / "b.bin", (5, 3, 5), torch.float32, in_memory)
    for scale in (1, 2):  # the second write replaces the first
        file.write(batches_of(scale * hidden, 2), head)
        assert file.is_whole() and head.is_whole()
        if in_memory:
            file.path.unlink()
        for stored, expected in ((file, scale * hidden), (head, scale * hidden[:5])):
            read = list(stored.read(2, torch.device("cpu")))
            assert torch.equal(torch.cat(read), expected)
            read[0].zero_()  # a reader may overwrite its batch
            assert torch.equal(torch.cat(list(stored.read(2, torch.device("cpu")))), expected)


def test_only_what_fits_the_budget_is_held_in_memory(model_folders, tmp_path):
    tokens = torch.zeros(6, 32, dtype=torch.long)
    size = 6 * 32 * 64 * 4
    checkpoint = open_checkpoint(str(model_folders["llama"]))
    streamed = StreamedModel(checkpoint, 4, torch.device("cpu"), torch.float32, 2.5 * size)
    files = [streamed.file(tmp_path / f"{n}.bin", tokens[:count]) for n, count in enumerate((6, 6, 6, 3, 1))]
    assert [file.in_memory for file in files] == [True, True, False, True, False]
    assert streamed.file(tmp_path / "0.bin", tokens) is files[0]


def test_results_do_not_depend_on_the_budget(model_folders, caches, tmp_path):
    arguments = calibrate_arguments(model_folders["llama"], tmp_path)
    assert run("calibrate", *arguments, "--activation_budget_gb", 0.0002).code == 0
    cache = tmp_path / "tiny_n6_s32_with_hessian"
    for file in caches["llama"].glob("*.safetensors"):
        assert (cache / file.name).read_bytes() == file.read_bytes()
    where = ["--model_path", model_folders["llama"], "--calib_cache", cache, "--target_compression", 0.7]
    assert run("compress", *where, "--save_model", tmp_path / "files").code == 0
    assert run("compress", *where, "--save_model", tmp_path / "memory", "--activation_budget_gb", 1).code == 0
    files, memory = saved_tensors(tmp_path / "files"), saved_tensors(tmp_path / "memory")
    assert files.keys() == memory.keys() and all(torch.equal(files[name], memory[name]) for name in files)
