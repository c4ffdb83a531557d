"""Llama 1, 2 and 3, with or without grouped-query attention."""

from hisvd.component.adapter import Adapter, Mlp

ADAPTER = Adapter(
    family="llama",
    layers="model.layers",
    inputs={
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_mid": ("mlp.down_proj",),
    },
    mlps=(Mlp(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),),
    stream=("self_attn.o_proj", "mlp.down_proj"),
)
