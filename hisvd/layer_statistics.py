"""Turn the moments of one decoder layer into what the cache keeps: moments and singular values."""

import torch
from torch import nn

from hisvd.cached_moments import input_mean, input_moment, output_gradient_moment, packed
from hisvd.calibration_cache import REMOVAL, ROUNDING, CalibrationCache
from hisvd.component.adapter import Mlp
from hisvd.gradient_pass import OutputGradientMoments
from hisvd.input_moments import InputMoments
from hisvd.integer_codes import INTEGERS
from hisvd.neurons import eliminate, fitting_moment, narrow_input_spectra, narrow_output_spectra, refits, removal_losses
from hisvd.quantization import rounding_energy
from hisvd.shape_utils import Sublayer
from hisvd.whitening_svd import (
    F_DAMPING,
    H_DAMPING,
    cholesky_root,
    left_singular_pairs,
    second_moment,
    singular_values,
    whitened,
)

NUM_LEADING_VECTORS = 64  # right singular vectors of W that the cache keeps
# The damping of the inputs' second moments where losses are estimated: some energy everywhere, as if other texts used
# what the calibration text hardly uses. Factors and re-fits are made with less.
GUARD = 3e-2


def layer_statistics(
    layer: nn.Module, layer_name: str, index: int, moments: InputMoments
) -> tuple[dict[str, torch.Tensor], list[Sublayer]]:
    """The cache tensors of one layer (float32, CPU) and its sublayers in order.

    Per input group: `{group}.H`, H = E[x xᵀ] (n, n), undamped, packed, float64.
    Where an MLP's output linear with a bias reads it, `{group}.mean` (n,) of E[x].
    Per sublayer: `{path}.singular_values` of W and `{path}.whitened_singular_values` of W H^{1/2}, both
    (min(m, n),), largest first, and `{path}.Vh`, the leading right singular vectors of W as rows.
    """
    tensors: dict[str, torch.Tensor] = {}
    sublayers = []
    for group, paths in moments.groups.items():
        moment = moments.moments.pop(group).div_(moments.tokens[group])  # popped to free the largest tensors early
        if group in moments.sums:
            tensors[f"{group}.mean"] = _stored(moments.sums[group] / moments.tokens[group])
        tensors[f"{group}.H"] = packed(moment).cpu()
        root = cholesky_root(moment, H_DAMPING)
        for path in paths:
            weight = layer.get_parameter(f"{path}.weight")
            sublayers.append(Sublayer(f"{layer_name}.{path}", index, path, group, *weight.shape))
            values, vectors = left_singular_pairs(weight.T, NUM_LEADING_VECTORS)
            tensors |= {f"{path}.singular_values": _stored(values), f"{path}.Vh": _stored(vectors.T)}
            tensors[f"{path}.whitened_singular_values"] = _stored(singular_values(whitened(weight, root)))
    return tensors, sublayers


def gradient_statistics(
    layer: nn.Module, cache: CalibrationCache, index: int, moments: OutputGradientMoments
) -> dict[str, torch.Tensor]:
    """The gradient pass's cache tensors of one layer (float32, CPU).

    Per sublayer: `{path}.F`, F = E[g gᵀ] (m, m), undamped, packed (a mean over all tokens, so that F of an expert is
    small where few tokens reach it), `{path}.two_sided_singular_values` of F^{1/2} W H^{1/2} with H damped by GUARD,
    and `{path}.rounding_errors` (formats,), float64, see quantization.rounding_energy. And what neuron_statistics adds.
    """
    tensors: dict[str, torch.Tensor] = {}
    forward = cache.read_forward(index)
    for members in cache.groups_of(index):
        moment = input_moment(members[0], forward, next(layer.parameters()).device)
        root, guarded = cholesky_root(moment, H_DAMPING), cholesky_root(moment, GUARD)
        del moment
        for path in (s.path for s in members):
            moment = moments.moments.pop(path).div_(moments.tokens)
            tensors[f"{path}.F"] = _stored(packed(moment))
            f = second_moment(moment, F_DAMPING)
            weight = layer.get_parameter(f"{path}.weight")
            tensors[f"{path}.two_sided_singular_values"] = _stored(singular_values(whitened(weight, guarded, f)))
            errors = [rounding_energy(weight, root, f, name) for name in INTEGERS]
            tensors[f"{path}.{ROUNDING}"] = torch.stack(errors).cpu()
    for mlp in cache.mlps_of(index):
        tensors |= neuron_statistics(layer, mlp, {s.path: s for s in cache.sublayers_of(index)}, forward | tensors)
    return tensors


def neuron_statistics(
    layer: nn.Module, mlp: Mlp, sublayers: dict[str, Sublayer], statistics: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What removing hidden neurons of `mlp` costs, and the spectra of what is left of it (CPU).

    `statistics` are those of both passes, `sublayers` is by path. For the output linear, of n inputs:
    `{path}.removal_order` (n,), int32, and `{path}.removal_losses` (2, n + 1), float64, see neurons.Elimination: as
    they are, and with its inputs' second moment damped by GUARD, as it also is in the spectra that follow. For it,
    re-fitted, and for the inputs: `{path}.narrow_singular_values` (widths, min(m, n)), a row of the two-sided spectrum
    for each of the widths of neurons.spectrum_widths, with zeros where it has fewer values.
    """
    device = next(layer.parameters()).device
    output, weight = sublayers[mlp.output], layer.get_parameter(f"{mlp.output}.weight")
    f = second_moment(output_gradient_moment(output, statistics, device), 0.0)
    mean = input_mean(output, statistics, device)
    moment = input_moment(output, statistics, device)
    order, losses = eliminate(weight, fitting_moment(moment, mean), f)
    kept = order.flip(0)
    fits = refits(weight, fitting_moment(moment, mean, GUARD), kept)
    found = {mlp.output: narrow_output_spectra(fits, mean, f, kept)}
    guarded_losses = removal_losses(fits, f)
    del moment, fits
    root = cholesky_root(input_moment(sublayers[mlp.inputs[0]], statistics, device), GUARD)  # all read the same
    for path in mlp.inputs:
        metric = output_gradient_moment(sublayers[path], statistics, device)
        found[path] = narrow_input_spectra(layer.get_parameter(f"{path}.weight"), root, metric, kept, mlp.fused)
    tensors = {f"{p}.narrow_singular_values": _stored(v[:, : sublayers[p].full_rank]) for p, v in found.items()}
    tensors[f"{mlp.output}.removal_order"] = order.int().cpu()
    tensors[f"{mlp.output}.{REMOVAL}"] = torch.stack([losses, guarded_losses]).cpu()
    return tensors


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().cpu().contiguous()
