"""Turn the weights of one decoder layer into what the files hold: the one place where matrices are factored.

An update (hisvd.updates) says which weights are factored and what their inputs are, and receives each result at once.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from hisvd.cached_moments import output_moment
from hisvd.calibration_cache import CalibrationCache
from hisvd.component.families import adapter_for
from hisvd.component.hf_quantizer import config_entries
from hisvd.errors import naming
from hisvd.exports import EXPORTS, Export
from hisvd.factor_forms import DENSE, Entries, Shape, inner_key, tensors_of_ranks
from hisvd.layer_tensors import replace_entries, stored_prefix
from hisvd.narrowing import F_ROOT, Kept, OutputFits, kept_outputs_moment, with_zeros
from hisvd.quantization import integer_entries
from hisvd.shape_utils import PLAIN_BYTES, Sublayer
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.save_utils import ModelWriter
from hisvd.whitening_svd import H_DAMPING, WHITENINGS, cholesky_root, optimal_factors

if TYPE_CHECKING:  # the settings take their choices from the updates, so they import this module
    from hisvd.planning import Plan
    from hisvd.settings import CompressionSettings

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CompressionJob:
    """One model and its targets; `plans` and `writers` are keyed by target, `settings` are resolved."""

    checkpoint: Checkpoint
    cache: CalibrationCache
    settings: "CompressionSettings"
    plans: dict[float, "Plan"]
    writers: dict[float, ModelWriter]
    device: torch.device
    activation_budget: float = 0.0

    @property
    def whitening(self) -> str:
        """The metric of the factors."""
        assert self.settings.whitening is not None  # resolved
        return self.settings.whitening

    @property
    def export(self) -> Export:
        """What is done to the factors at once; the quality gate encodes linears later."""
        return EXPORTS["none" if self.settings.gated else self.settings.export]

    def encode(self, target: float, sublayer: Sublayer) -> Callable[[Entries, torch.Tensor | None], Entries] | None:
        """What makes codes of the sublayer's entries at once, given E[x xᵀ]; None: nothing does."""
        name = self.plans[target].dtypes.get(sublayer.name)
        return partial(integer_entries, name=name) if name else self.export.encode

    @property
    def encodes(self) -> bool:
        """Whether any entries are encoded at once."""
        return self.export.encode is not None or any(plan.dtypes for plan in self.plans.values())

    @property
    def fits_codes(self) -> bool:
        """Whether entries are encoded at once, fitted to the inputs."""
        plain = self.settings.export == "int6" and self.settings.int6_mode != "calibrated"
        return self.encodes and not plain

    def weight_dtype(self, target: float, sublayer: Sublayer, stored: torch.dtype) -> torch.dtype:
        """The dtype of a weight before it is encoded, if it is, where the checkpoint has `stored`."""
        if sublayer.name in self.plans[target].dtypes:
            return torch.float32
        halved = self.settings.budget == "bytes" and stored.itemsize > PLAIN_BYTES
        return torch.bfloat16 if halved or self.settings.linear_dtype == "bf16" else stored

    def changes(self, sublayers: list[Sublayer]) -> bool:
        """Whether any of the sublayers is factored, or has another shape, for any target."""
        return any(plan.changes(s) for plan in self.plans.values() for s in sublayers)

    def weighs(self, sublayers: list[Sublayer]) -> bool:
        """Whether any of the sublayers is factored, for any target, in the metric of its inputs."""
        return self.changes(sublayers) and WHITENINGS[self.whitening].inputs

    def shapes(self, target: float, index: int) -> dict[Sublayer, Shape]:
        """The shapes of the weights of layer `index` in the files of `target`."""
        plan, multiply = self.plans[target], self.export.multiply
        return {s: s.shape if multiply else plan.shape(s) for s in self.cache.sublayers_of(index)}

    def neurons_kept(self, target: float, members: list[Sublayer], statistics: Tensors) -> Kept | None:
        """Which neurons stay of the MLP that `members`, which share an input, belong to; None: there is none, or all.

        `statistics` are those of the layer, `removal_order` among them.
        """
        index = members[0].layer
        for mlp in self.cache.mlps_of(index):
            if members[0].path in (*mlp.inputs, mlp.output):
                output = next(s for s in self.cache.sublayers_of(index) if s.path == mlp.output)
                width = self.plans[target].shape(output)[1]
                if width < output.in_features:
                    order = statistics[f"{mlp.output}.removal_order"].to(self.device, torch.long)
                    longest = order.flip(0)
                    kept = longest[:width].sort().values
                    return Kept(kept, output, mlp.fused, members[0].path == mlp.output, longest)
        return None

    def config_changes(self, target: float, modules: dict[str, dict]) -> dict:
        """What config.json says of the compressed model: its table of `modules`, or its width if it is a stock one."""
        if modules:
            return config_entries(modules)
        shapes = self.plans[target].shapes
        if not (self.export.stock and shapes):
            return {}
        output = next(s for s in self.cache.sublayers if s.name in shapes and s.in_features != shapes[s.name][1])
        keys, config = adapter_for(self.checkpoint.empty).width_keys, self.checkpoint.config
        # GPT-2's is None where it follows from the hidden size; where MLPs differ in kind, others may go unused.
        known = [key for key in keys if getattr(config.get_text_config(), key, 0) in (None, output.in_features)]
        width = dict.fromkeys(known, shapes[output.name][1])
        stored = json.loads((self.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        # A model with vision keeps what describes its decoder apart.
        return {"text_config": stored["text_config"] | width} if "text_config" in stored else width

    def biases(self, members: list[Sublayer], stored: Tensors) -> Tensors:
        """The biases of those `members` that have one, by path, from the tensors of the layer in the checkpoint."""
        names = {s.path: f"{stored_prefix(self.checkpoint, s)}bias" for s in members}
        return {path: stored[name].to(self.device) for path, name in names.items() if name in stored}


class Case(NamedTuple):
    """Linears that share an input, for the targets that agree on their weights and inputs.

    `weights` holds W (m, n) by path inside the layer, without removed neurons, `dtype` is what the files store them in,
    `moment` is E[x xᵀ] (n, n) of their input in float64, `root` its damped Cholesky root where the metric needs it.
    `biases` holds the biases that change. `kept` are the neurons of their MLP that stay (None: all). `seen` holds the
    weights times the root, where several cases share it. `columns` (n,), if any: where the inputs are in the order that
    the weights and the root have them in, and `moment` has not.
    """

    targets: list[float]
    weights: dict[str, torch.Tensor]
    dtype: torch.dtype
    moment: torch.Tensor | None
    biases: Tensors | None = None
    root: torch.Tensor | None = None
    kept: Kept | None = None
    seen: Mapping[str, torch.Tensor] = MappingProxyType({})
    columns: torch.Tensor | None = None


def without_neurons(case: Case, kept: Kept | None, biases: Tensors, fits: OutputFits | None) -> Case:
    """`case` without the neurons that do not stay; `fits` are those of the MLP's output linear, if it is of the case.

    `biases` are those of the original linears. A root at the output linear is that of `fits`.
    """
    if kept is None:
        return case
    if not kept.at_output:
        rows = kept.rows
        weights = {path: weight[rows] for path, weight in case.weights.items()}
        seen = {path: product[rows] for path, product in case.seen.items()}
        return case._replace(weights=weights, seen=seen, kept=kept, biases={p: b[rows] for p, b in biases.items()})
    assert fits is not None  # it was asked for
    path, count = kept.output.path, len(kept.neurons)
    fit = fits.on(count)
    case = case._replace(
        kept=kept,
        moment=None if case.moment is None else case.moment[kept.neurons][:, kept.neurons],
        biases=None if fit.bias is None else {path: fit.bias},
    )
    if case.root is None:
        return case._replace(weights={path: fit.weight[:, kept.places]})
    root = case.root[:count, :count]
    seen = {path: fits.fits.seen[:, :count]} if case.root is fits.fits.root else {}
    return case._replace(weights={path: fit.weight}, root=root, seen=seen, columns=kept.places)


class Update(Protocol):
    """The interface of every choice of --update (hisvd.updates); methods are called in this order, layer by layer."""

    shares_layers: bool  # several processes share the layers; otherwise all work on each

    def start(self, index: int, stored: Tensors) -> Tensors:
        """Begin layer `index`, whose tensors in the checkpoint are `stored`; returns its statistics from the cache."""

    def cases(self, index: int, members: list[Sublayer], needs_moment: bool) -> Iterator[Case]:
        """The cases of the linears `members`, which share an input, with moments if asked for."""

    def place(self, target: float, sublayer: Sublayer, entries: Entries) -> None:
        """Receive what a sublayer has become."""

    def advance(self, index: int) -> None:
        """End layer `index`, all of whose sublayers have been placed."""


@torch.no_grad()
def factor_layer(job: CompressionJob, update: Update, index: int, stored: Tensors) -> dict[float, Tensors]:
    """The tensors of layer `index` for the files of every target, made from those of the checkpoint.

    Raises:
        HiSVDError: factors that are not finite, or a damaged cache.
    """
    shards = {target: dict(stored) for target in job.plans}
    statistics = update.start(index, stored)
    for members in job.cache.groups_of(index):
        weighed = job.weighs(members)
        for case in update.cases(index, members, weighed or job.fits_codes):
            if weighed and case.root is None:
                assert case.moment is not None  # it was asked for
                case = case._replace(root=cholesky_root(case.moment, H_DAMPING))
            for s in members:
                for target, entries in _results(job, case, s, statistics):
                    # Rounded like the files: later layers are fitted to what the saved model will compute.
                    update.place(target, s, entries)
                    if job.export.multiply:
                        kept = job.neurons_kept(target, [s], statistics)
                        entries = with_zeros(entries, s, kept) if kept else entries
                    replace_entries(job.checkpoint, s, shards[target], entries)
        for s in members:
            for ending in ("F", F_ROOT):
                statistics.pop(f"{s.path}.{ending}", None)  # large, and no later group needs them
    return shards


def _results(job: CompressionJob, case: Case, s: Sublayer, statistics: Tensors) -> Iterator[tuple[float, Entries]]:
    """The entries of sublayer `s` for every target of `case`; one decomposition serves them all."""
    weight = case.weights.pop(s.path)
    with naming(s.name):
        kinds: dict[tuple[str, torch.dtype], list[float]] = {}
        for target in case.targets:
            plan, dtype = job.plans[target], job.weight_dtype(target, s, case.dtype)
            if plan.is_dense(s):
                yield target, _finished(job, case, target, s, {"weight": weight.to(dtype)})
            else:
                kinds.setdefault((DENSE if job.export.multiply else plan.form_of(s), dtype), []).append(target)
        if not kinds:
            return
        ranks = {target: job.plans[target].ranks[s.name] for targets in kinds.values() for target in targets}
        kept = case.kept if WHITENINGS[job.whitening].outputs else None
        if kept is None or kept.at_output:
            f = output_moment(s, statistics, job.whitening, job.device)
        else:
            f = kept_outputs_moment(s, kept, statistics)
        factors = optimal_factors(weight, case.root, f, max(ranks.values()), case.seen.get(s.path))
        del f, weight
        for (form, dtype), targets in kinds.items():
            made = tensors_of_ranks(factors, [ranks[target] for target in targets], form, dtype, case.root)
            for target, entries in zip(targets, made, strict=True):
                yield target, _finished(job, case, target, s, entries)


def _finished(job: CompressionJob, case: Case, target: float, s: Sublayer, entries: Entries) -> Entries:
    """The entries with inputs in their own order, encoded, if they are, and with the bias, if it changes."""
    encode = job.encode(target, s)
    if case.columns is not None:
        inner = inner_key(entries)
        entries[inner] = entries[inner][:, case.columns]
    if encode:
        entries = encode(entries, case.moment if job.fits_codes else None)
    if case.biases and s.path in case.biases:
        entries["bias"] = case.biases[s.path].to(case.dtype)
    return entries
