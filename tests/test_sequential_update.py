"""--update sequential, the default: its target against least squares, what a layer's linears receive, the program."""

import json

import pytest
import torch
from conftest import IDS, linear_parameters, run, saved_tensors
from transformers import AutoModelForCausalLM

import hisvd
from hisvd.calibration_cache import read_cache
from hisvd.sequential_update import UpdateMoments, input_and_stream, update_target
from hisvd.utils.load_utils import load
from hisvd.whitening_svd import cholesky_root


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_full_update_is_the_least_squares_fit_to_the_original_outputs(gamma):
    """With μ = 1, T x' is the best fit to W x over the samples; with γ = 1 as well, to W x + e."""
    generator = torch.Generator().manual_seed(0)
    weight, x, noise, e = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 8), (8, 200), (8, 200), (5, 200))
    )
    x_c = x + 0.3 * noise
    moments = UpdateMoments(x_c @ x_c.T / 200, (x - x_c) @ x_c.T / 200, e @ x_c.T / 200)
    target = update_target(weight, cholesky_root(moments.own, 0.0), moments, 1.0, gamma)
    expected = torch.linalg.lstsq(x_c.T, (weight @ x + gamma * e).T).solution.T
    torch.testing.assert_close(target, expected)


def test_nothing_changes_where_the_inputs_are_the_original_ones():
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    moments = UpdateMoments(torch.eye(8).double(), torch.zeros(8, 8).double(), torch.zeros(5, 8).double())
    own = cholesky_root(moments.own, 1e-3)
    assert torch.equal(update_target(weight, own, moments, 0.75, 0.5), weight)


def test_probe_sees_what_the_whole_layer_sees(model_folders):
    model = load(model_folders["llama"])
    calls, inputs = [], {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for path in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        linear = layer.get_submodule(path)
        linear.register_forward_pre_hook(lambda _, args, path=path: inputs.__setitem__(path, args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: inputs.__setitem__("middle", args[0]))
    with torch.no_grad():
        model(IDS, use_cache=False)
        (((hidden, *args), kwargs),) = calls
        arguments, writers = (tuple(args), kwargs), ("self_attn.o_proj", "mlp.down_proj")
        for path, expected in [(p, x) for p, x in inputs.items() if p != "middle"]:
            x, stream = input_and_stream(layer, path, writers, hidden, arguments)
            assert torch.equal(x, expected.flatten(0, 1))
            middle = inputs["middle"] if path.startswith("mlp") else hidden
            torch.testing.assert_close(stream, middle.flatten(0, 1))


def outputs_on_calibration_tokens(path, tokens):
    with torch.no_grad():
        return hisvd.load(path).model(tokens).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_update_keeps_the_budget_and_brings_the_outputs_nearer(chain, model_folders, caches, family):
    options = ("--whitening", "input", "--allocation", "uniform")
    plain = chain(family, "0.8,0.5", "plain", *options, "--update", "none")
    updated = chain(family, "0.8,0.5", "updated", *options)
    tokens = read_cache(caches[family]).read_tokens()
    wanted = outputs_on_calibration_tokens(model_folders[family], tokens)
    before = linear_parameters(saved_tensors(model_folders[family]))
    for target in ("80p", "50p"):
        folder = updated.with_name(f"updated_{target}")
        report = json.loads((folder / "hisvd.json").read_text())
        assert (
            linear_parameters(saved_tensors(folder))
            == report["linear_numbers_after"]
            <= before * report["target_compression"]
        )
        assert not list(folder.glob("*.bin"))
        error = {
            name: (outputs_on_calibration_tokens(path, tokens) - wanted).norm()
            for name, path in (("plain", plain.with_name(f"plain_{target}")), ("updated", folder))
        }
        assert error["updated"] < error["plain"], error


def test_several_targets_at_once_give_the_same_files_as_one_by_one(chain):
    both = chain("llama", "0.8,0.5", "both")
    for target, name in (("0.8", "both_80p"), ("0.5", "both_50p")):
        one = saved_tensors(chain("llama", target, f"one_{name}"))
        together = saved_tensors(both.with_name(name))
        assert one.keys() == together.keys() and all(torch.equal(one[k], together[k]) for k in one)


def test_target_one_is_the_original(chain, model_folders):
    original = AutoModelForCausalLM.from_pretrained(model_folders["llama"]).eval()
    with torch.no_grad():
        compressed = hisvd.load(chain("llama", "1.0", "out"))
        assert torch.equal(compressed(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("lose_streams", [False, True])
def test_interrupted_update_resumes_to_the_same_bits(chain, model_folders, caches, tmp_path, monkeypatch, lose_streams):
    from hisvd.utils.save_utils import ModelWriter

    names = ("out_80p", "out_50p")
    whole = chain("llama", "0.8,0.5", "whole")
    real_write, written = ModelWriter.write_shard, []

    def write_some(self, index, tensors):
        if index == 2 and self.output.name == names[1]:  # the first target has its shard already
            raise KeyboardInterrupt
        written.append(index)
        real_write(self, index, tensors)

    arguments = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"]]
    arguments += ["--target_compression", "0.8,0.5", "--save_model", tmp_path / "out"]
    monkeypatch.setattr(ModelWriter, "write_shard", write_some)
    assert run("compress", *arguments).code == 130
    assert written == [0, 0, 1, 1, 2]
    if lose_streams:
        for file in tmp_path.glob("out*.partial/work/*.bin"):
            file.unlink()
    monkeypatch.setattr(ModelWriter, "write_shard", real_write)
    assert run("compress", *arguments).code == 0
    for name in names:
        expected, resumed = saved_tensors(whole.with_name(name.replace("out", "whole"))), saved_tensors(tmp_path / name)
        assert expected.keys() == resumed.keys() and all(torch.equal(expected[k], resumed[k]) for k in expected)
