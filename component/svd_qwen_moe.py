"""Qwen 2 and 3 with experts in all or some layers; in Qwen 2 a shared expert also sees every token."""

from dataclasses import replace

from hisvd.component import svd_llama
from hisvd.component.adapter import Experts, Mlp

EXPERTS = Experts(
    linears=("gate_proj", "up_proj", "down_proj"),
    inputs={
        "experts.*.in": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "experts.*.mid": ("mlp.experts.*.down_proj",),
    },
    mlps=(
        Mlp(
            inputs=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
            output="mlp.experts.*.down_proj",
        ),
    ),
)
SHARED_MLP = Mlp(
    inputs=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    output="mlp.shared_expert.down_proj",
)
SHARED = {
    "shared_in": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_mid": ("mlp.shared_expert.down_proj",),
}
QWEN3_MOE = replace(
    svd_llama.ADAPTER,
    family="qwen3_moe",
    stream=("self_attn.o_proj",),
    experts=EXPERTS,
    width_keys=("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"),
)
QWEN2_MOE = replace(
    QWEN3_MOE,
    family="qwen2_moe",
    experts=replace(EXPERTS, inputs=SHARED | EXPERTS.inputs, mlps=(SHARED_MLP, *EXPERTS.mlps)),
)
