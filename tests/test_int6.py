"""The INT6 format against its slow reference, the fit of codes by its properties, and the module."""

import itertools
import json
import logging

import pytest
import torch
from conftest import ROOT
from int6_reference import VECTORS, cases, encoded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import hisvd
from hisvd.component import int6_linear
from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.errors import HiSVDError
from hisvd.factor_forms import dense_weight, factor_tensors
from hisvd.int6_fit import ChunkMetrics, best_chunk, fit_int6, fit_weight, int6_entries
from hisvd.sparse_int6 import (
    check_packed,
    dequantize,
    make_encodable,
    pack,
    pack_weight,
    padded,
    prune,
    quantize,
    unpack,
)

KEPT = [[2 * a, 2 * a + 1, 2 * b, 2 * b + 1] for a, b in itertools.combinations(range(4), 2)]
DROPPED = [[i for i in range(8) if i not in kept] for kept in KEPT]
SHARED = ROOT.parent / "shared" / "reference" / "int6_vectors.json"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(rows, columns, bias=False, seed=0):
    """An nn.Linear of the normal weight, and a normal bias."""
    layer = nn.Linear(columns, rows, bias=bias)
    layer.weight.data = normal(rows, columns, seed=seed)
    if bias:
        layer.bias.data = normal(rows, seed=5)
    return layer


def second_moment(n, seed=0):
    """The second moment of strongly correlated inputs, a few of them large."""
    inputs = normal(n, 3 * n, seed=seed) * normal(n, 1, seed=seed + 1).exp() + 2 * normal(1, 3 * n, seed=seed + 2)
    return (inputs @ inputs.T / (3 * n)).double()


