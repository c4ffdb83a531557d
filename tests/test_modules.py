"""Factor forms, their modules and the swap, on models of several families."""

import ast
import sys

import pytest
import torch
from conftest import HEADS, IDS, ROOT, SHARED
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, StableLmConfig
from transformers.pytorch_utils import Conv1D

import hisvd
from hisvd.component.adapter import Adapter, Experts, Mlp
from hisvd.component.experts import SeparateExperts
from hisvd.component.families import ADAPTERS, adapter_for
from hisvd.component.low_rank import MODULE_OF_FORM, PivotedLinear, swap_linears
from hisvd.errors import HiSVDError, naming
from hisvd.factor_forms import FORMS, FactorForm, dense_weight, factor_tensors, form_of, modules_of
from hisvd.int6_fit import int6_entries
from hisvd.quantization import integer_entries
from hisvd.rank_allocation import budget_of
from hisvd.shape_utils import Sublayer, is_dense, largest_rank, stored_parameters
from hisvd.utils.streaming import decoder_layers
from hisvd.width_allocation import loss_ranks


def test_every_form_has_a_module_and_names_of_its_own():
    assert list(FORMS) == list(MODULE_OF_FORM)
    names = [{form.inner, form.outer, *form.others} for form in FORMS.values()]
    assert all(names.count(own) == 1 for own in names)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_module_computes_the_product_of_its_factors(form, bias):
    torch.manual_seed(0)
    left, right = torch.randn(12, 4), torch.randn(4, 10)
    module = MODULE_OF_FORM[form](10, 12, 4, bias)
    state = factor_tensors(left, right, form, torch.float32) | ({"bias": torch.randn(12)} if bias else {})
    module.load_state_dict(state)
    torch.testing.assert_close(dense_weight(state, 10).float(), left @ right, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 10)
    expected = torch.nn.functional.linear(x, left @ right, state.get("bias"))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(chain, form):
    model = hisvd.load(chain("qwen2", "0.6", "out", "--update", "none", "--factors", form, "--min_saving", "0"))
    kinds = {type(module) for module in model.modules()}
    assert MODULE_OF_FORM[form] in kinds
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


