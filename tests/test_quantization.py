"""--linear_dtype: integer codes of weights, and models that store them."""

import json
import re
import sys

import pytest
import torch
from conftest import IDS, expect_sentence, run, saved_tensors
from safetensors.torch import load_file, save_file
from test_rounding import correlated_inputs, normal
from transformers import AutoModelForCausalLM

import hisvd
from hisvd.component.coded_linears import CODED_LINEARS
from hisvd.component.quantized_linear import QuantizedLinear, int4_operands
from hisvd.factor_forms import dense_weight, factor_tensors
from hisvd.integer_codes import INTEGERS, check_codes, dequantize_codes, pack_codes, unpack_codes
from hisvd.quantization import fit_codes, integer_entries, mixed
from hisvd.utils.model_utils import open_checkpoint
from hisvd.utils.streaming import StreamedModel

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
def test_fit_stands_for_what_the_files_hold_(name, columns):
    weight, root = normal(6, columns), torch.linalg.cholesky(correlated_inputs(columns))
    weight[2] = 0
    fit = fit_codes(weight, root, name)
    stored = dequantize_codes(pack_codes(fit.codes, name), fit.scales, columns, torch.float64)
    assert torch.equal(stored, fit.weight)
    assert not stored[2].any() and (fit.scales > 0).all()
    check_codes(pack_codes(fit.codes, name), fit.scales, name)


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


@pytest.mark.parametrize("form", ["pivoted", "svd"])
@pytest.mark.parametrize("name", INTEGERS)
def test_factors_lose_less_than_by_rounding_each_to_nearest(name, form):
    root = torch.linalg.cholesky(correlated_inputs(80) + torch.eye(80))
    entries = factor_tensors(normal(60, 40), normal(40, 80, seed=1), form, torch.float32)
    exact = dense_weight(entries, 80)
    coded = integer_entries(entries, root @ root.T, name)
    assert all(key.rpartition(".")[2] in (f"weight_{name}", "weight_scale") for key in coded.keys() - {"permutation"})
    nearest = dict(entries)
    for key in entries.keys() - {"permutation"}:
        nearest[key] = fit_codes(entries[key], torch.eye(entries[key].shape[1]).double(), name).weight

    def error(entries):
        return ((dense_weight(entries, 80) - exact) @ root).norm() / (exact @ root).norm()

    assert error(coded) < 0.7 * error(nearest)


