"""Is attention one value vector plus a small correction? A study of trained models.

For a head with probabilities p and values v at a query, i* = argmax p: Attn = v_{i*} + ε exactly. On chosen layers the
residual ε is dropped (top-1), kept (full, a check), or projected on the leading right singular vectors of the head's
own residuals (low-rank). The study goes through transformers' attention interface, so rotary embeddings, grouped-query
heads, sliding windows and masks stay the model's own.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from hisvd.errors import HiSVDError
from hisvd.settings import StudySettings
from hisvd.utils.data_utils import default_batch_size, evaluation_windows
from hisvd.utils.eval_utils import perplexity, window_length
from hisvd.utils.progress import progress_shown

NAME = "hisvd_attention_residual"
STUDY_SEQLEN = 256  # tokens per window by default
RANKS = (1, 2, 4, 8, 16, 32)  # d_r tried by default, up to the width of the heads
VARIANCE = 0.9  # share of the variance that the effective dimension must reach
RECOVERED = 0.9  # share of the perplexity lost by top-1 that the verdict asks for
Variant = Callable[[torch.Tensor], torch.Tensor]  # residuals (b, heads, queries, d) float32 → what is kept of them


def residual_attention(  # noqa: PLR0913 (the signature that transformers expects)
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention (b, queries, heads, d) as v_{i*} + `module.residual_variant`(ε); an attention function of transformers.

    Raises:
        HiSVDError: the family assigns part of the probability to no token (attention sinks).
    """
    if s_aux is not None:
        raise HiSVDError(
            "This family's attention has sinks, which take part of the probability, so it cannot be studied."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    probabilities = scores.softmax(-1, dtype=torch.float32)
    largest = probabilities.argmax(-1, keepdim=True)
    value = value.float()
    top = value.gather(2, largest.expand(-1, -1, -1, value.shape[-1]))
    output = top + module.residual_variant(probabilities @ value - top)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, residual_attention)


def attention_modules(model: PreTrainedModel, layer: int) -> list[Any]:
    """The modules of decoder layer `layer` that choose their attention function by a config."""
    return [m for m in model.modules() if getattr(m, "layer_idx", None) == layer and hasattr(m, "config")]


@contextmanager
def residual_variants(model: PreTrainedModel, variants: dict[int, Variant]) -> Iterator[None]:
    """Within the context, replace the attention residuals of each layer in `variants` by what its variant returns.

    The other layers run eager attention, whose masks are complete tensors. The model is restored on exit, even
    after an exception.
    """
    before = model.config._attn_implementation
    modules = [(module, variant) for layer, variant in variants.items() for module in attention_modules(model, layer)]
    configs = [module.config for module, _ in modules]
    try:
        model.set_attn_implementation("eager")
        for module, variant in modules:
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = NAME  # this layer alone; the setter changes sub-configs
            module.residual_variant = variant
        yield
    finally:
        for (module, _), config in zip(modules, configs, strict=True):
            module.config = config
            vars(module).pop("residual_variant", None)
        model.set_attn_implementation(before)


def top_1(residual: torch.Tensor) -> torch.Tensor:
    """Drop the residuals."""
    return torch.zeros_like(residual)


def full(residual: torch.Tensor) -> torch.Tensor:
    """Keep them: the model itself."""
    return residual


