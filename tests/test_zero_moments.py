"""Layers added with zero output projections (LLaMA Pro): gradients, inputs or weights that are all zero."""

import math
import time

import pytest
import torch
from conftest import (
    CONFIGS,
    IDS,
    assert_budget_spent,
    build_model,
    calibrate_arguments,
    linear_parameters,
    run,
    saved_tensors,
)
from safetensors.torch import load_file, save_file

import hisvd
from hisvd.cached_moments import input_moment, output_moment
from hisvd.calibration_cache import read_cache
from hisvd.factor_forms import FORMS, factor_tensors
from hisvd.rank_allocation import budget_of, project_shares, ranks_from_shares, stage1_shares
from hisvd.shape_utils import Sublayer, is_dense, stored_parameters
from hisvd.whitening_svd import (
    F_DAMPING,
    H_DAMPING,
    cholesky_root,
    optimal_factors,
    second_moment,
    singular_values,
    whitened,
)
from hisvd.width_allocation import loss_ranks

SHAPES = [(64, 64), (32, 64), (160, 64), (64, 160)]
SUBLAYERS = [Sublayer(f"{i}.{t}", i, str(t), str(t), *shape) for i in range(10) for t, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def grown(tokenizer, tmp_path_factory):
    """(model folder, cache): layer 2 adds nothing to the residual stream, the MLP of layer 1 has no hidden values."""
    root = tmp_path_factory.mktemp("zeros")
    folder = build_model(CONFIGS["llama"], root / "model", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    for name in ("2.self_attn.o_proj", "2.mlp.down_proj", "1.mlp.up_proj"):
        tensors[f"model.layers.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert run("calibrate", *calibrate_arguments(folder, root)).code == 0
    return folder, root / "tiny_n6_s32_with_hessian"


def test_the_cache_holds_moments_that_are_zero(grown):
    cache, cpu = read_cache(grown[1]), torch.device("cpu")
    statistics = {index: cache.read_layer(index) for index in (1, 2)}
    moments = {s.name.removeprefix("model.layers."): s for s in cache.sublayers}
    for name in ("2.self_attn.q_proj", "2.mlp.gate_proj", "1.mlp.gate_proj"):
        s = moments[name]
        assert not statistics[s.layer][f"{s.path}.F"].any()
        assert not statistics[s.layer][f"{s.path}.two_sided_singular_values"].any()
        assert output_moment(s, statistics[s.layer], "two_sided", cpu).diagonal().min() > 0
    assert not input_moment(moments["1.mlp.down_proj"], statistics[1], cpu).any()


@pytest.mark.parametrize("update", ["none", "sequential"])
@pytest.mark.parametrize("options", [(), ("--factors", "svd"), ("--allocation", "hisvd"), ("--export", "int6")])
def test_compressed_models_are_finite_and_meet_the_budget(grown, tmp_path, update, options):
    folder, cache = grown
    where = ["--model_path", folder, "--calib_cache", cache, "--save_model", tmp_path / "out", "--update", update]
    result = run("compress", *where, "--target_compression", "0.85,0.5", *options)
    assert result.code == 0, result
    before = linear_parameters(saved_tensors(folder))
    dense = hisvd.load(folder)
    for target, name in ((0.85, "out_85p"), (0.5, "out_50p")):
        tensors = saved_tensors(tmp_path / name)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        if options != ("--export", "int6"):
            assert 0.998 * target * before <= linear_parameters(tensors) <= target * before
        with torch.no_grad():
            logits = hisvd.load(tmp_path / name)(IDS).logits
        assert logits.isfinite().all()
        if target == 0.85 and not options:  # what matters stays whole, except for a rank or so
            assert (logits - dense(IDS).logits).norm() < 0.05 * dense(IDS).logits.norm()


# --- factors ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", ["H", "F", "W", "all"])
@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6)])
def test_factors_are_finite_whatever_is_zero(form, dtype, zero, m, n):
    torch.manual_seed(0)
    weight = torch.randn(m, n) * (zero not in ("W", "all"))
    h, f = (torch.randn(k, 3 * k).double() for k in (n, m))
    h, f = h @ h.T * (zero not in ("H", "all")), f @ f.T * (zero not in ("F", "all"))
    root, output = cholesky_root(h, H_DAMPING), second_moment(f, F_DAMPING)
    a = whitened(weight, root, output)
    left, right, _ = optimal_factors(weight, root, output, 3)
    entries = factor_tensors(left, right, form, dtype, root)
    assert all(tensor.isfinite().all() for tensor in entries.values())
    if zero in ("H", "F"):  # as without that side
        without = {"H": (None, output), "F": (root, None)}[zero]
        expected = torch.matmul(*optimal_factors(weight, *without, 3)[:2])
        torch.testing.assert_close(left @ right, expected, rtol=1e-6, atol=1e-9)
        assert not singular_values(a).float().any()
    else:
        assert not (left @ right).any()


