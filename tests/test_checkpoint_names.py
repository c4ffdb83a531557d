"""Published checkpoints whose tensors have other names than the model's: read, and saved under the same names."""

import json
import re

import pytest
import torch
from conftest import HEADS, IDS, SHARED, build_model, calibrate_arguments, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, GPTNeoXConfig, MixtralConfig

import hisvd
from hisvd.utils.model_utils import open_checkpoint

TINY = {**SHARED, "num_hidden_layers": 2, "initializer_range": 0.1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,  # as many as the decoder has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**TINY, num_attention_heads=4, max_position_embeddings=64),
    "gemma3": Gemma3Config(
        text_config={**TINY, **HEADS, "head_dim": 24, "sliding_window": 8, "rope_parameters": None},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=297,
        eoi_token_index=298,
        image_token_index=299,
    ),
    "mixtral": MixtralConfig(**TINY, **HEADS, num_local_experts=4, num_experts_per_tok=2),
}
# (part of the model's names, what published names have instead)
PUBLISHED = {
    "gpt_neox": [(r"^lm_head\.", "embed_out.")],
    "gemma3": [
        (r"^(model\.)?language_model\.(model\.)?", "language_model.model."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    ],
    "mixtral": [(r"\.mlp\.", ".block_sparse_moe.")],
}
SIGNS = {
    "gpt_neox": "embed_out.weight",
    "gemma3": "language_model.model.",
    "mixtral": ".block_sparse_moe.experts.3.w1.",
}


@pytest.fixture(scope="module", params=CONFIGS)
def published(request, tokenizer, tmp_path_factory):
    """(family, folder with published names)."""
    folder = build_model(CONFIGS[request.param], tmp_path_factory.mktemp("published") / "model", tokenizer)
    tensors = load_file(folder / "model.safetensors")
    for pattern, replacement in PUBLISHED[request.param]:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(SIGNS[request.param] in name for name in tensors)
    return request.param, folder


@pytest.fixture(scope="module")
def compressed(published, tmp_path_factory):
    """(folder with published names, folder compressed to 0.6)."""
    root, (_, folder) = tmp_path_factory.mktemp("compressed"), published
    result = run("calibrate", *calibrate_arguments(folder, root))
    assert result.code == 0, result
    where = ["--model_path", folder, "--calib_cache", root / "tiny_n6_s32_with_hessian", "--save_model", root / "out"]
    result = run("compress", *where, "--target_compression", "0.6")
    assert result.code == 0, result
    return folder, root / "out"


def test_every_tensor_has_its_name_in_the_model(published):
    _, folder = published
    checkpoint = open_checkpoint(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = {name for name in model.state_dict() if ".experts." not in name} - set(model.all_tied_weights_keys)
    assert own <= checkpoint.stored_names.keys()
    assert sorted(checkpoint.stored_names.values()) == sorted(checkpoint.files)


def test_compressed_model_keeps_the_names_and_loads(published, compressed):
    (family, _), (folder, out) = published, compressed
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert any(SIGNS[family] in name for name in names)
    with torch.no_grad():
        whole, small = hisvd.load(folder)(IDS).logits, hisvd.load(out)(IDS).logits
        stock = AutoModelForCausalLM.from_pretrained(out)(IDS).logits
    assert torch.equal(small, stock)
    assert 1e-4 < (small - whole).norm() / whole.norm() < 1  # unrelated logits: 1.4


def test_perplexity_layer_by_layer_is_that_of_the_whole_model(compressed, tmp_path):
    settings = hisvd.EvaluationSettings(seqlen=32, nsamples=2)
    by_layer = hisvd.EvaluationSettings(seqlen=32, nsamples=2, offload_folder=tmp_path)
    for folder in compressed:
        whole, streamed = (hisvd.evaluate(folder, ["python-docs"], s)["perplexity"] for s in (settings, by_layer))
        assert streamed["python-docs"]["nll"] == pytest.approx(whole["python-docs"]["nll"], rel=1e-5)


def test_a_stock_checkpoint_with_vision_has_a_narrower_decoder(published, compressed, tmp_path):
    (family, folder), (_, out) = published, compressed
    if family != "gemma3":
        pytest.skip("its decoder is all there is")
    where = ["--model_path", folder, "--calib_cache", out.parent / "tiny_n6_s32_with_hessian"]
    options = ["--target_compression", "0.7", "--export", "plain", "--width_multiple", 8]
    result = run("compress", *where, *options, "--save_model", tmp_path / "out")
    assert result.code == 0, result
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    width = after["text_config"].pop("intermediate_size")
    assert width % 8 == 0 and width < before["text_config"].pop("intermediate_size") and before == after
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, hisvd.load(tmp_path / "out")(IDS).logits)
