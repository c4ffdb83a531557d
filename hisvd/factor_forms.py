"""The factor forms: how a pair left (m, r) @ right (r, n) is stored, and how many parameters that takes.

FORMS is their registry. A new form is an entry here and a module in `hisvd.component.low_rank.MODULE_OF_FORM` that
computes with the state dict entries which `pack` makes; nothing else knows a form by its name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hisvd.errors import HiSVDError
from hisvd.integer_codes import CODES, SCALE, dequantize_codes
from hisvd.pivoting import pack_pivoted, unpack_pivoted
from hisvd.rounding import Pair, round_products
from hisvd.sparse_int6 import dequantize
from hisvd.whitening_svd import Factors

Shape = tuple[int, int]  # of a weight: (m, n) = (out_features, in_features)
Entries = dict[str, torch.Tensor]  # state dict entries of a linear, without its bias
# The last part of a tensor's name that tells a coded weight, and the form of its module.
CODED = {"packed_weight": "int6", **CODES}
DENSE = "dense"  # instead of a form's name: multiply the factors back into the weight of a plain linear


@dataclass(frozen=True)
class FactorForm:
    """One way to store left (m, r) @ right (r, n): two linears, and what else the module of the form needs.

    `inner` is the path, inside that module, of the linear that reads the sublayer's input and has r outputs, `outer`
    that of the linear which reads the outputs of `inner`. `others` names the entries besides their weights. The three
    together tell the forms apart, so no two forms have the same ones.

    `parameters(r, (m, n))` counts the stored parameters for r < min(m, n) and grows with r. The weight of `inner` is
    (r, n), that of `outer` (`outer_rows(r, m)`, r); `indices(m)` counts int32 entries, which are not parameters.
    `pack(left, right, root, dtype)` makes the entries, weights in `dtype`, from factors in float64. `root` is the lower
    Cholesky root (n, n) of the inputs' second moment, which weights rounding errors; None: all inputs count equally.
    `pack_ranks(factors, ranks, root, dtype)` does so for several ranks, which may share work; None: `pack` for each.
    `product(inner, outer, entries)` is the weight (m, n) that the two linears' weights and the other entries stand for.
    `mixable`: outer M and M⁻¹ inner stand for the same weight, whatever M. `noise`: how many times the energy of
    rounding errors that a plain weight would have the product has, by experience (docs/ablations.md).
    """

    inner: str
    outer: str
    parameters: Callable[[int, Shape], int]
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], Entries]
    product: Callable[[torch.Tensor, torch.Tensor, Entries], torch.Tensor]
    pack_ranks: Callable[[Factors, Sequence[int], torch.Tensor | None, torch.dtype], Iterator[Entries]] | None = None
    others: tuple[str, ...] = ()
    mixable: bool = False
    noise: float = 1.5
    outer_rows: Callable[[int, int], int] = lambda rank, rows: rows
    indices: Callable[[int], int] = lambda rows: 0


def _pack_svd(
    factors: Factors, ranks: Sequence[int], root: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[Entries]:
    cuts = map(factors.cut, ranks)
    pairs = (Pair(cut.left, cut.right, cut.right if cut.seen is None else cut.seen) for cut in cuts)
    for left, right in round_products(pairs, root, dtype):
        yield {"left.weight": left, "right.weight": right}


def _pack_pivoted(
    factors: Factors, ranks: Sequence[int], root: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[Entries]:
    permutations: list[torch.Tensor] = []  # of pairs that are not rounded yet

    def pairs() -> Iterator[Pair]:
        for rank, packed in zip(ranks, pack_pivoted(factors.left, ranks), strict=True):
            permutations.append(packed.permutation)
            _, right, seen = factors.cut(rank)
            base = packed.rows @ right
            yield Pair(packed.coefficients, base, base if seen is None else packed.rows @ seen)

    for coefficients, base in round_products(pairs(), root, dtype):
        permutation = permutations.pop(0)
        yield {"base.weight": base, "coefficients.weight": coefficients, "permutation": permutation}


def _alone(pack_ranks: Callable) -> Callable:
    """`pack` of a form with `pack_ranks`."""

    def pack(left: torch.Tensor, right: torch.Tensor, root: torch.Tensor | None, dtype: torch.dtype) -> Entries:
        left, right = left.double(), right.double()
        factors = Factors(left, right, None if root is None else right @ root)
        return next(pack_ranks(factors, [left.shape[1]], root, dtype))

    return pack


FORMS: dict[str, FactorForm] = {
    # Fewer parameters for the same matrix, see pivoting; the permutation's indices are not counted.
    "pivoted": FactorForm(
        inner="base",
        outer="coefficients",
        others=("permutation",),
        parameters=lambda rank, shape: rank * (sum(shape) - rank),
        pack=_alone(_pack_pivoted),
        pack_ranks=_pack_pivoted,
        product=lambda inner, outer, entries: unpack_pivoted(inner, outer, entries["permutation"]),
        noise=10.0,
        outer_rows=lambda rank, rows: rows - rank,
        indices=lambda rows: rows,
    ),
    # The two factors as they are.
    "svd": FactorForm(
        inner="right",
        outer="left",
        parameters=lambda rank, shape: rank * sum(shape),
        pack=_alone(_pack_svd),
        pack_ranks=_pack_svd,
        product=lambda inner, outer, entries: outer @ inner,
        mixable=True,
    ),
}


def form_in(form: str, dtype: str | None) -> str:
    """The form of factors where `form` is wanted and weights are in the integers `dtype` (None: plain).

    In 4 bits only mixable forms: the coefficients of others multiply rounding errors.
    """
    if dtype == "int4" and not FORMS[form].mixable:
        return next(name for name, f in FORMS.items() if f.mixable)
    return form


def factor_tensors(
    left: torch.Tensor, right: torch.Tensor, form: str, dtype: torch.dtype, root: torch.Tensor | None = None
) -> Entries:
    """State dict entries (without bias) of the module of `form` for left (m, r) and right (r, n), weights in `dtype`.

    `root` is as in FactorForm. For the form DENSE, the weight of a plain linear.

    Raises:
        HiSVDError: an entry is not finite; the caller puts the linear's name first, see `errors.naming`.
    """
    if form == DENSE:
        return _finite({"weight": (left @ right).to(dtype)})
    return _finite(FORMS[form].pack(left, right, root, dtype))


def tensors_of_ranks(
    factors: Factors, ranks: Sequence[int], form: str, dtype: torch.dtype, root: torch.Tensor | None
) -> Iterator[Entries]:
    """What `factor_tensors` makes of the factors of every rank, which share work.

    Raises:
        HiSVDError: see `factor_tensors`.
    """
    pack_ranks = None if form == DENSE else FORMS[form].pack_ranks
    if pack_ranks:
        yield from map(_finite, pack_ranks(factors, ranks, root, dtype))
    else:
        for left, right, _ in map(factors.cut, ranks):
            yield factor_tensors(left, right, form, dtype, root)


def _finite(entries: Entries) -> Entries:
    if not all(tensor.isfinite().all() for tensor in entries.values()):
        dtype = next(tensor.dtype for tensor in entries.values() if tensor.is_floating_point())
        raise HiSVDError(
            f"its factors hold NaN or infinite values in {str(dtype).removeprefix('torch.')}; use --factors pivoted or "
            "--whitening input, or a checkpoint stored in bfloat16 or float32."
        )
    return entries


def form_of(entries: Entries) -> str | None:
    """The form of a linear with these state dict entries, its factors in codes or not; None: it is not factored."""
    names = {key.partition(".")[0] for key in entries} - {"bias"}
    return next((name for name, f in FORMS.items() if names == {f.inner, f.outer, *f.others}), None)


def inner_key(entries: Entries) -> str:
    """The name of the entry that reads the inputs of a plain or factored linear which is not coded."""
    name = form_of(entries)
    return "weight" if name is None else f"{FORMS[name].inner}.weight"


def dense_weight(entries: Entries, in_features: int) -> torch.Tensor:
    """The weight (m, n) in float64 that the state dict entries of a plain, factored or coded linear stand for."""

    def matrix(prefix: str, columns: int) -> torch.Tensor:
        if f"{prefix}weight" in entries:
            return entries[f"{prefix}weight"].double()
        for key in CODES:
            if prefix + key in entries:
                return dequantize_codes(entries[prefix + key], entries[prefix + SCALE], columns, torch.float64)
        packed, metadata, scales = (entries[prefix + key] for key in ("packed_weight", "metadata", "scales"))
        return dequantize(packed, metadata, scales, columns, torch.float64)

    name = form_of(entries)
    if name is None:
        return matrix("", in_features)
    inner = matrix(f"{FORMS[name].inner}.", in_features)
    return FORMS[name].product(inner, matrix(f"{FORMS[name].outer}.", len(inner)), entries)


def coded_modules(names: Iterable[str]) -> dict[str, str]:
    """The forms of the linears whose weights are codes, by their names, from the names of all tensors."""
    split = (name.rpartition(".") for name in names)
    return {linear: CODED[key] for linear, _, key in split if key in CODED}


def narrow_entry(shape: Shape, stored: Shape) -> dict:
    """An entry of the table for `component.low_rank.swap_linears`: a linear of shape `stored`, not `shape`."""
    sides = {side: new for side, old, new in zip(("out", "in"), shape, stored, strict=True) if new != old}
    return {"form": "narrow", **sides} if sides else {}


def modules_of(path: str, entries: Entries, shape: Shape, stored: Shape) -> dict[str, dict]:
    """The table for `component.low_rank.swap_linears` of the linear at `path` that has these state dict entries.

    `shape` is that of the weight in the original model, `stored` that of the one which the entries stand for.
    """
    table: dict[str, dict] = {path: narrow_entry(shape, stored)}
    name = form_of(entries)
    if name is not None:
        rank = next(len(t) for key, t in entries.items() if key.startswith(f"{FORMS[name].inner}."))
        table[path] |= {"form": name, "rank": rank}
    for code, form in coded_modules(f"{path}.{key}" for key in entries).items():
        table[code] = table.get(code, {}) | {"form": form}
    return {name: entry for name, entry in table.items() if entry}