def test_gradients_close_to_zero_give_factors_that_can_be_stored():
    torch.manual_seed(0)
    weight, f = torch.randn(6, 10), torch.randn(6, 18).double()
    products = []
    for scale in (1.0, 1e-44):
        output = second_moment(scale * f @ f.T, F_DAMPING)
        left, right, _ = optimal_factors(weight, None, output, 3)
        assert left.float().isfinite().all() and right.float().any()
        products.append(left @ right)
    torch.testing.assert_close(*products)


# --- allocation ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero_layers", [0, 2, 6, 10])
@pytest.mark.parametrize("target", [0.9, 0.5])
def test_loss_allocation_spends_the_budget_where_nothing_is_lost(form, zero_layers, target):
    spectra = [torch.rand(s.full_rank).sort(descending=True)[0] * (s.layer >= zero_layers) for s in SUBLAYERS]
    ranks = loss_ranks(spectra, SUBLAYERS, target, form)
    assert_budget_spent(ranks, SUBLAYERS, target, form)
    real = [is_dense(r, s.shape, form) for r, s in zip(ranks, SUBLAYERS, strict=True) if s.layer >= zero_layers]
    assert all(real) == (10 - zero_layers <= 10 * target)
    rest = [stored_parameters(r, s.shape, form) / s.size for r, s in zip(ranks, SUBLAYERS, strict=True)][
        : 4 * zero_layers
    ]
    if all(real) and rest:  # the others have equal shares
        assert max(rest) - min(rest) < 0.2


@pytest.mark.parametrize("scale", [0, 1e-40])
def test_loss_allocation_of_a_large_model_with_zero_layers_is_quick(scale):
    large = [Sublayer(str(i), i, "t", "t", *shape) for i in range(24) for shape in ((1024, 1024), (4096, 1024))]
    spectra = [torch.rand(s.full_rank).sort(descending=True)[0] * (1 if s.layer < 15 else scale) for s in large]
    start = time.perf_counter()
    ranks = loss_ranks(spectra, large, 0.9, "pivoted")
    assert time.perf_counter() - start < 5  # rank by rank through all zero tails: most of a minute
    total = sum(stored_parameters(r, s.shape, "pivoted") for r, s in zip(ranks, large, strict=True))
    assert 0.999 * budget_of(large, 0.9) < total <= budget_of(large, 0.9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ones", [0, 8, 32, 40])
def test_stage1_meets_the_budget_also_where_weights_have_rank_one(form, ones):
    """Density ln 1 = 0 asks for no share at all: it gets what the others cannot use."""
    ranks = [1.0] * ones + [30.0] * (len(SUBLAYERS) - ones)
    shares = stage1_shares(SUBLAYERS, ranks, 0.9, 1.0, form)
    assert sum(shares) == pytest.approx(budget_of(SUBLAYERS, 0.9), rel=1e-9)
    assert_budget_spent(ranks_from_shares(shares, SUBLAYERS, 0.9, form), SUBLAYERS, 0.9, form)


def test_shares_that_are_all_zero_are_spread_by_size():
    shares = project_shares([0.0] * len(SUBLAYERS), SUBLAYERS, 0.5, "svd")
    assert sum(shares) == pytest.approx(budget_of(SUBLAYERS, 0.5))
    assert all(math.isclose(share, 0.5 * s.size, rel_tol=1e-6) for share, s in zip(shares, SUBLAYERS, strict=True))
