"""Sample continuations of prompts by a loaded model, greedily."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hisvd.errors import HiSVDError
from hisvd.utils.model_utils import positions_of

NEW_TOKENS = 40
PROMPTS = (  # of evaluate.py --report, unless --prompt gives others
    "The capital of France is",
    "In simple terms, a computer program is",
    "Once upon a time, in a small village by the sea,",
)


@torch.inference_mode()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], name: str
) -> list[dict[str, str]]:
    """What the model, `name` in messages, makes of each prompt: dicts with "prompt" and "continuation".

    At most NEW_TOKENS tokens, fewer where the model ends its text or has no more positions. Prompts are read as they
    are, without a chat template.

    Raises:
        HiSVDError: a prompt has no tokens, or as many as the model has positions.
    """
    limit, eos = positions_of(model.config), getattr(model.generation_config, "eos_token_id", None)
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.long().to(model.device)
        count, most = ids.shape[1], NEW_TOKENS if limit is None else min(NEW_TOKENS, limit - ids.shape[1])
        if not count or most < 1:
            raise HiSVDError(
                f"--prompt '{prompt[:60]}' has {count} tokens for {name}; give one of 1 to {limit} tokens."
            )
        settings = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=eos, pad_token_id=0)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
        text = tokenizer.decode(out[0, count:], skip_special_tokens=True)
        samples.append({"prompt": prompt, "continuation": str(text)})
    return samples
