"""Mistral: Llama's module tree, with sliding-window attention that the model's own code handles."""

from dataclasses import replace

from hisvd.component import svd_llama

ADAPTER = replace(svd_llama.ADAPTER, family="mistral")
