"""Round linears to integer codes with a small output error on the model's own inputs; formats: integer_codes.

Scales are fixed first, each by the least error of its group; then columns are rounded one by one, and each compensates
for the errors of those before it (rounding.round_with_feedback). The error is ‖(W − Ŵ) H^{1/2}‖, as in whitening_svd.
"""

from typing import NamedTuple

import torch

from hisvd.factor_forms import FORMS, Entries, dense_weight, form_of
from hisvd.integer_codes import INTEGERS, SCALE, SMALLEST_SCALE, pack_codes
from hisvd.rounding import refitted_outer, round_with_feedback
from hisvd.whitening_svd import H_DAMPING, SecondMoment, cholesky_root, whitened

# Fractions that are tried of the scale at which the largest weight of a group has the largest code. With 127 codes a
# side, nothing is to be gained from cutting weights off.
CUTS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)}


class Codes(NamedTuple):
    """Int8 `codes` (m, n), their `scales` (m, g), and `weight` (m, n) in float64, which they stand for exactly."""

    codes: torch.Tensor
    scales: torch.Tensor
    weight: torch.Tensor


def group_scales(weight: torch.Tensor, importance: torch.Tensor, name: str) -> torch.Tensor:
    """The scales (m, g) of the format `name` that round W (m, n) to nearest with the least Σ importance · error².

    `importance` (n,) weights the columns. Scales are positive, also of groups that are zero, and in the dtype of the
    format.
    """
    form, columns = INTEGERS[name], weight.shape[1]
    group = form.group or columns
    short = form.groups(columns) * group - columns
    blocks = torch.nn.functional.pad(weight.float(), (0, short)).unflatten(1, (-1, group))
    parts = torch.nn.functional.pad(importance / importance.mean(), (0, short)).float().unflatten(0, (-1, group))
    widest = blocks.abs().amax(-1).clamp_min(SMALLEST_SCALE * form.largest) / form.largest
    best, least = widest.to(form.scale), torch.full_like(widest, torch.inf)
    for cut in CUTS[name]:
        scales = (cut * widest).to(form.scale)
        wide = scales.float()[..., None]
        error = (blocks / wide).round_().clamp_(-form.largest, form.largest).mul_(wide).sub_(blocks)
        total = error.square_().mul_(parts).sum(-1)
        best, least = torch.where(total < least, scales, best), torch.minimum(total, least)
    return best


def fit_codes(weight: torch.Tensor, root: torch.Tensor, name: str) -> Codes:
    """Codes of the format `name` for W (m, n), with a small ‖(W − Ŵ) root‖; `root` (n, n) is lower triangular.

    With the identity for `root`, codes are those nearest to the weights.
    """
    form, weight = INTEGERS[name], weight.double()
    # Compensated for those after it, the error of a column counts by the diagonal alone.
    scales = group_scales(weight, root.diagonal().square(), name)
    steps = form.of_columns(scales.double(), weight.shape[1])

    def nearest(column: torch.Tensor, j: int) -> torch.Tensor:
        return form.nearest(column, steps[:, j])

    rounded = round_with_feedback(weight, root, nearest).values
    return Codes((rounded / steps).round().to(torch.int8), scales, rounded)


def rounding_energy(weight: torch.Tensor, root: torch.Tensor, f: SecondMoment, name: str) -> torch.Tensor:
    """What ‖F^{1/2} (W − Ŵ) H^{1/2}‖² is about, in float64, for codes of the format `name` and `root` as in fit_codes.

    Feedback leaves of every column's error what its neighbours cannot undo, the diagonal entry of the root; errors of
    different rows are independent, so only the diagonal of F counts.
    """
    form, importance = INTEGERS[name], root.diagonal().square()
    steps = form.of_columns(group_scales(weight, importance, name).double(), weight.shape[1])
    error = form.nearest(weight, steps) - weight
    return f.diagonal() @ (error.double().square() @ importance)


def integer_entries(entries: Entries, moment: torch.Tensor, name: str) -> Entries:
    """The state dict entries of a linear, plain or factored, with its weights in the format `name`.

    `moment` (n, n) is E[x xᵀ] of the inputs. The outer factor of a pair is refitted to the stored inner one.
    """
    coded, form, root = dict(entries), form_of(entries), cholesky_root(moment, H_DAMPING)
    if form is None:
        _replace(coded, "weight", fit_codes(entries["weight"], root, name), name)
        return coded
    inner_key, outer_key = f"{FORMS[form].inner}.weight", f"{FORMS[form].outer}.weight"
    outer, inner = entries[outer_key].double(), entries[inner_key].double()
    if FORMS[form].mixable:
        outer, inner = mixed(outer, inner)
    codes = fit_codes(inner, root, name)
    _replace(coded, inner_key, codes, name)
    fitted, metric = refitted_outer(outer, inner @ root, (inner - codes.weight) @ root)
    _replace(coded, outer_key, fit_codes(fitted, metric, name), name)
    return coded


def mixed(outer: torch.Tensor, inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the same product outer (m, r) @ inner (r, n), float64, that lose less when they are rounded.

    The columns of `outer` are brought to one norm, so that no scale is too coarse for what it has in common with them,
    and then turned by a fixed random rotation: the few strong directions among the r activations between the factors
    then run through all columns, and the feedback keeps the rounding errors out of them.
    """
    norms = outer.norm(dim=0)
    norms = norms.clamp_min(1e-9 * norms.max()).clamp_min(SMALLEST_SCALE)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(len(norms), len(norms), generator=generator, dtype=torch.float64)).Q
    rotation = rotation.to(outer.device)
    return outer / norms @ rotation, rotation.T @ (norms[:, None] * inner)


def added_loss(exact: Entries, coded: Entries, root: torch.Tensor, f: SecondMoment | None) -> float:
    """The loss that the codes of a linear add by the second-order estimate, ½ ‖F^{1/2} (W − Ŵ) H^{1/2}‖².

    `exact` and `coded` are its state dict entries before and after, `root` (n, n) is a root of H. Without F, `f`, the
    sum is that of the squared output errors.
    """
    error = dense_weight(coded, len(root)) - dense_weight(exact, len(root))
    return whitened(error, root, f).square().sum().item() / 2


def _replace(entries: Entries, key: str, codes: Codes, name: str) -> None:
    """Put codes in the place of the weight `key`."""
    del entries[key]
    prefix = key.removesuffix("weight")
    entries |= {f"{prefix}weight_{name}": pack_codes(codes.codes, name), prefix + SCALE: codes.scales}
