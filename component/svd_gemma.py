"""Gemma 2 and 3: Llama's module tree, but with norms between o or down and the residual stream."""

from dataclasses import replace

from hisvd.component import svd_llama

GEMMA2 = replace(svd_llama.ADAPTER, family="gemma2", stream=(), needs_bos=True, gain_offset=1.0)
GEMMA3 = replace(svd_llama.ADAPTER, family="gemma3", stream=(), needs_bos=True, gain_offset=1.0)
GEMMA3_WITH_VISION = replace(GEMMA3, layers="model.language_model.layers")