def coded_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(
    ("family", "form", "options"),
    [
        ("llama", "int8", ()),
        ("mistral", "int4", ("--factors", "svd", "--moves", "low_rank")),
        ("qwen2", "int4", ("--factors", "svd", *QUICK)),
    ],
)
def test_folder_and_pt_load_to_the_same_logits_and_generate(chain, tmp_path, family, form, options):
    """Narrow, factored and dense linears; by our loader and transformers', again after save_pretrained."""
    dtype = ("--linear_dtype", form, *options)
    folder, file = chain(family, "0.6", "folder", *dtype), chain(family, "0.6", "file.pt", *dtype)
    models = [hisvd.load(folder), hisvd.load(file), AutoModelForCausalLM.from_pretrained(folder).eval()]
    models[0].save_pretrained(tmp_path / "again")
    models.append(hisvd.load(tmp_path / "again"))
    assert len(coded_modules(models[0])) >= 4 * 7
    assert not any(type(m) is torch.nn.Linear for m in models[0].model.layers.modules())
    with torch.no_grad():
        logits = [model(IDS).logits for model in models]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    saved, again = saved_tensors(folder), saved_tensors(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in saved.items())
    half = hisvd.load(folder, dtype=torch.bfloat16)
    scales = {module.weight_scale.dtype for module in coded_modules(half).values()}
    assert scales == {INTEGERS[form].scale} and half.dtype == torch.bfloat16
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (models[1].generate(IDS, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    for path in (folder, tmp_path / "again"):
        table = json.loads((path / "config.json").read_text())["quantization_config"]
        assert table["format_version"] == 3


def test_int8_computes_nearly_what_the_checkpoints_dtype_does(chain):
    """Also layer by layer, on narrow and pivoted linears."""
    models = [hisvd.load(chain("llama", "0.6", f"{i}", *QUICK, *o)) for i, o in enumerate(((), INT8))]
    with torch.no_grad():
        exact, coded = (model(IDS).logits for model in models)
    assert (coded - exact).norm() < 0.02 * exact.norm()


INT8, INT4 = ("--linear_dtype", "int8"), ("--linear_dtype", "int4", "--factors", "svd")


def test_sizes_are_those_of_the_files(chain, tmp_path):
    reports = {}
    for name, options in {"plain": ("--factors", "svd"), "int8": (*INT8, "--factors", "svd"), "int4": INT4}.items():
        folder = chain("llama", "0.8", name, *QUICK, *options)
        reports[name] = json.loads((folder / "hisvd.json").read_text())
        where = ["--datasets", "python-docs", "--seqlen", 32, "--nsamples", 2, "--json", tmp_path / f"{name}.json"]
        for extra in ([], ["--offload_folder", tmp_path / "offload"]):
            assert run("evaluate", "--model_path", folder, *where, *extra).code == 0
            figures = json.loads((tmp_path / f"{name}.json").read_text())[0]
            assert figures["linear_kept"] == pytest.approx(reports[name]["linear_kept"])
            assert figures["weight_file_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        tensors = saved_tensors(folder)
        assert reports[name]["weight_bytes_after"] >= sum(t.nbytes for t in tensors.values())
        if name != "plain":
            codes = [t for key, t in tensors.items() if key.endswith(f"weight_{name}")]
            numbers = reports[name]["linear_numbers_after"]
            assert sum(t.nbytes for t in codes) == pytest.approx(numbers * (1 if name == "int8" else 0.5), rel=0.02)
    assert reports["int8"]["model_numbers_after"] == reports["plain"]["model_numbers_after"]
    assert reports["int4"]["model_numbers_after"] == reports["plain"]["model_numbers_after"]


@pytest.mark.parametrize("codes", [("--linear_dtype", "int8"), ("--export", "int6", "--quality_gate_delta", "none")])
def test_scales_keep_their_dtype_layer_by_layer(chain, codes):
    folder = chain("llama", "0.8", "out", *QUICK, *codes)
    checkpoint = open_checkpoint(str(folder), compressed_too=True)
    streamed = StreamedModel(checkpoint, 1, torch.device("cpu"), torch.bfloat16)
    module = next(m for m in streamed.layer(0).modules() if isinstance(m, CODED_LINEARS))
    assert {t.dtype for t in module.buffers() if t.is_floating_point()} == {torch.float32}


def test_bf16_rounds_linears_alone(chain, model_folders):
    tensors = saved_tensors(chain("qwen2", "0.8", "out", *QUICK, "--linear_dtype", "bf16"))
    kinds = {("proj" in name and not name.endswith("bias"), t.dtype) for name, t in tensors.items()} - {
        (True, torch.int32)
    }
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    plain = saved_tensors(chain("qwen2", "0.8", "plain", "--export", "plain", *QUICK, "--linear_dtype", "bf16"))
    assert plain["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_damaged_scales_are_refused(chain, tmp_path, factor):
    folder = chain("llama", "0.8", "out", *QUICK, *INT8)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    save_file(tensors | {name: factor * tensors[name]}, file, metadata={"format": "pt"})
    with pytest.raises(hisvd.HiSVDError, match=re.escape(name)):
        hisvd.load(folder)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--linear_dtype", "int8", "--export", "int6"), "--export int6"),
        (("--linear_dtype", "bf16", "--export", "int6"), "--export int6"),
        (("--linear_dtype", "int8", "--export", "plain"), "--export plain"),
        (("--linear_dtype", "int4", "--export", "dense"), "--export dense"),
        (("--linear_dtype", "int4"), "--factors svd"),
    ],
)
def test_bad_combinations(caches, model_folders, tmp_path, options, fragment):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--save_model", tmp_path / "o"]
    expect_sentence(run("compress", *where, "--target_compression", "0.8", *options), fragment)


@pytest.mark.parametrize("shape", [(8, 64), (13, 100)])
def test_operands_for_the_int4_kernel_make_the_same_weight(shape):
    """Those for GPUs: multiplied by the kernel for CPUs, which takes them before they are packed."""
    rows, columns = shape
    module = QuantizedLinear(columns, rows, "int4", bias=False)
    module.load_state_dict(integer_entries({"weight": normal(*shape).float()}, torch.eye(columns), "int4"))
    codes, scales = int4_operands(module, 16, 1024)
    x = normal(3, columns).float()
    wide = torch.nn.functional.pad(x, (0, codes.shape[1] - columns))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, packed, 32, scales.float())
    torch.testing.assert_close(y[:, :rows], module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (13, 40), (13, 96), (64, 128)])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_few_tokens_are_multiplied_by_the_codes(name, shape, monkeypatch):
    rows, columns = shape
    used = []
    product = QuantizedLinear._few_token_product
    monkeypatch.setattr(
        QuantizedLinear, "_few_token_product", lambda self, x: (used.append(len(x)), product(self, x))[1]
    )
    module = QuantizedLinear(columns, rows, name, bias=True).bfloat16()
    for seed, assign in enumerate((True, True, False)):  # what was packed for one weight is not used for the next
        entries = integer_entries({"weight": normal(rows, columns, seed=seed)}, torch.eye(columns), name)
        module.load_state_dict(entries | {"bias": normal(rows).bfloat16()}, assign=assign)
        x = normal(8, 2, columns).bfloat16()
        used.clear()
        many, few = module(x), [module(x[:1, :1]), module(x[:1])]
        assert used == ([1, 2] if columns % 32 == 0 else [])
        limit = 0.02 * many.abs().max().item()
        torch.testing.assert_close(few[0], many[:1, :1], rtol=0.02, atol=limit)
        torch.testing.assert_close(few[1], many[:1], rtol=0.02, atol=limit)
        x.requires_grad_()
        module(x[:1]).sum().backward()
        assert x.grad[:1].abs().sum() > 0


