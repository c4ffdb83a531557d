"""Damaged and hostile files: one sentence that names the file; no traceback, no hang, nothing of an absurd size."""

import json
import pickle

import pytest
import torch
from conftest import expect_sentence, run, short_text
from hostile_files import CACHE, TINY, Q, calibrate, compress, edit_json, expect_refusal, plan_only, replace_by
from safetensors.torch import load_file, save_file

import hisvd
from hisvd.calibration_cache import read_cache
from hisvd.schema import MOST
from hisvd.utils.data_utils import load_text

KINDS = ("pipe", "folder", "device", "loop")
INDICES = {
    "not JSON": "{",
    "deep": "[" * 100_000,
    "list": [1],
    "no map": {},
    "map is a list": {"weight_map": ["model.safetensors"]},
    "map is null": {"weight_map": None},
    "empty map": {"weight_map": {}},
    "numbers": {"weight_map": {"model.norm.weight": 1}},
    "nested": {"weight_map": {"model.norm.weight": ["a.safetensors"]}},
    "absolute": {"weight_map": {"model.norm.weight": "/tmp/a.safetensors"}},
    "outside": {"weight_map": {"model.norm.weight": "../moved.safetensors"}},
    "device": {"weight_map": {"model.norm.weight": "/dev/zero"}},
    "pickle": {"weight_map": {"model.norm.weight": "pytorch_model.bin"}},
    "NUL": {"weight_map": {"model.norm.weight": "a\0.safetensors"}},
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_index(files, index):
    (files / "model" / "model.safetensors").rename(files / "moved.safetensors")
    if isinstance(index, dict):
        index = index | {"metadata": {}}
    text = index if isinstance(index, str) else json.dumps(index)
    (files / "model" / "model.safetensors.index.json").write_text(text)
    expect_refusal(files / "model", "model.safetensors.index.json")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_in_place_of_one(files, kind):
    model, cache = files / "model", files / CACHE
    names = load_file(model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    replace_by(kind, model / "model.safetensors")
    expect_refusal(model)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    replace_by(kind, model / "a.safetensors")
    if kind != "folder":
        (model / "model.safetensors").unlink()
    else:
        (model / "model.safetensors").rmdir()
    expect_refusal(model, "a.safetensors")
    replace_by(kind, model / "config.json")
    expect_refusal(model, "config.json")
    replace_by(kind, cache / "layer_001.safetensors")
    expect_sentence(plan_only(files), "layer_001.safetensors")
    replace_by(kind, cache / "tokens.safetensors")
    with pytest.raises(hisvd.HiSVDError, match=r"tokens\.safetensors"):
        read_cache(cache).read_tokens()
    replace_by(kind, cache / "manifest.json")
    expect_sentence(plan_only(files), str(cache), "manifest.json")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_in_place_of_a_side_file(files, kind):
    """transformers passes over it, and so a model would lose its settings in silence."""
    replace_by(kind, files / "model" / "tokenizer_config.json")
    options = ["--model_path", files / "model", "--datasets", short_text()]
    for result in (calibrate(files, "--model_name", "new"), compress(files, "new"), run("evaluate", *options)):
        expect_sentence(result, str(files / "model" / "tokenizer_config.json"))


def test_a_generation_config_that_is_no_object_is_named(files):
    for text in ("{", "[1]", "[" * 100_000):
        (files / "model" / "generation_config.json").write_text(text)
        with pytest.raises(hisvd.HiSVDError, match=r"generation_config\.json"):
            hisvd.load(files / "model")


def test_an_adapter_beside_the_weights_is_refused(files):
    """from_pretrained would add it where peft is installed, and streaming would not."""
    (files / "model" / "adapter_config.json").write_text("{}")
    expect_refusal(files / "model", "adapter_config.json")


CONFIGS = [
    *(("num_hidden_layers", value) for value in (0, -1, 10**6, "2", 2.5, None, True)),
    *(("hidden_size", value) for value in (0, -1, 10**9, "64", 65, None, [32])),
    *(("num_attention_heads", value) for value in (0, -1, 3, 10**9)),
    *(("num_key_value_heads", value) for value in (0, -2, 3, 10**9)),
    *(("vocab_size", value) for value in (0, -1, 200, 10**12, MOST + 1, "300")),
    *(("intermediate_size", value) for value in (0, -1, 65, 10**9)),
    *(("head_dim", value) for value in (0, 10**9)),
    *(("hidden_act", value) for value in ("nope", 3)),
    ("rope_parameters", [1]),
    ("rope_parameters", {"rope_type": "nope", "rope_theta": 1.0}),
    ("model_type", [1]),
    ("quantization_config", [1]),
    ("quantization_config", "hisvd"),
    ("quantization_config", {"quant_method": ["hisvd"]}),
]


@pytest.mark.parametrize(("key", "value"), CONFIGS)
def test_entries_of_config_json(files, key, value):
    edit_json(files / "model" / "config.json", lambda config: config.update({key: value}))
    expect_refusal(files / "model", "config.json")


@pytest.mark.parametrize(
    "text", ["[1]", "null", "{" * 50_000, '{"a":' * 50_000], ids=["list", "null", "braces", "deep"]
)
def test_a_config_json_of_another_form(files, text):
    (files / "model" / "config.json").write_text(text)
    expect_refusal(files / "model", "config.json")


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**6), ("hidden_size", 10**9), ("vocab_size", 0)])
def test_a_dry_run_reads_the_same_configuration(files, key, value):
    edit_json(files / "model" / "config.json", lambda config: config.update({key: value}))
    expect_sentence(calibrate(files, "--dry_run"), str(files / "model"), "config.json")


