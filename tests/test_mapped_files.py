"""Codes that were read to be checked do not stay in memory, and keep their values."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hisvd.component.coded_linears import check_buffers
from hisvd.component.mapped_files import forget_pages, in_file, mapped_ranges
from hisvd.component.quantized_linear import QuantizedLinear

SIDE = 4096  # 16 MiB of codes, more than whatever else is read meanwhile


def resident_file_bytes():
    """How much of mapped files is in this process's memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@pytest.fixture
def mapped_codes(tmp_path):
    codes = torch.randint(-127, 128, (SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    save_file({"weight_int8": codes, "weight_scale": torch.ones(SIDE, 1)}, tmp_path / "codes.safetensors")
    return codes, load_file(tmp_path / "codes.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_checked_codes_leave_the_memory_and_keep_their_values(mapped_codes):
    codes, entries = mapped_codes
    module = QuantizedLinear(SIDE, SIDE, "int8", bias=False)
    module.load_state_dict(entries, assign=True)
    assert in_file(module.codes)
    before = resident_file_bytes()
    check_buffers(torch.nn.Sequential(module))
    assert resident_file_bytes() - before < SIDE * SIDE // 2
    assert torch.equal(module.codes, codes)
    assert resident_file_bytes() - before > SIDE * SIDE // 2  # the comparison has read them


def test_what_is_not_in_a_file_is_left_alone():
    own, borrowed = torch.arange(10_000), torch.frombuffer(bytearray(b"\1" * 100_000), dtype=torch.uint8)
    assert in_file(borrowed)  # by the sign that it goes by, but no file is mapped there
    for tensor in (own, borrowed):
        forget_pages(tensor, mapped_ranges())
    assert torch.equal(own, torch.arange(10_000)) and (borrowed == 1).all()
