"""The settings of a run, as the Python API takes them and the three programs make them from their options."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hisvd.allocations import ALLOCATIONS, CLUSTERINGS
from hisvd.choices import BUDGETS, DTYPES, INT6_MODES, REFINEMENTS, SAMPLINGS
from hisvd.errors import HiSVDError
from hisvd.exports import EXPORTS, LINEAR_DTYPES
from hisvd.factor_forms import FORMS
from hisvd.integer_codes import INTEGERS
from hisvd.moves import MOVES
from hisvd.rank_allocation import Allowed
from hisvd.rank_metrics import RANK_METRICS
from hisvd.refinement import MODULATIONS
from hisvd.updates import UPDATES
from hisvd.utils.data_utils import PROTOCOLS
from hisvd.whitening_svd import WHITENINGS


@dataclass(frozen=True)
class Resources:
    """Where a run computes and what it shows. Results do not depend on it, except for rounding.

    Attributes:
        device: "auto" (an accelerator if there is one, else the CPU), or a device of PyTorch: "cpu", "cuda:1". Default:
            "auto".
        activation_budget_gb: Hidden states up to this size, in GB (1e9 bytes), are read from memory. They lie in files
            in any case, so 0 costs time at most. `evaluate` and `estimate` do not use it. Default: 0.0.
        progress: Whether tqdm bars are shown on standard error (a line for every stage where that is no terminal).
            Default: True.

    Raises:
        HiSVDError: `activation_budget_gb` is negative or not a number.
    """

    device: str = "auto"
    activation_budget_gb: float = 0.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what no run could use."""
        if not self.activation_budget_gb >= 0:  # nor NaN
            raise HiSVDError(f"--activation_budget_gb {self.activation_budget_gb} is not a number of at least 0.")


