"""Fit the factors, layer by layer, to the inputs that the compressed model actually sees.

With x the input of a linear in the original model and x' its input after the compressed layers below, the weight that
best reproduces the original outputs is W E[x x'ᵀ] E[x' x'ᵀ]⁻¹. The factors' target goes a fraction μ of that way, and
linears that write into the residual stream also correct a fraction γ of the error e already present in the stream:

    T = W + (μ W E[(x − x') x'ᵀ] + γ E[e x'ᵀ]) E[x' x'ᵀ]⁻¹

Source of the first term: the asymmetric calibration of GPTAQ, arXiv 2504.02692; MPIFA, arXiv 2501.19090, mixes by μ.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hisvd.cached_moments import input_moment
from hisvd.component.experts import is_routed
from hisvd.factor_forms import Entries
from hisvd.factoring import Case, CompressionJob, Tensors, without_neurons
from hisvd.layer_tensors import compressed_layer, place_entries, stored_prefix
from hisvd.narrowing import Fit, output_fits
from hisvd.shape_utils import Sublayer
from hisvd.utils import distributed
from hisvd.utils.activation_files import AGAIN, ActivationPair, is_reusable
from hisvd.utils.data_utils import default_batch_size
from hisvd.utils.files import writing
from hisvd.utils.progress import progress_bar
from hisvd.utils.save_utils import WORK_FILES
from hisvd.utils.streaming import Arguments, StreamedModel
from hisvd.whitening_svd import cholesky_root, gram

MU = 0.5  # fraction of the way to the original outputs
GAMMA = 0.5  # fraction of the residual stream's error that is corrected
ORIGINAL = "original"  # beginning of the names of files with the original model's hidden states
RIDGE = 1e-1  # added to E[x' x'ᵀ] before it is inverted, as a fraction of its mean diagonal entry


class UpdateMoments(NamedTuple):
    """Means over tokens, float64: own E[x' x'ᵀ] (n, n), lag E[(x − x') x'ᵀ] (n, n), stream E[e x'ᵀ] (hidden, n).

    `stream` is measured where a linear that reads x' writes into the residual stream. The output linear of an MLP that
    has lost neurons has `residual` E[(W x − B x') x'ᵀ] (m, k) instead of `lag`: x has more entries than x', and B is
    its re-fit. An expert has `own` alone, from the original model: the compressed one routes other tokens to it, which
    have no counterpart.
    """

    own: torch.Tensor
    lag: torch.Tensor | None = None
    stream: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def update_target(
    weight: torch.Tensor, own_root: torch.Tensor, moments: UpdateMoments, mu: float, gamma: float
) -> torch.Tensor:
    """T of the module's formula in float64, for W (m, n) and the Cholesky root of the damped E[x' x'ᵀ].

    Where neurons are removed, W is the re-fit B.
    """
    if moments.residual is None:
        assert moments.lag is not None  # not an expert
        change = mu * (weight.double() @ moments.lag)
    else:
        change = mu * moments.residual
    if gamma:
        assert moments.stream is not None
        change += gamma * moments.stream
    # Not cholesky_solve: that copies the root.
    change = torch.linalg.solve_triangular(own_root.T, change, upper=True, left=False)
    return weight.double() + torch.linalg.solve_triangular(own_root, change, upper=False, left=False)


class _Reached(Exception):
    """Raised when a forward pass reaches the linear of interest."""


def input_and_stream(
    layer: nn.Module, path: str, stream_paths: tuple[str, ...], hidden: torch.Tensor, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `layer` up to its linear `path`; what arrives there (tokens, n), and the residual stream (tokens, hidden).

    The residual stream is the layer's input plus the outputs so far of the linears that write into it.
    """
    written: list[torch.Tensor] = []
    arrived: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        arrived.append(args[0])
        raise _Reached

    handles = [layer.get_submodule(path).register_forward_pre_hook(stop)]
    for writer in stream_paths:
        handles.append(layer.get_submodule(writer).register_forward_hook(lambda _, __, y: written.append(y)))
    args, kwargs = arguments
    try:
        with suppress(_Reached):
            layer(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return arrived[0].flatten(0, -2), sum(written, hidden).flatten(0, -2)


class SequentialUpdate:
    """Runs the calibration tokens through the dense layers and, for every target, the compressed ones.

    Several processes share the tokens; from the sums of their moments they all compute the same factors.

    Memory: one decoder layer and its moments for the dense model and for every target, and one batch. Hidden states
    pass through files in the partial folders of the outputs. A killed run resumes at its first missing layer; where
    the files are missing, the tokens first pass through the finished layers.
    """

    shares_layers = False

    def __init__(self, job: CompressionJob, first_layer: int) -> None:
        """Bring the streams of all targets to `first_layer`.

        Raises:
            HiSVDError: the cache's tokens are damaged, or weights are missing or not finite.
        """
        self.job, self.cache, self.device = job, job.cache, job.device
        self.tokens = distributed.share(job.cache.read_tokens())
        batch_size = default_batch_size(self.tokens.shape[1])
        self.streamed = StreamedModel(job.checkpoint, batch_size, job.device, job.cache.dtype, job.activation_budget)
        self.adapter = self.streamed.adapter
        self._use_streams()
        # The files of a target that is further ahead hold hidden states of another layer.
        in_step = all(writer.shards_done() <= first_layer + 1 for writer in job.writers.values())
        if distributed.is_first():
            for place, writer in enumerate(job.writers.values()):
                for path in filter(lambda path: WORK_FILES.fullmatch(path.name), writer.work.glob("*.bin")):
                    # The original's states are in the first folder; a run of fewer targets may leave some elsewhere.
                    is_misplaced = place > 0 and path.name.startswith(ORIGINAL)
                    if is_misplaced or not is_reusable(path, distributed.count()):
                        path.unlink()
        distributed.wait()  # until all have checked
        whole = first_layer > 0 and in_step and all(stream[first_layer].is_whole() for stream in self._all_streams())
        if distributed.everywhere(whole):
            self.arguments = self.streamed.embed(self.tokens, None)
        else:
            self._begin(first_layer)

    def _use_streams(self, suffix: str = "") -> None:
        """Let the hidden states pass through the files with `suffix` in their names."""

        def pair(folder: Path, name: str) -> ActivationPair:
            return self.streamed.pair(folder / distributed.own_name(name + suffix), self.tokens)

        folders = {target: writer.work for target, writer in self.job.writers.items()}
        self.dense_stream = pair(next(iter(folders.values())), ORIGINAL)
        self.streams = {target: pair(folder, "hidden") for target, folder in folders.items()}

    def _begin(self, first_layer: int) -> None:
        """Embed the tokens, and take them through the layers below `first_layer`, which are finished."""
        own = self._all_streams()
        if first_layer:  # not into the run's own files: after a kill they would pass for that layer's
            self._use_streams(AGAIN)
        self.arguments = self.streamed.embed(self.tokens, self.dense_stream[0])
        for stream in self.streams.values():
            with writing(stream[0].path):
                shutil.copyfile(self.dense_stream[0].path, stream[0].path)
        for index in progress_bar(range(first_layer), "repeating finished layers", leave=False):
            self.dense_layer = self.streamed.layer(index)
            self.layers = {
                target: compressed_layer(self.streamed, index, self.job.shapes(target, index), writer.read_shard(index))
                for target, writer in self.job.writers.items()
            }
            self.advance(index)
        if first_layer:
            for repeated, stream in zip(self._all_streams(), own, strict=True):
                repeated.move_to(stream, first_layer)
            self._use_streams()

    def start(self, index: int, stored: Tensors) -> Tensors:
        """Load the layer, and the gradients' statistics of it (those of the inputs too where they are needed)."""
        self.stored = stored
        self.dense_layer = self.streamed.layer(index)
        self.layers = {target: self.streamed.layer(index) for target in self.streams}
        sublayers = self.cache.sublayers_of(index)
        needed = any(is_routed(s.path) or s.name in plan.shapes for plan in self.job.plans.values() for s in sublayers)
        self.statistics = self.cache.read_layer(index) if needed else self.cache.read_backward(index)
        return self.statistics

    def cases(self, index: int, members: list[Sublayer], needs_moment: bool) -> Iterator[Case]:
        """One case per target: weights moved towards what the compressed inputs need, and those inputs' moment."""
        first, routed = members[0].path, is_routed(members[0].path)
        weights: dict[str, torch.Tensor] = {s.path: self.dense_layer.get_parameter(f"{s.path}.weight") for s in members}
        biases = self.job.biases(members, self.stored)
        kept = {target: self.job.neurons_kept(target, members, self.statistics) for target in self.layers}
        narrow = next((k for k in kept.values() if k and k.at_output), None)
        of_output = narrow and output_fits(weights[first], biases.get(first), narrow, self.statistics)
        fits: dict[float, Fit] = {}
        if routed:
            own = input_moment(members[0], self.statistics, self.device)
            measured = dict.fromkeys(self.layers, UpdateMoments(own))
        else:
            for target, k in kept.items():
                if k and of_output:
                    on_kept = of_output.on(len(k.neurons))
                    fits[target] = on_kept._replace(weight=on_kept.weight[:, k.places])
            of_output = None  # large
            measured = self._measure(index, members, fits)
        dtype = self.stored[f"{stored_prefix(self.job.checkpoint, members[0])}weight"].dtype
        for target in self.layers:
            moments, fit = measured.pop(target), fits.get(target)
            case = Case([target], self._updated({first: fit.weight} if fit else weights, moments), dtype, moments.own)
            del moments  # lag and stream are as large as the moment that is still needed
            if fit:
                yield case._replace(biases=None if fit.bias is None else {first: fit.bias})
            else:
                yield without_neurons(case, kept[target], biases, of_output)

    def place(self, target: float, sublayer: Sublayer, entries: Entries) -> None:
        """Put the result into the compressed layer, which the next measurements run through."""
        place_entries(self.layers[target], sublayer, self.job.plans[target].shape(sublayer), entries)

    def advance(self, index: int) -> None:
        """Take all streams through layer `index`, and drop it."""
        self._through(index, self.dense_layer, self.dense_stream)
        for target, stream in self.streams.items():
            self._through(index, self.layers[target], stream)
        del self.dense_layer, self.layers

    def _updated(self, weights: dict[str, torch.Tensor], moments: UpdateMoments) -> dict[str, torch.Tensor]:
        """What the factors of `weights`, by path, of linears that share an input are to come close to."""
        if moments.lag is None and moments.residual is None:
            return dict(weights)
        root, writers = cholesky_root(moments.own, RIDGE), self.adapter.stream
        return {p: update_target(w, root, moments, MU, GAMMA if p in writers else 0) for p, w in weights.items()}

    def _measure(self, index: int, group: list[Sublayer], fits: dict[float, Fit]) -> dict[float, UpdateMoments]:
        """The moments at the input that `group` shares in layer `index`, after linears with their new weights.

        `fits` holds the output linears on fewer neurons, of the targets that have one here.
        """
        path, writers = group[0].path, self.adapter.stream
        sums: dict[float, dict[str, torch.Tensor]] = {target: {} for target in self.layers}
        linear: Any = self.dense_layer.get_submodule(path)
        dense = Fit(linear.weight, linear.bias)
        batches = [self.streamed.read(stream[index]) for stream in self._all_streams()]
        tokens = 0
        for arguments, hidden, *compressed in zip(self.arguments[index], *batches, strict=True):
            x, stream = input_and_stream(self.dense_layer, path, writers, hidden, arguments)
            tokens += len(x)
            for (target, layer), hidden_c in zip(self.layers.items(), compressed, strict=True):
                x_c, stream_c = input_and_stream(layer, path, writers, hidden_c, arguments)
                left = {"own": x_c}
                if target in fits:
                    left["residual"] = dense.outputs(x.float()) - fits[target].outputs(x_c.float())
                else:
                    left["lag"] = x.float() - x_c.float()
                if any(s.path in writers for s in group):
                    left["stream"] = stream.float() - stream_c.float()
                if not sums[target]:
                    sums[target] = {
                        name: x.new_zeros(a.shape[1], x_c.shape[1], dtype=torch.float64) for name, a in left.items()
                    }
                for name, a in left.items():
                    sums[target][name] += gram(x_c) if a is x_c else a.T @ x_c.float()
        tokens = int(distributed.total(torch.tensor(tokens)))
        return {
            target: UpdateMoments(**{name: distributed.total(m).div_(tokens) for name, m in moments.items()})
            for target, moments in sums.items()
        }

    def _all_streams(self) -> list[ActivationPair]:
        return [self.dense_stream, *self.streams.values()]

    def _through(self, index: int, layer: nn.Module, stream: ActivationPair) -> None:
        stream[index + 1].write(self.streamed.outputs(layer, index, stream[index], self.arguments[index]))
