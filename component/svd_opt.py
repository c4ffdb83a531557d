"""OPT, with biases and learned positions. In OPT-350m the norms come after the residual additions."""

from dataclasses import replace

from hisvd.component.adapter import Adapter, Mlp

PRE_NORM = Adapter(
    family="opt",
    layers="model.decoder.layers",
    inputs={
        "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_out": ("self_attn.out_proj",),
        "mlp_in": ("fc1",),
        "mlp_mid": ("fc2",),
    },
    mlps=(Mlp(inputs=("fc1",), output="fc2"),),
    width_keys=("ffn_dim",),
    stream=("self_attn.out_proj", "fc2"),
)
POST_NORM = replace(PRE_NORM, stream=())
ADAPTER = replace(PRE_NORM, variants={("do_layer_norm_before", False): POST_NORM})
