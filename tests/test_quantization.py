"""--linear_dtype: integer codes of weights, and models that store them."""

import json

import pytest
import torch
from conftest import IDS, expect_sentence, run, saved_tensors
from test_rounding import correlated_inputs, normal
from transformers import AutoModelForCausalLM

import hisvd
from hisvd.component.quantized_linear import QuantizedLinear
from hisvd.integer_codes import INTEGERS, check_codes, dequantize_codes, pack_codes, unpack_codes
from hisvd.quantization import fit_codes, group_scales, integer_entries

QUICK = ("--update", "none")


@pytest.mark.parametrize("columns", [1, 31, 32, 64, 100])
@pytest.mark.parametrize("name", INTEGERS)
def test_codes_are_packed_without_loss(name, columns):
    largest = INTEGERS[name].largest
    codes = torch.randint(-largest, largest + 1, (5, columns), generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes.to(torch.int8), name)
    assert packed.nbytes == 5 * (columns if name == "int8" else -(-columns // 2))
    assert torch.equal(unpack_codes(packed, columns), codes.to(torch.int8))


@pytest.mark.parametrize("columns", [32, 100])
@pytest.mark.parametrize("name", INTEGERS)
def test_fit_stands_for_what_the_files_hold_and_is_found_again(name, columns):
    weight, root = normal(6, columns), torch.linalg.cholesky(correlated_inputs(columns))
    weight[2] = 0
    fit = fit_codes(weight, root, name)
    stored = dequantize_codes(pack_codes(fit.codes, name), fit.scales, columns, torch.float64)
    assert torch.equal(stored, fit.weight)
    assert not stored[2].any() and (fit.scales > 0).all()
    check_codes(pack_codes(fit.codes, name), fit.scales, name)
    again = fit_codes(stored, torch.eye(columns, dtype=torch.float64), name)
    torch.testing.assert_close(again.weight, stored, rtol=0, atol=0.02 * weight.abs().max().item())


@pytest.mark.parametrize("name", INTEGERS)
def test_independent_inputs_are_rounded_to_nearest(name):
    weight = normal(4, 96)
    fit = fit_codes(weight, torch.eye(96, dtype=torch.float64), name)
    steps = INTEGERS[name].of_columns(fit.scales.double(), 96)
    inside = weight.abs() <= INTEGERS[name].largest * steps
    assert ((fit.weight - weight).abs() <= steps / 2 * (1 + 1e-9))[inside].all() and inside.float().mean() > 0.9


@pytest.mark.parametrize("name", INTEGERS)
def test_feedback_lowers_the_output_error_on_correlated_inputs(name):
    errors = {"feedback": 0.0, "nearest": 0.0}
    for seed in range(4):
        weight, root = normal(20, 64, seed=seed), torch.linalg.cholesky(correlated_inputs(64, seed))
        nearest = fit_codes(weight, torch.eye(64, dtype=torch.float64), name).weight
        errors["feedback"] += ((weight - fit_codes(weight, root, name).weight) @ root).square().sum().item()
        errors["nearest"] += ((weight - nearest) @ root).square().sum().item()
    assert errors["feedback"] < errors["nearest"] / 3, errors


@pytest.mark.parametrize("name", INTEGERS)
def test_feedback_costs_nothing_on_weakly_correlated_inputs(name):
    errors = {"feedback": 0.0, "nearest": 0.0}
    for seed in range(8):
        inputs = normal(64, 256, seed=seed + 100)
        weight, root = normal(20, 64, seed=seed), torch.linalg.cholesky(inputs @ inputs.T)
        nearest = fit_codes(weight, torch.eye(64, dtype=torch.float64), name).weight
        errors["feedback"] += ((weight - fit_codes(weight, root, name).weight) @ root).square().sum().item()
        errors["nearest"] += ((weight - nearest) @ root).square().sum().item()
    assert errors["feedback"] <= errors["nearest"], errors
