"""A folder of --export plain as a GGUF file: what any converter does to a Llama model, by the gguf package."""

import pytest
import torch
from conftest import logits_of, saved_tensors
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

gguf = pytest.importorskip("gguf")


def permuted(weight, heads):
    """q or k, whose heads are two halves that rotate together, with these rows in pairs, as llama.cpp has them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder, file):
    """What llama.cpp's converter writes of a Llama folder, without the tokenizer."""
    config = AutoConfig.from_pretrained(folder)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in saved_tensors(folder).items():
        path = name.removesuffix(".weight")
        if (linear := path.rpartition(".")[2]) in heads:
            tensor = permuted(tensor, heads[linear])
        writer.add_tensor(f"{names.get_name(path)}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_stock_checkpoint_becomes_a_gguf_with_the_same_logits(chain, tmp_path):
    folder = chain("llama", "0.6", "plain", "--export", "plain", "--width_multiple", 8, "--update", "none")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    width = plain.config.intermediate_size
    assert width < 160 and width % 8 == 0
    write_gguf(folder, tmp_path / "plain.gguf")

    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    assert reader.get_field("llama.feed_forward_length").contents() == width
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert len(shapes) == len(saved_tensors(folder)) and not any("None" in name for name in shapes)
    assert shapes["blk.3.ffn_gate.weight"] == [64, width] and shapes["blk.3.ffn_down.weight"] == [width, 64]

    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="plain.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    torch.testing.assert_close(logits_of(read), logits_of(plain))
