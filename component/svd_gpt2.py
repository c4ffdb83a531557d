"""GPT-2, whose linears are Conv1D modules; q, k and v together are one of them."""

from hisvd.component.adapter import Adapter, Mlp

ADAPTER = Adapter(
    family="gpt2",
    layers="transformer.h",
    inputs={
        "attn_in": ("attn.c_attn",),
        "attn_out": ("attn.c_proj",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_mid": ("mlp.c_proj",),
    },
    mlps=(Mlp(inputs=("mlp.c_fc",), output="mlp.c_proj"),),
    width_keys=("n_inner",),
    stream=("attn.c_proj", "mlp.c_proj"),
)
