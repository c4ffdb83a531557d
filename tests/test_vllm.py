"""Compressed models in vLLM give transformers' tokens: scripts/test_vllm.sh, elsewhere these tests are skipped."""

import gc
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import HEADS, ROOT, SHARED, build_model, calibrate_arguments, run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config

import hisvd
from hisvd.integer_codes import INTEGERS

vllm = pytest.importorskip("vllm")
plugin = pytest.importorskip("hisvd.vllm_plugin")

TINY = SHARED | HEADS | {"head_dim": 32, "initializer_range": 0.1, "num_hidden_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**TINY, sliding_window=16),
    "qwen2": Qwen2Config(**TINY | {"num_attention_heads": 2, "num_key_value_heads": 1}),  # vLLM ignores its head_dim
    "qwen3": Qwen3Config(**TINY),
}
NEW_TOKENS = 16
SMOLLM2 = ROOT / "models" / "smollm2-135m"
FORMS = {"pivoted": [], "svd": ["--factors", "svd"], "neurons": ["--moves", "neurons"], "plain": ["--export", "plain"]}


@pytest.fixture(autouse=True)
def no_group_left():
    """An engine that was refused leaves vLLM's process group behind, which the programs' end would destroy."""
    yield
    vllm.distributed.cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def compressed(tokenizer, tmp_path_factory):
    """compressed(family, target, *options) → the folder of a tiny model; calibration is done once per family."""
    models = {}

    def call(family, target, *options):
        if family not in models:
            root = tmp_path_factory.mktemp("model")
            model = build_model(CONFIGS[family], root / "model", tokenizer)
            assert run("calibrate", *calibrate_arguments(model, root)).code == 0
            models[family] = model, root / "tiny_n6_s32_with_hessian"
        model, cache = models[family]
        out = tmp_path_factory.mktemp("out") / "out"
        where = ["--model_path", model, "--calib_cache", cache, "--save_model", out, "--update", "none"]
        result = run("compress", *where, "--target_compression", target, "--width_multiple", 8, *options)
        assert result.code == 0, result
        return out

    return call


def prompts_of(vocabulary):
    """20 prompts of 4 to 23 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (4 + i,), generator=generator).tolist() for i in range(20)]


def tokens_of_transformers(folder, prompts):
    model = hisvd.load(folder, torch.float32)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return [model.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in prompts]


def tokens_of_vllm(folder, prompts, **options):
    engine = start_engine(folder, **options)
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    del engine
    gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("second_product", [0, 10**6])
def test_bfloat16_runs(second_product, compressed, monkeypatch):
    """vLLM makes bfloat16 the default dtype while it loads."""
    monkeypatch.setattr(plugin, "SECOND_PRODUCT", second_product)
    folder, prompts = compressed("llama", "0.7"), prompts_of(300)
    tokens = tokens_of_vllm(folder, prompts, dtype="bfloat16")
    equal = torch.tensor(tokens) == torch.tensor(tokens_of_transformers(folder, prompts))
    assert equal.float().mean() > 0.5  # rounding changes some tokens, and what follows them


def start_engine(folder, **options):
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 16}
    return vllm.LLM(str(folder), **settings | options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_those_of_transformers(family, form, compressed, monkeypatch):
    for name in ("SECOND_PRODUCT", "GATHER"):  # otherwise no tiny factor would be left
        monkeypatch.setattr(plugin, name, 0)
    folder = compressed(family, "0.7", *FORMS[form])
    entries = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("modules", {})
    forms = {entry["form"] for entry in entries.values()}
    assert form in forms or (form, forms) in [("neurons", {"narrow"}), ("plain", set())]
    prompts = prompts_of(300)
    assert tokens_of_vllm(folder, prompts) == tokens_of_transformers(folder, prompts)


@pytest.mark.parametrize("form", ["pivoted", "svd"])
@pytest.mark.parametrize("second_product", [0, 10**6])
def test_factors_are_multiplied_back_where_that_is_faster(form, second_product, compressed, monkeypatch):
    """Here to two factors without a gather, or to a dense matrix."""
    monkeypatch.setattr(plugin, "SECOND_PRODUCT", second_product)
    folder = compressed("llama", "0.7", "--factors", form)
    prompts = prompts_of(300)
    assert tokens_of_vllm(folder, prompts) == tokens_of_transformers(folder, prompts)


def test_a_missing_part_is_named(compressed):
    folder = compressed("llama", "0.7", "--moves", "low_rank")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        name = next(k for k in tensors if "layers.0.mlp.up_proj" in k)
        save_file({k: t for k, t in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=r"hisvd: the checkpoint lacks .* of model\.layers\.0\.mlp\.gate_up_proj"):
        start_engine(folder)


def test_int6_is_refused(compressed):
    folder = compressed("llama", "0.95", "--export", "int6", "--quality_gate_delta", "none")
    with pytest.raises(ValueError, match=r"hisvd: .*INT6.*--export int6"):
        start_engine(folder)


@pytest.mark.parametrize("form", INTEGERS)
def test_integers_are_refused(form):
    table = {"model.layers.0.self_attn.q_proj": {"form": "pivoted", "rank": 3}}
    table |= {f"{name}.base": {"form": form} for name in table}
    with pytest.raises(ValueError, match=rf"hisvd: .*{form}.*--linear_dtype"):
        plugin.HiSVDConfig.from_config({"modules": table})


def test_mixtures_of_experts_are_refused(compressed, monkeypatch):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(CONFIGS, "mixtral", MixtralConfig(**TINY, **experts))
    with pytest.raises(ValueError, match=r"hisvd: .*'mixtral'.*--export dense or plain"):
        start_engine(compressed("mixtral", "0.7"))


def test_tensor_parallel_is_refused(monkeypatch):
    monkeypatch.setattr(plugin, "get_tensor_model_parallel_world_size", lambda: 2)
    linear = plugin.LinearBase.__new__(plugin.LinearBase)
    with pytest.raises(ValueError, match=r"hisvd: .*--tensor-parallel-size 1"):
        plugin.HiSVDConfig({}).get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 at 0.6 with both moves; HISVD_SMOLLM2 names a folder that exists already."""
    if "HISVD_SMOLLM2" in os.environ:
        return os.environ["HISVD_SMOLLM2"]
    root = tmp_path_factory.mktemp("smollm2")
    settings = hisvd.CalibrationSettings(nsamples=4, seqlen=128, grad_nsamples=2, dataset="python-docs")
    cache = hisvd.calibrate(SMOLLM2, root / "cache", settings)
    (result,) = hisvd.compress(SMOLLM2, cache, root / "out", 0.6, hisvd.CompressionSettings(update="none"))
    return result.path


def test_tokens_of_smollm2(smollm2):
    text = (ROOT / "README.md").read_text()
    tokens = AutoTokenizer.from_pretrained(SMOLLM2)(text)["input_ids"]
    prompts = [tokens[100 * i : 100 * i + 12 + i] for i in range(20)]
    assert tokens_of_vllm(smollm2, prompts) == tokens_of_transformers(smollm2, prompts)


def test_vllm_serve_answers_an_openai_client(compressed, tmp_path):
    folder, port = compressed("llama", "0.7"), 8123
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        folder,
        "--port",
        port,
        "--host",
        "127.0.0.1",
    ]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", 128, "--served-model-name", "tiny"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*map(str, command + options)], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        prompts = prompts_of(300)[:4]
        question = {"model": "tiny", "prompt": prompts, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(question | {"return_token_ids": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            choices = json.load(reply)["choices"]
        assert [choice["token_ids"] for choice in choices] == tokens_of_transformers(folder, prompts)
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url, server, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])
