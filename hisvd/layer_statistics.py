"""Turn the moments of one decoder layer into what the cache keeps: eigenpairs and singular values."""

import torch
from torch import nn

from hisvd.calibration_cache import CalibrationCache, input_moment
from hisvd.gradient_pass import OutputGradientMoments
from hisvd.input_moments import InputMoments
from hisvd.shape_utils import Sublayer
from hisvd.whitening_svd import (
    F_DAMPING,
    H_DAMPING,
    cholesky_root,
    damped,
    left_singular_vectors,
    singular_values,
    whitened,
)

NUM_LEADING_VECTORS = 64  # right singular vectors of W that the cache keeps


def layer_statistics(
    layer: nn.Module, layer_name: str, index: int, moments: InputMoments
) -> tuple[dict[str, torch.Tensor], list[Sublayer]]:
    """The cache tensors of one layer (float32, CPU) and its sublayers in order.

    Per input group: `{group}.eigenvalues` (n,) and `{group}.eigenvectors` (n, n) of H = E[x xᵀ], undamped.
    Per sublayer: `{path}.singular_values` of W and `{path}.whitened_singular_values` of W H^{1/2}, both
    (min(m, n),), largest first, and `{path}.Vh`, the leading right singular vectors of W as rows.
    """
    tensors: dict[str, torch.Tensor] = {}
    sublayers = []
    for group, paths in moments.groups.items():
        moment = moments.moments.pop(group).div_(moments.tokens[group])  # popped to free the largest tensors early
        eigenvalues, eigenvectors = torch.linalg.eigh(moment)
        tensors |= {f"{group}.eigenvalues": _stored(eigenvalues), f"{group}.eigenvectors": _stored(eigenvectors)}
        del eigenvalues, eigenvectors
        root = cholesky_root(moment, H_DAMPING)
        for path in paths:
            weight = layer.get_parameter(f"{path}.weight")
            sublayers.append(Sublayer(f"{layer_name}.{path}", index, path, group, *weight.shape))
            tensors[f"{path}.singular_values"] = _stored(singular_values(weight))
            tensors[f"{path}.whitened_singular_values"] = _stored(singular_values(whitened(weight, root)))
            tensors[f"{path}.Vh"] = _stored(left_singular_vectors(weight.T, NUM_LEADING_VECTORS).T)
    return tensors, sublayers


def gradient_statistics(
    layer: nn.Module, cache: CalibrationCache, index: int, moments: OutputGradientMoments
) -> dict[str, torch.Tensor]:
    """The gradient pass's cache tensors of one layer (float32, CPU).

    Per sublayer: `{path}.F_eigenvalues` (m,) and `{path}.F_eigenvectors` (m, m) of F = E[g gᵀ], undamped (a mean over
    all tokens, so that F of an expert is small where few tokens reach it), and
    `{path}.two_sided_singular_values` of F^{1/2} W H^{1/2}.
    """
    tensors: dict[str, torch.Tensor] = {}
    forward = cache.read_forward(index)
    for members in cache.groups_of(index):
        root = cholesky_root(input_moment(members[0], forward, next(layer.parameters()).device), H_DAMPING)
        for path in (s.path for s in members):
            eigenvalues, eigenvectors = torch.linalg.eigh(moments.moments.pop(path).div_(moments.tokens))
            tensors |= {f"{path}.F_eigenvalues": _stored(eigenvalues), f"{path}.F_eigenvectors": _stored(eigenvectors)}
            f = damped(eigenvalues, eigenvectors, F_DAMPING)
            a = whitened(layer.get_parameter(f"{path}.weight"), root, f)
            tensors[f"{path}.two_sided_singular_values"] = _stored(singular_values(a))
    return tensors


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().cpu().contiguous()