def legal_codes(rows, chunks, seed=0):
    """Random codes that the format can hold: two pairs per chunk, no zero in them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-32, 31, (rows, chunks, 4, 2), generator=generator)
    values[values >= 0] += 1
    kept = torch.rand(rows, chunks, 4, generator=generator).argsort(-1) < 2
    return (values * kept[..., None]).flatten(1).to(torch.int8)


def output_error(weight, tensors, moment):
    error = weight.double() - dequantize(**tensors, in_features=weight.shape[1], dtype=torch.float64)
    return ((error @ moment) * error).sum().item()


# --- the format ---


def check_vector(weight, payload, metadata, scales):
    weight = torch.tensor(weight, dtype=torch.float32)
    tensors = pack_weight(weight)
    assert tensors["packed_weight"].numpy().tobytes().hex() == payload
    assert [word & 0xFFFFFFFF for word in tensors["metadata"].flatten().tolist()] == metadata
    expected = torch.tensor(scales, dtype=torch.float32)
    assert ((tensors["scales"] - expected).abs() <= expected * torch.finfo(torch.float32).eps).all()
    return tensors


def test_our_vectors_are_what_the_slow_reference_makes():
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert vectors == {name: {"weight": w, **encoded(w)} for name, w in cases().items()}


@pytest.mark.parametrize("name", cases())
def test_format_of_our_vectors(name):
    vector = json.loads(VECTORS.read_text(encoding="utf-8"))[name]
    tensors = check_vector(vector["weight"], vector["payload"], vector["metadata"], vector["scales"])
    assert unpack(tensors["packed_weight"], tensors["metadata"]).tolist() == vector["codes"]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared test vectors are missing")
def test_format_of_the_shared_vectors():
    for case in json.loads(SHARED.read_text(encoding="utf-8"))["cases"].values():
        weight = torch.tensor(case["weight"]).view(case["shape"])
        tensors = check_vector(weight.tolist(), case["packed_hex"], case["metadata"], case["scales"])
        dequantized = dequantize(**tensors, in_features=case["shape"][1], dtype=torch.float32)
        torch.testing.assert_close(dequantized.flatten(), torch.tensor(case["dequantized"]), rtol=3e-7, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_unpack_undoes_pack_for_all_legal_codes(seed):
    q = legal_codes(7, 24, seed)
    assert torch.equal(make_encodable(q), q)
    payload, metadata = pack(q)
    assert payload.shape == (7, 72) and metadata.shape == (7, 3)
    assert torch.equal(unpack(payload, metadata), q)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(unpack(payload, metadata, dtype), q.to(dtype))


def test_any_code_becomes_legal_and_legal_codes_stay():
    q = torch.randint(-3, 4, (50, 192), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    once = make_encodable(q)
    pairs = once.unflatten(1, (-1, 4, 2)) != 0
    assert torch.equal(pairs.any(-1), pairs.all(-1)) and (pairs.any(-1).sum(-1) == 2).all()
    assert torch.equal(make_encodable(once), once)


def test_any_payload_decodes():
    generator = torch.Generator().manual_seed(0)
    payload = torch.randint(0, 256, (9, 48), generator=generator, dtype=torch.uint8)
    metadata = torch.randint(-(2**31), 2**31, (9, 2), generator=generator).to(torch.int32)
    q = unpack(payload, metadata)
    assert q.shape == (9, 128) and q.min() >= -32 and q.max() <= 31


@pytest.mark.parametrize(
    ("part", "change", "fragment"),
    [
        ("packed_weight", lambda t: t[:, :-1], "needs torch.uint8 (5, 48)"),
        ("packed_weight", lambda t: t.to(torch.int16), "torch.int16"),
        ("metadata", lambda t: t[:-1], "(4, 2)"),
        ("metadata", lambda t: t.long(), "torch.int64"),
        ("metadata", lambda t: torch.zeros_like(t), "does not follow the first"),
        ("metadata", lambda t: torch.full_like(t, 0x44444441), "does not follow the first"),
        ("scales", lambda t: t.double(), "torch.float64"),
        ("scales", lambda t: t * torch.nan, "NaN"),
    ],
)
def test_damaged_weights_are_named(part, change, fragment):
    tensors = pack_weight(normal(5, 100))
    check_packed(**tensors, shape=(5, 100))
    with pytest.raises(HiSVDError, match=part) as error:
        check_packed(**tensors | {part: change(tensors[part])}, shape=(5, 100))
    assert fragment in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = normal(4, 64)
    weight[2, 3] = value
    with pytest.raises(HiSVDError, match="NaN or infinite"):
        pack_weight(weight)


# --- the fit ---


@pytest.mark.parametrize("seed", range(3))
def test_unrounded_chunk_is_the_optimum_over_all_pairs(seed):
    metric, wanted = second_moment(8, seed), normal(6, 8, seed=seed)
    chosen, wanted = best_chunk(wanted, ChunkMetrics.from_metric(metric), None).double(), wanted.double()
    for row, target in zip(chosen, wanted, strict=True):
        errors = []
        for kept, dropped in zip(KEPT, DROPPED, strict=True):
            root = torch.linalg.cholesky(metric).T
            solution = torch.linalg.lstsq(root[:, kept], (root @ target)[:, None]).solution[:, 0]
            best = torch.zeros(8, dtype=torch.float64)
            best[kept] = solution
            assert (best[dropped] == 0).all()
            errors.append((root @ (target - best)).square().sum())
        root = torch.linalg.cholesky(metric).T
        torch.testing.assert_close((root @ (target - row)).square().sum(), min(errors), rtol=1e-4, atol=0)


def test_rounded_chunk_is_near_the_optimum_over_all_codes():
    """Codes −1, 0, 1 … by brute force around the unrounded optimum of every pair choice."""
    metric, wanted, scales = second_moment(8), normal(4, 8), torch.full((4,), 0.05)
    chosen = best_chunk(wanted, ChunkMetrics.from_metric(metric), scales).double()
    wanted, scales = wanted.double(), scales.double()
    for row, target, scale in zip(chosen, wanted, scales, strict=True):
        least = torch.inf
        for kept, dropped in zip(KEPT, DROPPED, strict=True):
            inner = metric[kept][:, kept]
            ideal = target[kept] + torch.linalg.solve(inner, metric[kept][:, dropped]) @ target[dropped]
            steps = torch.tensor(list(itertools.product([-1, 0, 1], repeat=4)), dtype=torch.float64)
            q = ((ideal / scale).round() + steps).clamp(-32, 31)
            q = q[(q != 0).all(1)]
            errors = target.repeat(len(q), 1)
            errors[:, kept] -= q * scale
            least = min(least, ((errors @ metric) * errors).sum(1).min().item())
        error = target - row
        assert ((error @ metric) @ error).item() <= 1.05 * least


@pytest.mark.parametrize("shape", [(12, 64), (20, 200), (3, 70), (4, 1)])
def test_fit_is_legal_and_sweeps_only_lower_the_error(shape):
    weight, moment = normal(*shape, seed=3), second_moment(shape[1], seed=4)
    errors = []
    for sweeps in (0, 1, 4):
        q, scales = fit_int6(weight, moment, sweeps)
        assert torch.equal(make_encodable(q), q) and q.shape == padded(weight).shape
        payload, metadata = pack(q)
        errors.append(output_error(weight, dict(packed_weight=payload, metadata=metadata, scales=scales), moment))
    plain = output_error(weight, pack_weight(weight), moment)
    rounding = 1e-6 * output_error(weight, pack_weight(torch.zeros(shape)), moment)
    assert errors[0] <= plain + rounding and errors[1] <= errors[0] + rounding and errors[2] <= errors[1] + rounding


def test_fit_of_independent_inputs_is_no_worse_than_the_plain_rule():
    weight = normal(30, 128)
    moment = torch.eye(128, dtype=torch.float64)
    fitted, plain = (output_error(weight, code, moment) for code in (fit_weight(weight, moment), pack_weight(weight)))
    assert fitted <= plain


def test_zero_rows_and_dead_inputs_can_be_fitted():
    weight, moment = normal(5, 64), second_moment(64)
    weight[1] = 0
    moment[10:20] = 0
    moment[:, 10:20] = 0
    tensors = fit_weight(weight, moment)
    check_packed(**tensors, shape=(5, 64))
    assert dequantize(**tensors, in_features=64, dtype=torch.float32)[1].abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["pivoted", "svd"])
def test_outer_factor_corrects_the_error_of_the_inner_one(form):
    left, right, moment = normal(160, 80).double(), normal(80, 128, seed=1).double(), second_moment(128)
    factors = factor_tensors(left, right, form, torch.float32)
    entries = int6_entries(factors, moment)
    outer, inner = ("coefficients", "base") if form == "pivoted" else ("left", "right")
    assert {f"{outer}.packed_weight", f"{inner}.packed_weight", f"{outer}.scales"} <= entries.keys()
    unaware = dict(entries)
    unaware |= {f"{outer}.{k}": t for k, t in pack_weight(factors[f"{outer}.weight"]).items()}

    def error(state):
        difference = left @ right - dense_weight(state, 128)
        return ((difference @ moment) * difference).sum()

    assert error(entries) < 0.9 * error(unaware)


def test_weights_of_fewer_than_64_inputs_stay_dense():
    factors = factor_tensors(normal(160, 40).double(), normal(40, 128).double(), "pivoted", torch.float32)
    entries = int6_entries(factors, second_moment(128))
    assert "base.packed_weight" in entries and entries["coefficients.weight"].dtype == torch.float32
    small = {"weight": normal(5, 63)}
    assert int6_entries(small, None) == small


# --- the module ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("columns", [128, 70, 1])
def test_module_is_a_linear_of_its_dequantized_weight(bias, tokens, columns):
    dense = linear(10, columns, bias)
    module = INT6SparseLinear.from_dense(dense)
    assert (module.format_name, module.user_alias) == ("int6_2x4_pairwise_sparse", "int6_2:4sp")
    x = normal(1, tokens, columns, seed=6)
    expected = torch.nn.functional.linear(x, module.dequantize_weight(), dense.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    if columns % 8 == 0:
        plain, _ = quantize(prune(padded(normal(10, columns))))
        assert torch.equal(module.dequantize_weight() != 0, plain[:, :columns] != 0)


def test_module_of_a_linear_is_a_copy_and_only_linears_are_taken():
    dense = linear(10, 64, bias=True).to(torch.bfloat16)
    module = INT6SparseLinear.from_dense(dense)
    assert (module.in_features, module.out_features) == (64, 10)
    assert module.bias.dtype == torch.bfloat16 and not module.bias.requires_grad
    with torch.no_grad():
        before = module.bias.clone()
        dense.bias += 1
        assert torch.equal(module.bias, before)
    for other in (Conv1D(64, 64), normal(10, 64)):
        with pytest.raises(TypeError, match=type(other).__name__):
            INT6SparseLinear.from_dense(other)


def test_no_tokens_give_no_outputs():
    module = INT6SparseLinear.from_dense(linear(10, 64, bias=True))
    assert module(normal(0, 64)).shape == (0, 10) and module(normal(2, 0, 64)).shape == (2, 0, 10)


def test_gradients_reach_the_input():
    module, x = INT6SparseLinear.from_dense(linear(10, 64)), normal(2, 64).requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize_weight().sum(0).expand(2, -1))


def test_scales_stay_float32_whatever_the_model_is_cast_to():
    module = INT6SparseLinear.from_dense(linear(10, 64, bias=True)).to(torch.bfloat16)
    assert module.scales.dtype == torch.float32 and module.bias.dtype == torch.bfloat16
    assert module(normal(20, 64).to(torch.bfloat16)).dtype == torch.bfloat16
    assert module.to("meta").scales.is_meta


def test_forward_never_holds_the_dense_weight():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes())
            return result

    module = INT6SparseLinear(2048, 16384, bias=False)  # 128 MiB as a dense float32 weight
    with Largest() as largest:
        module(torch.ones(8, 2048))
    assert largest.size <= module.packed_weight.numel()


def test_without_a_compiler_few_tokens_take_the_same_path_as_many(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: broken)
    int6_linear.fused_product.cache_clear()
    module = INT6SparseLinear.from_dense(linear(10, 64))
    x = normal(1, 64)
    with caplog.at_level(logging.WARNING, "hisvd"):
        first, second = module(x), module(x)
    assert torch.equal(first, x @ module.dequantize_weight().T) and torch.equal(first, second)
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "no compiler here" in caplog.records[0].message
    int6_linear.fused_product.cache_clear()


# --- any model ---


def test_export_packs_every_wide_linear_of_any_module_and_leaves_the_model_alone():
    shared = linear(8, 64, bias=True)
    model = nn.ModuleDict(
        {"a": shared, "deep": nn.Sequential(nn.ReLU(), linear(5, 70), shared), "small": linear(9, 63)}
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = hisvd.export_sparse_int6_model(model, quality_gate_delta=0.1)
    layers = exported.pop("layers")
    assert exported == {
        "format": "int6_2x4_pairwise_sparse",
        "user_alias": "int6_2:4sp",
        "quality_gate_delta": 0.1,
        "bits_per_stored_value": 6,
        "pair_sparsity": "2_of_4_pairs_per_8_values",
        "effective_payload_bits_per_dense_weight_before_metadata": 3.0,
    }
    assert list(layers) == ["a", "deep.1", "deep.2"] and layers["a"] is layers["deep.2"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, module in layers.items():
        plain = pack_weight(before[f"{name}.weight"])
        assert all(torch.equal(tensor, getattr(module, part)) for part, tensor in plain.items())
    stored = layers["deep.1"].packed_weight
    assert 8 * stored.numel() == exported["effective_payload_bits_per_dense_weight_before_metadata"] * 5 * 128
    for name, module in layers.items():
        model.set_submodule(name, module)
    assert sum(isinstance(module, INT6SparseLinear) for module in model.modules()) == 2
    assert list(hisvd.export_sparse_int6_model(linear(3, 64))["layers"]) == [""]


def test_export_of_a_model_that_cannot_be_packed_names_the_linear():
    model = nn.Sequential(linear(4, 64), linear(4, 64))
    assert hisvd.export_sparse_int6_model(model)["quality_gate_delta"] == 0.025
    for delta in (-0.1, float("nan")):
        with pytest.raises(HiSVDError, match="quality_gate_delta"):
            hisvd.export_sparse_int6_model(model, delta)
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(HiSVDError, match="1: A weight to be stored in INT6 holds NaN"):
        hisvd.export_sparse_int6_model(model)