def test_torchao_takes_int8(chain):
    pytest.importorskip("torchao")
    folder = chain("qwen2", "0.6", "out", *QUICK, *INT8)
    model = hisvd.to_torchao(hisvd.load(folder))
    assert not coded_modules(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, hisvd.load(folder)(IDS).logits, rtol=1e-3, atol=1e-3)


def test_torchao_must_be_there(monkeypatch):
    model = torch.nn.Sequential(QuantizedLinear(64, 8, "int4", bias=True))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(hisvd.HiSVDError, match=r"pip install 'hisvd\[quant\]'"):
        hisvd.to_torchao(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INTEGERS)
def test_module_multiplies_by_its_weight(name, dtype):
    module = QuantizedLinear(100, 24, name, bias=True).to(dtype)
    module.load_state_dict(
        integer_entries({"weight": normal(24, 100).float()}, torch.eye(100), name) | {"bias": normal(24)}
    )
    x = normal(2, 3, 100).to(dtype)
    expected = x.double() @ module.dequantize_weight(torch.float64).T + module.bias.double()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.75, torch.float16: 0.1}[dtype]
    assert module(x).dtype == dtype
    torch.testing.assert_close(module(x).double(), expected, rtol=0, atol=tolerance)
    x.requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], module.dequantize_weight(dtype).sum(0), rtol=0.02, atol=tolerance)


def test_mixing_keeps_the_product_and_lets_feedback_save_more():
    """Factors like those of a weight: strong directions first, with columns of the outer factor that grow."""
    strength = torch.logspace(0, -3, 48, dtype=torch.float64)
    outer = torch.linalg.qr(normal(64, 48)).Q / strength.sqrt()
    inner = strength[:, None] ** 1.5 * torch.linalg.qr(normal(80, 48, seed=1)).Q.T
    outer[:, 3] = 0
    new_outer, new_inner = mixed(outer, inner)
    assert (new_outer.shape, new_inner.shape) == (outer.shape, inner.shape)
    torch.testing.assert_close(new_outer @ new_inner, outer @ inner)
    entries = {"left.weight": outer.float(), "right.weight": inner.float()}
    fixed = {"base.weight": inner.float(), "coefficients.weight": outer.float(), "permutation": torch.arange(112)}
    root = torch.eye(80, dtype=torch.float64)
    error = (dense_weight(integer_entries(entries, root, "int8"), 80) - outer @ inner).norm()
    unmixed = dense_weight(integer_entries(fixed, root, "int8"), 80)[48:]
    assert error < 0.5 * (unmixed - outer @ inner).norm()