@dataclass(frozen=True)
class CalibrationSettings:
    """What `hisvd.calibrate` measures, and on which text.

    Attributes:
        nsamples: Number of calibration windows, each one sequence. Default: 256.
        seqlen: Tokens per window, at most as many as the model has positions. Default: 2048.
        dataset: "wikitext2", "c4", "ptb" or "python-docs"; or the path of a file (.json and .jsonl: on every line a
            "text", or the "messages" of a chat, which the tokenizer's chat template renders), or of a folder of such
            files. Several sources share the windows by their weights: "c4=3,chats.jsonl=1". Default: "wikitext2".
        data_dir: Folder with local copies of the named data sets (wikitext2-train.txt, ptb-train.txt, c4-train.json);
            what it lacks comes from the Hub. None (the default): the environment variable HISVD_DATA_DIR, else "data".
        sampling: "random" (windows drawn with `seed`) or "first" (from the start of the text). Default: "random".
        seed: Seed of the random windows. Default: 3.
        gradients: Whether the second moments of the output gradients are measured too. Two-sided whitening needs them,
            and the "loss" allocation estimates the loss by them. Without, calibration takes about half of the time.
            Default: True.
        grad_nsamples: Gradients use the first `grad_nsamples` windows, or all if there are fewer. Default: 64.
        batch_size: Sequences per forward pass. None (the default): as many as have about 4096 tokens.
        dtype: Compute dtype, "float32", "bfloat16" or "float16"; "auto" is float32 on the CPU, else the checkpoint's.
            Default: "auto".

    Raises:
        HiSVDError: a name is not one of its choices, or a number is too small. The message calls a field by the option
            of calibrate.py, such as --nsamples.
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
        if not -(2**63) <= self.seed < 2**63:
            raise HiSVDError(f"--seed {self.seed} has more than 64 bits; choose a smaller one.")

    @property
    def gradient_windows(self) -> int:
        """The number of windows whose gradients are measured."""
        return min(self.grad_nsamples, self.nsamples) if self.gradients else 0


@dataclass(frozen=True)
class CompressionSettings:
    """How `hisvd.compress` and `hisvd.plan` compress a model. The defaults gave the best models in the benchmarks.

    H and F are the second moments of a linear's inputs and of its output gradients, W its weight. Each choice is a key
    of a dict (in brackets) that can be extended: see docs/extending.md.

    Attributes:
        rank_method: "hisvd" allocation, Stage 1: the rank of W, "stable", "effective" or "mathematical" (RANK_METRICS).
            Default: "stable".
        alpha: Stage 1: exponent of the rank density; 0 gives every linear the same share. Default: 1.0.
        modulation: Stage 2: how a score becomes a factor on the share, "logarithmic", "power", "exponential" or
            "linear" (MODULATIONS). Default: "logarithmic".
        lwe_strength: Stage 2: strength of the modulation; 0 switches Stage 2 off. Default: 1.0.
        tail_redundancy_weight: Stage 2: factor on the score; 0 switches Stage 2 off. Default: 1.0.
        cluster_by: Stage 2: linears are scored by "type", or by "type_depth", type within runs of similar layers
            (CLUSTERINGS). Default: "type".
        allocation: How ranks are chosen: "loss" (least estimated loss), "hisvd" (Stages 1 and 2) or "uniform"
            (ALLOCATIONS). None (the default): "loss" if the cache has gradients, else "hisvd".
        whitening: The metric in which factors are optimal: "two_sided" (F^{1/2} W H^{1/2}), "input" (W H^{1/2}) or
            "none" (plain SVD) (WHITENINGS). None (the default): "two_sided" if the cache has gradients, else "input".
        factors: How factors of rank r are stored: "pivoted" (r(m + n - r) parameters) or "svd" (r(m + n)) (FORMS).
            Default: "pivoted".
        moves: What is removed: "low_rank" factors linears, "neurons" takes hidden neurons out of the MLPs, "both"
            weighs one against the other (MOVES). None (the default): "both" with allocation "loss" and two-sided
            whitening, if the cache knows what neurons are worth, else "low_rank".
        update: "sequential" fits every layer to what the compressed layers below it deliver; "none" decomposes each
            matrix once for all targets, which is much quicker (UPDATES). Default: "sequential".
        refine: What is then trained on the calibration text, so that the model predicts what the original does
            (hisvd.tuning): "norms" the gains of the layers' norms, "weights" these and the layers' linear weights,
            "none" nothing. Default: "none".
        rank_multiple: Ranks, and widths of MLPs that lose neurons, are multiples of this, as kernels and quantizers
            like them; with allocation "loss". None (the default): 8 with that allocation, where every linear has at
            least 128 inputs and outputs (32 with weights in integers), else 1.
        min_saving: A linear is factored only where that saves at least this share of its parameters, since the second
            product and the permutation take time too; with allocation "loss". None (the default): 0.05 with that
            allocation, where every linear has at least 128 inputs and outputs, else 0.
        width_multiple: "plain" export: the common width of the MLPs is a multiple of this. Default: 64.
        linear_dtype: What linear weights, factors or not, are stored in: "bf16", "int8" (a scale per row) or "int4" (a
            scale per 32 columns); "int8" and "int4" with export "none" alone. None (the default): the checkpoint's.
        budget: What targets are shares of: "parameters", or "bytes" (of the linear weights in 16 bits), which makes
            every linear's dtype, int8, int4 or 16 bits, part of the choice; with allocation "loss" and two-sided
            whitening. Default: "parameters".
        export: "none" stores factors, "dense" multiplies them back into plain weights, "int6" stores factors and other
            linear weights in the INT6 2:4 pairwise sparse format, "plain" takes as many neurons out of every MLP and
            changes nothing else, which gives a stock checkpoint (EXPORTS). Default: "none".
        int6_mode: "int6" export: codes "calibrated" (fitted to the calibration inputs) or "magnitude" (the plain rule).
            Default: "calibrated".
        quality_gate_delta: "int6" export: as many linears are exported as raise the perplexity on held-out calibration
            text by at most this fraction (0.025: 2.5 %). None exports all. Default: 0.025.

    Raises:
        HiSVDError: a name is not one of its choices, or a number is negative or not finite. The message calls a field
            by the option of compress.py, such as --allocation.
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
    moves: str | None = None
    update: str = "sequential"
    refine: str = "none"
    rank_multiple: int | None = None
    min_saving: float | None = None
    width_multiple: int = 64
    linear_dtype: str | None = None
    budget: str = "parameters"
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
            "moves": (None, *MOVES),
            "update": UPDATES,
            "refine": REFINEMENTS,
            "linear_dtype": (None, *LINEAR_DTYPES),
            "budget": BUDGETS,
            "export": EXPORTS,
            "int6_mode": INT6_MODES,
        }
        for name, choices in allowed.items():
            check_choice(name, getattr(self, name), choices)
        check_at_least("alpha", self.alpha, 0)
        check_at_least("lwe_strength", self.lwe_strength, 0)
        check_at_least("tail_redundancy_weight", self.tail_redundancy_weight, 0)
        check_at_least("rank_multiple", self.rank_multiple, 1)
        check_at_least("min_saving", self.min_saving, 0)
        check_at_least("width_multiple", self.width_multiple, 1)
        check_at_least("quality_gate_delta", self.quality_gate_delta, 0)
        if self.linear_dtype in INTEGERS and self.export != "none":
            raise HiSVDError(
                f"--linear_dtype {self.linear_dtype} does not go with --export {self.export}; leave one of them out."
            )
        if self.linear_dtype == "int4" and self.factors == "pivoted" and self.moves != "neurons":
            raise HiSVDError(
                "--linear_dtype int4 does not go with --factors pivoted, whose coefficients multiply rounding errors; "
                "use --factors svd, or --linear_dtype int8."
            )
        if self.budget == "bytes" and (self.linear_dtype or self.export != "none"):
            other = f"--export {self.export}" if self.export != "none" else f"--linear_dtype {self.linear_dtype}"
            raise HiSVDError(
                f"--target_bytes chooses how every linear is stored, so it does not go with {other}; leave one of them "
                "out."
            )
        encoded = self.linear_dtype in INTEGERS or self.budget == "bytes" or (self.export == "int6" and not self.gated)
        if self.refine == "weights" and (encoded or self.export == "dense"):
            raise HiSVDError(
                "--refine weights trains weights as they are stored, so it goes with neither integers (--linear_dtype, "
                "--target_bytes, --export int6 without a gate) nor --export dense; use --refine norms."
            )
        if self.linear_dtype and self.export == "int6":
            raise HiSVDError("--export int6 stores linears in a format of its own; leave --linear_dtype out.")

    @property
    def allowed_ranks(self) -> Allowed:
        """The ranks that the loss allocation may choose; for settings from `cache_defaults.resolved`."""
        assert self.rank_multiple is not None and self.min_saving is not None
        return Allowed(self.rank_multiple, self.min_saving)

    @property
    def gated(self) -> bool:
        """Whether the quality gate chooses the linears that are exported."""
        return EXPORTS[self.export].encode is not None and self.quality_gate_delta is not None