class ScaledLinear(nn.Module):
    """y = scale * left (right x): the module of a form that the library does not know."""

    def __init__(self, in_features, out_features, rank, bias):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.right, self.left = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
        self.scale = nn.Parameter(torch.empty(out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x):
        y = self.scale * self.left(self.right(x))
        return y if self.bias is None else y + self.bias


def pack_scaled(left, right, root, dtype):
    scale = left.abs().amax(1)
    tensors = {"left.weight": left / scale[:, None], "right.weight": right, "scale": scale}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture
def scaled(monkeypatch):
    """A third form, registered by one entry in each of the two tables."""
    form = FactorForm(
        inner="right",
        outer="left",
        others=("scale",),
        parameters=lambda rank, shape: rank * sum(shape) + shape[0],
        pack=pack_scaled,
        product=lambda inner, outer, entries: entries["scale"].double()[:, None] * (outer @ inner),
    )
    monkeypatch.setitem(FORMS, "scaled", form)
    monkeypatch.setitem(MODULE_OF_FORM, "scaled", ScaledLinear)


def test_a_new_form_is_an_entry_and_a_module(scaled):
    torch.manual_seed(0)
    assert stored_parameters(3, (20, 30), "scaled") == 3 * 50 + 20 and is_dense(12, (20, 30), "scaled")
    assert largest_rank(3 * 50 + 20, (20, 30), "scaled") == 3 and largest_rank(3 * 50 + 19, (20, 30), "scaled") == 2
    sublayers = [Sublayer(str(i), i, "t", "t", 20, 30) for i in range(4)]
    spectra = [torch.rand(20).sort(descending=True)[0] for _ in sublayers]
    ranks = loss_ranks(spectra, sublayers, 0.5, "scaled")
    spent = sum(stored_parameters(r, s.shape, "scaled") for r, s in zip(ranks, sublayers, strict=True))
    assert 0 <= budget_of(sublayers, 0.5) - spent < 50

    left, right, x = torch.randn(80, 70).double(), torch.randn(70, 90).double(), torch.randn(2, 90)
    entries = factor_tensors(left, right, "scaled", torch.float32)
    assert form_of(entries) == "scaled" and form_of(factor_tensors(left, right, "svd", torch.float32)) == "svd"
    torch.testing.assert_close(dense_weight(entries, 90), left @ right, rtol=1e-4, atol=1e-4)
    for state in (entries, int6_entries(entries, torch.eye(90))):
        model = nn.Sequential(nn.Linear(90, 80, bias=False))
        swap_linears(model, modules_of("0", state, (80, 90), (80, 90)))
        model[0].load_state_dict(state)
        torch.testing.assert_close(model(x), x @ dense_weight(state, 90).float().T, rtol=1e-4, atol=1e-3)


def test_an_unknown_form_is_named():
    with pytest.raises(KeyError, match="gram"):
        stored_parameters(1, (3, 4), "gram")
    with pytest.raises(KeyError, match="gram"):
        factor_tensors(torch.ones(3, 1), torch.ones(1, 4), "gram", torch.float32)
    with pytest.raises(HiSVDError, match="0 is stored in the form 'gram'"):
        swap_linears(nn.Sequential(nn.Linear(4, 3)), {"0": {"form": "gram", "rank": 1}})


@pytest.mark.parametrize("form", [*FORMS, "dense"])
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_factors_that_are_not_finite_are_refused(form, value, dtype):
    left, right = torch.randn(5, 2).double(), value * torch.ones(2, 4).double()
    with pytest.raises(HiSVDError, match=r"layers\.1\.q: its factors hold NaN or infinite"), naming("layers.1.q"):
        factor_tensors(left, right, form, dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("form", FORMS)
def test_full_rank_factors_reproduce_the_logits(model_folders, family, form):
    model = AutoModelForCausalLM.from_pretrained(model_folders[family]).eval()
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        before = model(ids).logits
        adapter = adapter_for(model)
        for index, layer in enumerate(decoder_layers(model, adapter)):
            for path in adapter.sublayer_paths(layer):
                linear = layer.get_submodule(path)
                u, s, vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
                name = f"{adapter.layers}.{index}.{path}"
                swap_linears(model, {name: {"form": form, "rank": len(s)}})
                state = factor_tensors(u * s, vh, form, torch.float32)
                model.get_submodule(name).load_state_dict(state, strict=linear.bias is None)  # the swap kept the bias
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_what_a_loaded_model_needs_imports_no_fitting_code():
    allowed = {"torch", "torchao", "transformers", "peft", *sys.stdlib_module_names}
    ours = tuple(f"hisvd.{name}" for name in ("component", "errors", "integer_codes", "schema", "sparse_int6"))
    for file in sorted((ROOT / "component").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = ["." * node.level + (node.module or "")]
            for module in modules:
                assert module.split(".")[0] in allowed or module.startswith(ours), f"{file.name} imports {module}"


def test_swap_names_a_module_that_is_not_there(model_folders):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    with pytest.raises(HiSVDError, match=r"layers\.9\.nothing"):
        swap_linears(model, {"model.layers.9.nothing": {"form": "svd", "rank": 1}})


def test_families_and_the_generic_fallback(model_folders):
    families = {}
    for name, folder in model_folders.items():
        adapter = adapter_for(AutoModelForCausalLM.from_pretrained(folder))
        families[name] = (adapter.family, adapter.layers)
    assert families == {
        "llama": ("llama", "model.layers"),
        "mistral": ("mistral", "model.layers"),
        "qwen2": ("qwen2", "model.layers"),
    }


def test_a_new_family_is_an_entry_and_its_variants_are_data(monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(StableLmConfig(**SHARED, **HEADS))
        opt = AutoModelForCausalLM.from_config(OPTConfig(num_hidden_layers=1, hidden_size=48, num_attention_heads=4))
    assert adapter_for(model).family == "generic (stablelm)"
    parallel = Adapter("stablelm, parallel", "model.layers", {"in": ("self_attn.q_proj", "mlp.up_proj")})
    own = Adapter("stablelm", "model.layers", {}, variants={("use_parallel_residual", True): parallel})
    monkeypatch.setitem(ADAPTERS, "stablelm", own)
    assert adapter_for(model) is own
    model.config.use_parallel_residual = True
    assert adapter_for(model) is parallel
    assert adapter_for(opt).stream == ("self_attn.out_proj", "fc2")
    opt.config.do_layer_norm_before = False
    assert adapter_for(opt).stream == ()


def test_experts_take_the_place_of_the_inputs_their_adapter_names():
    class Fused(nn.Module):
        act_fn = nn.SiLU()
        gate_up_proj, down_proj = torch.ones(2, 8, 3), torch.ones(2, 3, 4)

    inputs = {"a": ("q",), "mlp_in": ("up",), "feed": ("down",)}
    groups = {"e.*": ("experts.*.g", "experts.*.u"), "router": ("gate",)}
    mlps = (Mlp(("shared.u",), "shared.d"), Mlp(("experts.*.g", "experts.*.u"), "experts.*.d", fused=2))
    experts = Experts(("g", "u", "d"), groups, mlps, instead_of=("feed",))
    own = (Mlp(("up",), "down"),)
    adapter, layer = Adapter("f", "layers", inputs, mlps=own, experts=experts), nn.Module()
    assert adapter.groups(layer) == inputs and adapter.mlps_of(layer) == list(own)
    layer.experts = SeparateExperts(Fused(), experts.linears)
    assert adapter.groups(layer) == {
        "a": ("q",),
        "mlp_in": ("up",),
        "e.0": ("experts.0.g", "experts.0.u"),
        "e.1": ("experts.1.g", "experts.1.u"),
        "router": ("gate",),
    }
    assert adapter.mlps_of(layer) == [
        Mlp(("shared.u",), "shared.d"),
        *(Mlp((f"experts.{e}.g", f"experts.{e}.u"), f"experts.{e}.d", fused=2) for e in range(2)),
    ]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("coded", [None, "int6", "int8", "int4"])
@pytest.mark.parametrize("form", [None, "pivoted", "svd"])
def test_a_narrow_linear_is_rebuilt_from_its_entries(kind, form, coded):
    """Fewer inputs and outputs, in one piece or factored, with or without codes; a bias of the new size."""
    torch.manual_seed(0)
    original = nn.Linear(200, 96) if kind == "linear" else Conv1D(96, 200)
    weight = torch.randn(80, 20).double() @ torch.randn(20, 144).double()
    entries = {"weight": weight.float()}
    if form:
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        entries = factor_tensors((u * sigma)[:, :70], vh[:70], form, torch.float32)
    if coded == "int6":
        entries = int6_entries(entries, torch.eye(144))
    elif coded:
        entries = integer_entries(entries, torch.eye(144), coded)
    expected, x = dense_weight(entries, 144).float(), torch.randn(3, 144)
    state = entries | {"bias": torch.randn(80)}
    if kind == "conv1d" and "weight" in state:
        state["weight"] = state["weight"].T
    model = nn.Sequential(original).to(torch.float32)
    table = modules_of("0", entries, (96, 200), (80, 144))
    assert table["0"].items() >= {"out": 80, "in": 144}.items()
    swap_linears(model, table)
    model.load_state_dict({f"0.{name}": tensor.contiguous() for name, tensor in state.items()})
    torch.testing.assert_close(model(x), x @ expected.T + state["bias"], rtol=1e-4, atol=1e-3)
    assert modules_of("0", {"weight": torch.zeros(96, 200)}, (96, 200), (96, 200)) == {}


@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_in_16_bits_permute_rows_of_the_weight(bias, monkeypatch):
    torch.manual_seed(0)
    entries = factor_tensors(torch.randn(24, 5).double(), torch.randn(5, 16).double(), "pivoted", torch.bfloat16)
    module = PivotedLinear(16, 24, 5, bias).bfloat16()
    module.load_state_dict(entries | ({"bias": torch.randn(24)} if bias else {}))
    x = torch.randn(2, 64, 16).bfloat16()
    called = []
    module.coefficients.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        many = module(x)
        assert not called
        parts = torch.cat([module(part) for part in x.split(1)])
        assert len(called) == 2
        torch.testing.assert_close(many, parts, rtol=0.02, atol=0.02 * many.abs().max().item())
        module.float()(x.float())
        assert len(called) == 3
    module.bfloat16()(x).sum().backward()
    assert module.coefficients.weight.grad.abs().sum() > 0
