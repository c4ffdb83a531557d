"""The settings of a run, as the Python API takes them and the three programs make them from their options."""

import math
from dataclasses import dataclass
from pathlib import Path

from hisvd.errors import HiSVDError

DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLINGS = ("random", "first")
# How the text of an evaluation is tokenized. Published tables (SVD-LLM's code and those built on it) let the tokenizer
# add its special tokens once, at the ends of the joined text: for Llama one BOS, which shifts every window by a token.
PROTOCOLS = {"default": {"add_special_tokens": False}, "svd-llm": {"add_special_tokens": True}}


@dataclass(frozen=True)
class Resources:
    """Where a run computes and what it shows; results do not depend on it, but for rounding.

    `device` is "auto" (an accelerator if there is one), "cpu", "cuda:1" and so on. Hidden states up to
    `activation_budget_gb` are read from memory, past it from the files that hold them in any case. `progress` shows
    tqdm bars on standard error.
    """

    device: str = "auto"
    activation_budget_gb: float = 0.0
    progress: bool = True


@dataclass(frozen=True)
class CalibrationSettings:
    """What is measured on which text.

    `nsamples` windows of `seqlen` tokens are drawn from `dataset` (wikitext2, c4, ptb, python-docs, or a .txt, .json or
    .jsonl file): at random with `seed`, or with `sampling` "first" from its start. Local copies of the named data sets
    are looked for in `data_dir` (None: the environment variable HISVD_DATA_DIR, else `data`). `gradients` also measures
    the output gradients of the first `grad_nsamples` windows, which two-sided whitening and the loss allocation need.
    `batch_size` is the number of sequences per forward pass (None: about 4096 tokens), `dtype` the compute dtype
    ("auto": float32 on the CPU, else the checkpoint's).
    """

    nsamples: int = 256
    seqlen: int = 2048
    dataset: str = "wikitext2"
    data_dir: str | None = None
    sampling: str = "random"
    seed: int = 3
    gradients: bool = True
    grad_nsamples: int = 64
    batch_size: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no run could use."""
        check_choice("sampling", self.sampling, SAMPLINGS)
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least("nsamples", self.nsamples, 1)
        check_at_least("seqlen", self.seqlen, 2)
        check_at_least("grad_nsamples", self.grad_nsamples, 1)
        check_at_least("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated.

    `seqlen` tokens per window (None: 2048, or the model's limit if that is lower), `nsamples` windows of each data set
    (None: all). `protocol` is "default" (text tokenized without special tokens) or "svd-llm" (with the tokenizer's
    own, as in published tables); under both every window of a family that needs it (Gemma) starts with BOS.
    `offload_folder` measures perplexity with one decoder layer in memory at a time, with hidden states in that folder
    meanwhile. `speed` also measures prefill and decoding. `data_dir` and `dtype` are as in CalibrationSettings.
    """

    data_dir: str | None = None
    seqlen: int | None = None
    nsamples: int | None = None
    protocol: str = "default"
    offload_folder: str | Path | None = None
    speed: bool = False
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no run could use."""
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_at_least("seqlen", self.seqlen, 2)
        check_at_least("nsamples", self.nsamples, 1)
        if self.offload_folder and self.speed:
            raise HiSVDError(
                "--speed needs the whole model in memory, so it does not go with --offload_folder; leave one out."
            )


@dataclass(frozen=True)
class StudySettings:
    """Which text the attention-residual study reads, and what it shows.

    A row of token ids is cut into windows of `seqlen` tokens (None: 256, or the model's limit if that is lower), each
    with the token `bos` in front if it is given; ids that come as windows stay as they are. The first `calib_blocks`
    windows give the residuals' directions, the next `n_blocks` (fewer where the text ends) the perplexities. `source`
    names the text in messages and progress bars, which `progress` shows on standard error.
    """

    seqlen: int | None = None
    n_blocks: int = 30
    calib_blocks: int = 4
    bos: int | None = None
    source: str = "the given ids"
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what no run could use."""
        check_at_least("seqlen", self.seqlen, 2)
        check_at_least("n_blocks", self.n_blocks, 1)
        check_at_least("calib_blocks", self.calib_blocks, 1)


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value that is not one of `choices`.

    Raises:
        HiSVDError: it is not.
    """
    if value not in choices:
        raise HiSVDError(f"--{name} '{value}' is unknown; choose one of {', '.join(choices)}.")


def check_at_least(name: str, value: float | None, smallest: float) -> None:
    """Refuse a number below `smallest`, or one that is not finite; None passes.

    Raises:
        HiSVDError: it is one.
    """
    if value is not None and not smallest <= value < math.inf:
        raise HiSVDError(f"--{name} {value} is not a number of at least {smallest}; choose a larger one.")
