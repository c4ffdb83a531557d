"""Phi-3: q, k, v are one linear, gate and up another; they are factored as they are."""

from hisvd.component.adapter import Adapter, Mlp

ADAPTER = Adapter(
    family="phi3",
    layers="model.layers",
    inputs={
        "attn_in": ("self_attn.qkv_proj",),
        "attn_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_up_proj",),
        "mlp_mid": ("mlp.down_proj",),
    },
    mlps=(Mlp(inputs=("mlp.gate_up_proj",), output="mlp.down_proj", fused=2),),
    stream=("self_attn.o_proj", "mlp.down_proj"),
)