def low_rank(basis: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Project residuals (b, heads, queries, d) on each head's `basis` (heads, d, d_r)."""
    return residual @ basis @ basis.mT


class ResidualMoments:
    """Σ ε εᵀ (heads, d, d) in float64 per layer, summed as residuals arrive; the residuals are not stored."""

    def __init__(self) -> None:
        self.moments: dict[int, torch.Tensor] = {}

    def variant(self, layer: int) -> Variant:
        """The variant that keeps the residuals of `layer` and adds them to its moment."""
        return partial(self._add, layer)

    def _add(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        rows = residual.transpose(0, 1).flatten(1, 2)
        self.moments[layer] = self.moments.get(layer, 0) + (rows.mT @ rows).double()
        return residual

    def spectra(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By layer: squared singular values (heads, d), largest first, and right singular vectors (heads, d, d)."""
        pairs = {layer: torch.linalg.eigh(moment) for layer, moment in self.moments.items()}
        return {layer: (e.flip(-1).clamp_min(0), v.flip(-1).float()) for layer, (e, v) in pairs.items()}


def cumulative_variance(energies: torch.Tensor) -> torch.Tensor:
    """Share of the variance in the first r directions, (heads, d), from squared singular values (heads, d)."""
    return energies.cumsum(-1) / energies.sum(-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)


def effective_dimension(energies: torch.Tensor) -> torch.Tensor:
    """The smallest r that reaches 90 % of the variance, (heads,), from squared singular values (heads, d)."""
    return (cumulative_variance(energies) < VARIANCE).sum(-1) + 1


@torch.inference_mode()
def residual_spectra(
    model: PreTrainedModel, windows: torch.Tensor, layers: Sequence[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """ResidualMoments.spectra of decoder layers `layers` over windows (count, seqlen).

    Raises:
        HiSVDError: a layer without attention that goes through transformers' interface, or residuals that are not
            finite.
    """
    moments = ResidualMoments()
    with residual_variants(model, {layer: moments.variant(layer) for layer in layers}):
        for batch in windows.split(default_batch_size(windows.shape[1])):
            model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
    if missing := sorted(set(layers) - set(moments.moments)):
        raise HiSVDError(
            f"Layer {missing[0]} of this '{model.config.model_type}' model has no attention that goes through "
            "transformers' attention interface; choose other --layers, or another model."
        )
    for layer, moment in moments.moments.items():
        if not torch.isfinite(moment).all():
            raise HiSVDError(
                f"The attention of layer {layer} gives NaN or infinite values; check the model's weights, or use "
                "--dtype float32."
            )
    return moments.spectra()


def attention_residual_study(
    model: PreTrainedModel,
    ids: torch.Tensor,
    layers: Sequence[int] | None = None,
    d_r: Sequence[int] | None = None,
    settings: StudySettings = StudySettings(),
) -> dict:
    """Is attention one value vector plus a small correction? What a model loses if the correction is made small.

    On the chosen layers every head's output is replaced by the value of its most probable token, plus a part of the
    residual that is left: nothing ("top_1"), all of it ("full", a check), or its projection on the `d_r` directions
    that hold most of the head's residuals on other text ("low_rank").

    Args:
        model: A loaded causal language model; it is left unchanged.
        ids: Token ids, int64: one row (tokens,), to be cut into windows, or windows (count, seqlen).
        layers: Decoder layers, from 0. None: the last quarter.
        d_r: Numbers of directions. None: 1, 2, 4, 8, 16 and 32, up to the width of the heads.
        settings: The number of windows and their length; `hisvd.StudySettings` lists them.

    Returns:
        A dict:
        "baseline", "top_1", "full": perplexities of the model as it is and of the first two variants.
        "low_rank": for every "d_r" its "perplexity", the "delta" from the baseline, and "recovered", the share of the
            perplexity lost by top_1 that it recovers (None where top_1 loses nothing).
        "enough": the smallest d_r that recovers 90 %, or None.
        "heads": for every "layer" and "head" the "cumulative_variance" of its residuals by number of directions, and
            the "effective_dimension" that reaches 90 %.
        "layers", "seqlen", "tokens_scored": what was studied, on windows of which length, and how many tokens each
            perplexity is of.
        "basis_blocks", "blocks": windows that the directions and the perplexities come from.

    Raises:
        HiSVDError: a layer or d_r is out of range; the text is too short; the attention cannot be studied or gives
            values that are not finite; or a perplexity is not finite.

    Example:
        >>> import hisvd
        >>> model = hisvd.load("models/small_80p")
        >>> ids = tokenizer(text, return_tensors="pt").input_ids[0]
        >>> study = hisvd.attention_residual_study(model, ids, layers=[30, 31], d_r=[1, 2, 4, 8])
        >>> [row["d_r"] for row in study["low_rank"]]
        [1, 2, 4, 8]
    """
    layers = chosen_layers(model, layers)
    basis_windows, windows = study_windows(model, ids, settings)
    with progress_shown(settings.progress):
        spectra = residual_spectra(model, basis_windows, layers)
        ranks = chosen_ranks(min(vectors.shape[-1] for _, vectors in spectra.values()), d_r)

        def measured(variants: dict[int, Variant], title: str) -> float:
            with residual_variants(model, variants):
                return perplexity(model, windows, f"{settings.source}, {title}")["perplexity"]

        baseline = perplexity(model, windows, settings.source)
        top = measured(dict.fromkeys(layers, top_1), "A")
        whole = measured(dict.fromkeys(layers, full), "B")
        rows = []
        for rank in ranks:
            bases = {layer: vectors[..., :rank] for layer, (_, vectors) in spectra.items()}
            ppl = measured({layer: partial(low_rank, basis) for layer, basis in bases.items()}, f"C {rank}")
            recovered = (top - ppl) / (top - baseline["perplexity"]) if top > baseline["perplexity"] else None
            rows.append({"d_r": rank, "perplexity": ppl, "delta": ppl - baseline["perplexity"], "recovered": recovered})
    return {
        "layers": layers,
        "basis_blocks": len(basis_windows),
        "blocks": len(windows),
        "seqlen": windows.shape[1],
        "tokens_scored": baseline["tokens_scored"],
        "baseline": baseline["perplexity"],
        "top_1": top,
        "full": whole,
        "low_rank": rows,
        "enough": next((row["d_r"] for row in rows if (row["recovered"] or 0) >= RECOVERED), None),
        "heads": head_spectra(spectra),
    }


def chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> list[int]:
    """`layers` in order, or the last quarter of the decoder layers.

    Raises:
        HiSVDError: a layer is out of range.
    """
    count = model.config.get_text_config().num_hidden_layers
    if layers is None:
        return list(range(count - max(1, count // 4), count))
    for layer in layers:
        if not 0 <= layer < count:
            raise HiSVDError(f"--layers {layer} is out of range: the model has the layers 0 to {count - 1}.")
    return sorted(set(layers))


def chosen_ranks(width: int, d_r: Sequence[int] | None) -> list[int]:
    """`d_r` in order, or those of RANKS that heads of `width` dimensions allow.

    Raises:
        HiSVDError: one is out of range.
    """
    if d_r is None:
        return [rank for rank in RANKS if rank <= width]
    for rank in d_r:
        if not 0 <= rank <= width:
            raise HiSVDError(f"--d_r {rank} is out of range: the heads have {width} dimensions.")
    return sorted(set(d_r))


def study_windows(
    model: PreTrainedModel, ids: torch.Tensor, settings: StudySettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(windows for the residuals' directions, windows for the perplexities), each (count, seqlen), disjoint.

    Raises:
        HiSVDError: the text is too short for a window of each kind, or the windows exceed the model's positions.
    """
    count = settings.calib_blocks + settings.n_blocks
    if ids.dim() == 1:
        seqlen = window_length(model.config, settings.seqlen, STUDY_SEQLEN, model.name_or_path or "the model")
        windows = evaluation_windows(ids, seqlen, count, settings.source, settings.bos)
    else:
        windows = ids[:count]
    if len(windows) <= settings.calib_blocks:
        raise HiSVDError(
            f"The text of {settings.source} has {len(windows)} windows of {windows.shape[1]} tokens, but the bases "
            f"take {settings.calib_blocks} and at least one more is needed; lower --calib_blocks or --seqlen, or use "
            "a longer text."
        )
    return windows[: settings.calib_blocks], windows[settings.calib_blocks :]


def head_spectra(spectra: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> list[dict]:
    """By layer and head: cumulative variance by number of directions, and effective dimension."""
    heads = []
    for layer, (energies, _) in spectra.items():
        shares, dimensions = cumulative_variance(energies), effective_dimension(energies)
        for head, (share, dimension) in enumerate(zip(shares.tolist(), dimensions.tolist(), strict=True)):
            heads.append({"layer": layer, "head": head, "effective_dimension": dimension, "cumulative_variance": share})
    return heads
