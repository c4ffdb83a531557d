"""Qwen 2, 2.5 and 3: Llama's module tree, with biases on q, k, v (2) or norms after q and k (3)."""

from dataclasses import replace

from hisvd.component import svd_llama

QWEN2 = replace(svd_llama.ADAPTER, family="qwen2")
QWEN3 = replace(svd_llama.ADAPTER, family="qwen3")