def test_a_vocabulary_smaller_than_the_tokenizers(files):
    tensors = load_file(files / "model" / "model.safetensors")
    short = {name: t[:200].clone() for name, t in tensors.items() if len(t) == 300}
    assert short
    save_file(tensors | short, files / "model" / "model.safetensors", metadata={"format": "pt"})
    edit_json(files / "model" / "config.json", lambda config: config.update(vocab_size=200))
    expect_sentence(calibrate(files, "--model_name", "short"), str(files / "model"), "vocab_size 200")
    options = ["--model_path", files / "model", "--datasets", short_text()]
    expect_sentence(run("evaluate", *options), str(files / "model"), "vocab_size 200")


ENTRIES = [
    *({"rank": value} for value in ("3", 2.5, 0, -1, 10**9, None, True, [3])),
    *({side: value} for side in ("in", "out") for value in ("3", 0, -1, 33, 10**9, 2.5)),
    *({"form": value} for value in ("nope", 3, None, ["svd"])),
]


@pytest.mark.parametrize("change", ENTRIES, ids=str)
def test_entries_of_the_table_of_modules(files, change):
    edit_json(files / "out" / "config.json", lambda c: c["quantization_config"]["modules"][Q].update(change))
    expect_refusal(files / "out", "config.json", Q)


NAMES = ["model.norm", "model.embed_tokens", "lm_head", "forward", "__class__", "", "model.layers", "model.layers.0"]
INNER = ["input_layernorm", "forward", "mlp.act_fn", "mlp.up_proj.weight", "self_attn.config", "mlp.nothing"]


@pytest.mark.parametrize("name", [*NAMES, *(f"model.layers.0.{name}" for name in INNER), "x" * 10_000, "a.b"])
def test_names_that_are_no_linears(files, name):
    entry = {"form": "pivoted", "rank": 3}
    edit_json(files / "out" / "config.json", lambda c: c["quantization_config"]["modules"].update({name: entry}))
    expect_refusal(files / "out", "config.json", name[:50])


@pytest.mark.parametrize("value", [[1], "x", 3, {}, {"form": "pivoted"}])
def test_entries_of_another_form(files, value):
    edit_json(files / "out" / "config.json", lambda c: c["quantization_config"]["modules"].update({Q: value}))
    expect_refusal(files / "out", "config.json", Q)


@pytest.mark.parametrize("value", [[1], "x", None, 3])
def test_a_table_of_another_form(files, value):
    edit_json(files / "out" / "config.json", lambda c: c["quantization_config"].update(modules=value))
    expect_refusal(files / "out", "config.json", "modules")


@pytest.mark.parametrize("version", [99, "3", 0, None])
def test_versions_of_the_format(files, version):
    edit_json(files / "out" / "config.json", lambda c: c["quantization_config"].update(format_version=version))
    expect_refusal(files / "out", "config.json")


@pytest.mark.parametrize("report", ["[1]", "{", "{}", '{"linear_numbers_before": 0}', '{"linear_numbers_before": "x"}'])
def test_hisvd_json(files, report):
    (files / "out" / "hisvd.json").write_text(report)
    content = torch.load(files / "out.pt", weights_only=True)
    torch.save(content | {"file:hisvd.json": report}, files / "out.pt")
    for name in ("out", "out.pt"):
        result = run("evaluate", "--model_path", files / name, "--datasets", short_text(), "--nsamples", 1)
        expect_sentence(result, str(files / name), "hisvd.json")


