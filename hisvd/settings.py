"""The settings of a run, as the Python API takes them and the three programs make them from their options."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from hisvd.allocations import ALLOCATIONS, CLUSTERINGS
from hisvd.calibration_cache import CalibrationCache
from hisvd.errors import HiSVDError
from hisvd.exports import EXPORTS
from hisvd.factor_forms import FORMS
from hisvd.rank_metrics import RANK_METRICS
from hisvd.refinement import MODULATIONS
from hisvd.sparse_int6 import COLUMNS
from hisvd.updates import UPDATES
from hisvd.utils.data_utils import PROTOCOLS
from hisvd.whitening_svd import WHITENINGS

DTYPES = ("auto", "float32", "bfloat16", "float16")
SAMPLINGS = ("random", "first")
INT6_MODES = ("calibrated", "magnitude")


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

    @property
    def gradient_windows(self) -> int:
        """The number of windows whose gradients are measured."""
        return min(self.grad_nsamples, self.nsamples) if self.gradients else 0


@dataclass(frozen=True)
class CompressionSettings:
    """How a model is compressed; every choice is one of a dict's keys, named after each.

    Which ranks: the rule `allocation` (allocations.ALLOCATIONS; None: `loss` where the cache has gradients, else
    `hisvd`) and, for `hisvd`, Stage 1 (`rank_method` of rank_metrics, exponent `alpha`) and Stage 2 (`modulation` of
    refinement, `lwe_strength`, `tail_redundancy_weight`, `cluster_by`).

    Which factors: the metric `whitening` (whitening_svd.WHITENINGS; None: `two_sided` where the cache has gradients,
    else `input`), the form `factors` (factor_forms.FORMS) and the `update` (updates.UPDATES): `sequential` fits every
    layer to what the compressed layers below it give, `none` decomposes each matrix once for all targets.

    What is written: `export` (exports.EXPORTS), and for `int6` whether codes are fitted to the calibration inputs
    (`int6_mode` calibrated or magnitude) and by what fraction the perplexity on held-out calibration text may rise
    (`quality_gate_delta`; None exports every linear).
    """

    rank_method: str = "stable"
    alpha: float = 1.0
    modulation: str = "logarithmic"
    lwe_strength: float = 1.0
    tail_redundancy_weight: float = 1.0
    cluster_by: str = "type"
    allocation: str | None = None
    whitening: str | None = None
    factors: str = "pivoted"
    update: str = "sequential"
    export: str = "none"
    int6_mode: str = "calibrated"
    quality_gate_delta: float | None = 0.025

    def __post_init__(self) -> None:
        """Refuse what no cache could serve."""
        allowed: dict[str, Collection[str | None]] = {
            "rank_method": RANK_METRICS,
            "modulation": MODULATIONS,
            "cluster_by": CLUSTERINGS,
            "allocation": (None, *ALLOCATIONS),
            "whitening": (None, *WHITENINGS),
            "factors": FORMS,
            "update": UPDATES,
            "export": EXPORTS,
            "int6_mode": INT6_MODES,
        }
        for name, choices in allowed.items():
            check_choice(name, getattr(self, name), choices)
        check_at_least("alpha", self.alpha, 0)
        check_at_least("lwe_strength", self.lwe_strength, 0)
        check_at_least("tail_redundancy_weight", self.tail_redundancy_weight, 0)
        check_at_least("quality_gate_delta", self.quality_gate_delta, 0)

    @property
    def gated(self) -> bool:
        """Whether the quality gate chooses the linears that are exported."""
        return EXPORTS[self.export].encode is not None and self.quality_gate_delta is not None

    def resolved(self, cache: CalibrationCache) -> "CompressionSettings":
        """These settings with the defaults that depend on the cache.

        Raises:
            HiSVDError: they need what the cache does not have.
        """
        if self.whitening == "two_sided" and not cache.has_gradients:
            raise HiSVDError(
                f"--whitening two_sided needs gradients, and {cache.folder} was made with --no_gradients; "
                "use --whitening input, or calibrate again with gradients."
            )
        if self.export == "int6" and all(s.in_features < COLUMNS for s in cache.sublayers):
            raise HiSVDError(
                f"--export int6 finds nothing to store: no linear of this model has the {COLUMNS} inputs that the "
                "format needs; leave the option out."
            )
        return replace(
            self,
            allocation=self.allocation or ("loss" if cache.has_gradients else "hisvd"),
            whitening=self.whitening or ("two_sided" if cache.has_gradients else "input"),
        )


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


def check_choice(name: str, value: str | None, choices: Collection[str | None]) -> None:
    """Refuse a value that is not one of `choices`.

    Raises:
        HiSVDError: it is not.
    """
    if value not in choices:
        raise HiSVDError(f"--{name} '{value}' is unknown; choose one of {', '.join(c for c in choices if c)}.")


def check_at_least(name: str, value: float | None, smallest: float) -> None:
    """Refuse a number below `smallest`, or one that is not finite; None passes.

    Raises:
        HiSVDError: it is one.
    """
    if value is not None and not smallest <= value < math.inf:
        raise HiSVDError(f"--{name} {value} is not a number of at least {smallest}; choose a larger one.")
