"""Mixtral: Llama's attention and experts, whose block had another name in older versions of transformers."""

from dataclasses import replace

from hisvd.component import svd_llama
from hisvd.component.adapter import Experts, Mlp

ADAPTER = replace(
    svd_llama.ADAPTER,
    family="mixtral",
    stream=("self_attn.o_proj",),
    experts=Experts(
        linears=("w1", "w3", "w2"),
        inputs={
            "experts.*.in": ("mlp.experts.*.w1", "mlp.experts.*.w3"),
            "experts.*.mid": ("mlp.experts.*.w2",),
        },
        mlps=(Mlp(inputs=("mlp.experts.*.w1", "mlp.experts.*.w3"), output="mlp.experts.*.w2"),),
    ),
)