PT_CHANGES = {
    "integer key": {3: torch.ones(2)},
    "text as a weight": {"model.norm.weight": "x"},
    "number as a side file": {"file:tokenizer.json": 3},
    "side file outside": {"file:..": "x"},
    "side file elsewhere": {"file:/tmp/x": "x"},
    "config is a tensor": {"file:config.json": torch.ones(2, dtype=torch.uint8)},
    "config is a list": {"file:config.json": "[1]"},
    "config is deep": {"file:config.json": "[" * 100_000},
    "config of zero layers": {"file:config.json": json.dumps({"model_type": "llama", **TINY, "num_hidden_layers": 0})},
    "config of a huge model": {"file:config.json": json.dumps({"model_type": "llama", **TINY, "vocab_size": 10**9})},
    "generation config is a list": {"file:generation_config.json": "[1]"},
}


@pytest.mark.parametrize("change", PT_CHANGES.values(), ids=PT_CHANGES)
def test_pt_files(files, change):
    content = torch.load(files / "out.pt", weights_only=True)
    torch.save(content | change, files / "out.pt")
    result = run("evaluate", "--model_path", files / "out.pt", "--datasets", short_text(), "--nsamples", 1)
    expect_sentence(result, str(files / "out.pt"))


@pytest.mark.parametrize("lost", ["config.json", "tokenizer"])
def test_pt_file_without_a_side_file(files, lost):
    content = torch.load(files / "out.pt", weights_only=True)
    torch.save({key: value for key, value in content.items() if lost not in key}, files / "out.pt")
    result = run("evaluate", "--model_path", files / "out.pt", "--datasets", short_text(), "--nsamples", 1)
    expect_sentence(result, str(files / "out.pt"), lost)


MANIFESTS = [
    *(("format_version", value) for value in (99, "3", None, [3])),
    *(("num_layers", value) for value in (0, -1, 1, 10**9, "2", None)),
    *(("layers", value) for value in (None, {}, "x", [1, 2], [{}, {}])),
    *(("gradients", value) for value in (None, {}, [1, 2])),
    *(("identity", value) for value in (None, [], {})),
    *(("options", value) for value in (None, [1])),
    *(("layers.0.file", value) for value in (3, "../layer_000.safetensors", "/dev/zero", None)),
    *(("layers.0.sha256", value) for value in (3, None)),
    *(("layers.0.small_tensors_sha256", value) for value in (3, {"a": 1}, {})),
    *(("layers.0.sublayers", value) for value in (None, [], [3], [{}])),
    *(("layers.0.mlps", value) for value in (3, [3], [{}], [{"inputs": ["mlp.no"], "output": "mlp.no", "fused": 1}])),
    *(("layers.0.sublayers.0.out_features", value) for value in (-1, 0, 64, 10**9, "32", 2.5)),
    *(("layers.0.sublayers.0.in_features", value) for value in (-1, 0, 64, 10**9, "32", 2.5)),
    *(("layers.0.sublayers.0.layer", value) for value in (1, -1, "0")),
    *(("layers.0.sublayers.0.type", value) for value in (3, "nothing", "self_attn.k_proj")),
    ("layers.0.sublayers.0.input_group", "nothing"),
    *(("identity.nsamples", value) for value in (0, "2")),
    *(("identity.grad_nsamples", value) for value in ("2", -1)),
    *(("identity.dtype", value) for value in (3, "torch.load", "torch.int32")),
    ("identity.model", None),
]


@pytest.mark.parametrize(("key", "value"), MANIFESTS)
def test_manifest_json(files, key, value):
    def change(manifest):
        *path, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        for part in path:
            manifest = manifest[part]
        manifest[last] = value

    edit_json(files / CACHE / "manifest.json", change)
    expect_sentence(plan_only(files), str(files / CACHE))


def test_shapes_in_the_manifest_are_those_of_the_model(files):
    """Without gradients nothing in the cache says how many outputs a linear has."""
    assert calibrate(files, "--model_name", "plain", "--no_gradients").code == 0
    cache = files / CACHE.replace("tiny", "plain")
    edit_json(cache / "manifest.json", lambda m: m["layers"][0]["sublayers"][0].update(out_features=10**9))
    where = ["--model_path", files / "model", "--calib_cache", cache, "--save_model", files / "new"]
    expect_sentence(run("compress", *where, "--target_compression", "0.6"), str(cache), Q)


TEXTS = {
    "NUL bytes": (b"\0" * 5000, ".txt"),
    "UTF-16": ("abc " * 900, ".txt"),
    "half a surrogate pair": (b'{"text": "abc \\ud800"}\n', ".jsonl"),
    "list": (b"[1]\n", ".jsonl"),
    "deep": (b"[" * 100_000, ".jsonl"),
    "long number": (b'{"text": ' + b"1" * 5000 + b"}", ".jsonl"),
}


