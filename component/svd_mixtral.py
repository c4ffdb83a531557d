"""Mixtral: Mistral's attention in front of experts."""

from dataclasses import replace

from hisvd.component import svd_llama

ADAPTER = replace(
    svd_llama.ADAPTER,
    family="mixtral",
    stream=("self_attn.o_proj",),
    experts={
        "experts.*.in": ("mlp.experts.*.w1", "mlp.experts.*.w3"),
        "experts.*.mid": ("mlp.experts.*.w2",),
    },
)