@dataclass(frozen=True)
class EvaluationSettings:
    """How `hisvd.evaluate` measures a model.

    Attributes:
        data_dir: Folder with local copies of the named data sets (wikitext2-test.txt, ptb-test.txt,
            c4-validation.json); what it lacks comes from the Hub. None (the default): the environment variable
            HISVD_DATA_DIR, else "data".
        seqlen: Tokens per window. None (the default): 2048, or the model's limit if that is lower.
        nsamples: Windows per data set, from its start. None (the default): all.
        protocol: "default" (text is tokenized without special tokens) or "svd-llm" (with the tokenizer's own, as in
            published tables). Under both, every window of a family that needs it (Gemma) starts with BOS. Default:
            "default".
        offload_folder: Perplexity with one decoder layer in memory at a time; hidden states lie in this folder
            meanwhile. None (the default): the whole model is loaded.
        speed: Whether speed and peak memory are measured too; not with `offload_folder`. Default: False.
        reference: Model, folder, .pt file or Hub id, beside which speed and memory are measured; only with `speed`.
            None (the default): evaluate.py takes one of its rows; `hisvd.evaluate` gives no ratios.
        dtype: Compute dtype, "float32", "bfloat16" or "float16"; "auto" is float32 on the CPU, else the checkpoint's.
            Default: "auto".
        tasks: Tasks of lm-evaluation-harness to score too, by name or as .yaml files; needs the package lm_eval, and
            excludes `offload_folder`. Default: ().
        task_limit: Documents per task, from its start. None (the default): all.
        verify: Whether the weight files of compressed models are first compared with their checksums. Default: False.
        prompts: Texts that the model is to continue by 40 tokens, greedily; excludes `offload_folder`. Default: ().

    Raises:
        HiSVDError: a name is not one of its choices, a number is too small, `offload_folder` is combined with `speed`,
            `tasks` or `prompts`, or `reference` is set without `speed`. The message calls a field by the option of
            evaluate.py, such as --seqlen.
    """

    data_dir: str | None = None
    seqlen: int | None = None
    nsamples: int | None = None
    protocol: str = "default"
    offload_folder: str | Path | None = None
    speed: bool = False
    reference: str | Path | None = None
    dtype: str = "auto"
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    verify: bool = False
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no run could use."""
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_at_least("seqlen", self.seqlen, 2)
        check_at_least("nsamples", self.nsamples, 1)
        check_at_least("task_limit", self.task_limit, 1)
        for option, value in (("speed", self.speed), ("tasks", self.tasks), ("prompt", self.prompts)):
            if self.offload_folder and value:
                raise HiSVDError(
                    f"--{option} needs the whole model in memory, so it cannot be combined with --offload_folder; drop "
                    "one."
                )
        if self.reference and not self.speed:
            raise HiSVDError("--reference needs --speed, which measures the models beside it; add it.")


@dataclass(frozen=True)
class StudySettings:
    """Which text `hisvd.attention_residual_study` reads, and what it shows.

    Attributes:
        seqlen: Tokens per window into which a row of token ids is cut. None (the default): 256, or the model's limit if
            that is lower. Ids that come as windows stay as they are.
        n_blocks: Windows whose perplexities are measured, after those for the directions; fewer if the text ends.
            Default: 30.
        calib_blocks: Windows, from the start, whose residuals give the directions. Default: 4.
        bos: Token id that every window cut from a row starts with. None (the default): windows are text alone.
        source: Name of the text in messages and progress bars. Default: "the given ids".
        progress: Whether tqdm bars are shown on standard error. Default: True.

    Raises:
        HiSVDError: a number is too small. The message calls a field by the option of evaluate.py, such as --n_blocks.
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