@pytest.mark.parametrize(("content", "ending"), TEXTS.values(), ids=TEXTS)
def test_texts(tmp_path, content, ending):
    file = tmp_path / f"text{ending}"
    file.write_bytes(content.encode("utf-16-le") if isinstance(content, str) else content)
    with pytest.raises(hisvd.HiSVDError, match=str(file)):
        load_text(str(file), {})


@pytest.mark.parametrize("name", ["", "a\udcff", "a\0b"])
def test_names_that_no_file_has(files, name):
    expect_sentence(calibrate(files, "--dataset", name), "neither a file, a folder, nor")
    for program, options in (("calibrate", ["--model_name", "x"]), ("evaluate", [])):
        expect_sentence(run(program, "--model_path", name, *options))


@pytest.mark.parametrize("entry", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_neither_run_nor_offered(files, monkeypatch, entry):
    """transformers would ask on standard input, and take a `y` that waits there for an answer."""
    asked, marker = [], files / "run"
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    (files / "model" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    if entry == "config.json":
        changes = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    else:
        changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit_json(files / "model" / entry, lambda content: content.update(changes))
    options = ["--model_path", files / "model", "--datasets", short_text(), "--nsamples", 1]
    for result in (calibrate(files, "--model_name", "code"), run("evaluate", *options)):
        expect_sentence(result, str(files / "model"))
    assert not asked and not marker.exists()


class Evil:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


PICKLED = ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "out/hisvd.json", "out.pt"]
PICKLED += [f"{CACHE}/{name}" for name in ("manifest.json", "layer_000.safetensors", "gradients_001.safetensors")]


def test_pickles_under_any_name_are_not_executed(files):
    evil = Evil(files / "run")
    options = ["--datasets", short_text(), "--nsamples", 1]
    for name in (*PICKLED, "text.txt", "text.jsonl", "cache.pkl"):
        path, folder = files / name, name.partition("/")[0]
        before = path.read_bytes() if path.exists() else b""
        for save in (lambda path: path.write_bytes(pickle.dumps(evil)), lambda path: torch.save(evil, path)):
            save(path)
            if folder == CACHE:
                result = compress(files, "new")
            elif folder.startswith("text"):
                result = run("evaluate", "--model_path", files / "model", "--datasets", path)
            elif folder == "cache.pkl":
                result = run("compress", "--calib_cache", path, "--target_compression", "0.7", "--plan_only")
            else:
                result = run("evaluate", "--model_path", files / folder, *options)
            expect_sentence(result, str(files / folder))
        path.write_bytes(before)
    assert not evil.marker.exists()


@pytest.mark.parametrize("content", ["weights", "evil"])
def test_pickled_weights_beside_safetensors_of_another_name_are_not_read(files, content):
    tensors = load_file(files / "model" / "model.safetensors")
    (files / "model" / "model.safetensors").rename(files / "model" / "extra.safetensors")
    torch.save(tensors if content == "weights" else Evil(files / "run"), files / "model" / "pytorch_model.bin")
    expect_refusal(files / "model", "no model.safetensors")
    assert not (files / "run").exists()


@pytest.mark.parametrize("options", [[], ["--offload_folder", "offload"]])
def test_a_perplexity_that_is_no_number_names_the_model_and_the_text(files, options, monkeypatch):
    monkeypatch.chdir(files)
    tensors = load_file(files / "model" / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, files / "model" / "model.safetensors", metadata={"format": "pt"})
    where = ["--model_path", files / "model", "--datasets", short_text(), "--nsamples", 1]
    expect_sentence(run("evaluate", *where, *options), str(files / "model"), short_text())


def test_links_out_of_the_model_folder_are_not_followed_into_the_result(files, tmp_path):
    """Links of a Hub snapshot lead to the blobs beside it, which are part of the model."""
    snapshot, blobs = tmp_path / "models--org--tiny" / "snapshots" / "abc", tmp_path / "models--org--tiny" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    (files / "model").rename(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (files / "model").symlink_to(snapshot)
    (snapshot / "tokenizer.same.json").symlink_to("tokenizer.json")
    assert compress(files, "linked").code == 0
    for name in ("tokenizer.json", "tokenizer.same.json"):
        assert (files / "linked" / name).read_bytes() == (files / "out" / "tokenizer.json").read_bytes()
        assert not (files / "linked" / name).is_symlink()
    (tmp_path / "id_rsa").write_text("secret")
    (snapshot / "tokenizer.model").symlink_to(tmp_path / "id_rsa")
    expect_sentence(compress(files, "refused"), "tokenizer.model", str(tmp_path / "id_rsa"), "outside")
    assert not list(files.glob("*refused*"))
