"""Fit the factors, layer by layer, to the inputs that the compressed model really sees.

With x the input of a linear in the original model and x' the one behind the compressed layers below, the weight that
best repeats the original outputs is W E[x x'ᵀ] E[x' x'ᵀ]⁻¹. The target of the factors goes a part μ of that way, and
linears that write into the residual stream also make good a part γ of the error e that the stream has there already:

    T = W + (μ W E[(x − x') x'ᵀ] + γ E[e x'ᵀ]) E[x' x'ᵀ]⁻¹

Source of the first term: the asymmetric calibration of GPTAQ, arXiv 2504.02692; MPIFA, arXiv 2501.19090, mixes by μ.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from hisvd.calibration_cache import CalibrationCache, input_moment, output_moment
from hisvd.component.experts import is_routed
from hisvd.component.low_rank import swap_linears
from hisvd.errors import naming
from hisvd.factor_forms import factor_tensors, modules_of
from hisvd.int6_fit import int6_entries
from hisvd.shape_utils import Sublayer, is_dense
from hisvd.utils import distributed
from hisvd.utils.data_utils import default_batch_size
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.streaming import ActivationFile, Arguments, StreamedModel
from hisvd.whitening_svd import H_DAMPING, cholesky_root, left_singular_vectors, low_rank_factors, whitened

MU = 0.5  # part of the way to the original outputs
GAMMA = 0.5  # part of the residual stream's error that is made good
RIDGE = 1e-1  # added to E[x' x'ᵀ] before it is inverted, as a fraction of its mean diagonal entry


class UpdateMoments(NamedTuple):
    """Means over tokens, float64: own E[x' x'ᵀ] (n, n), lag E[(x − x') x'ᵀ] (n, n), stream E[e x'ᵀ] (hidden, n).

    `stream` is measured where a linear that reads x' writes into the residual stream. An expert has `own` alone, from
    the original model: the compressed one sends it other tokens, which have no counterpart.
    """

    own: torch.Tensor
    lag: torch.Tensor | None = None
    stream: torch.Tensor | None = None


def update_target(
    weight: torch.Tensor, own_root: torch.Tensor, moments: UpdateMoments, mu: float, gamma: float
) -> torch.Tensor:
    """T of the module's formula in float64, for W (m, n) and the Cholesky root of the damped E[x' x'ᵀ]."""
    change = mu * (weight.double() @ moments.lag)
    if gamma:
        change += gamma * moments.stream
    # Not cholesky_solve: that copies the root.
    change = torch.linalg.solve_triangular(own_root.T, change, upper=True, left=False)
    return weight.double() + torch.linalg.solve_triangular(own_root, change, upper=False, left=False)


class _Reached(Exception):
    """A forward has come to the linear that was waited for."""


def input_and_stream(
    layer: nn.Module, path: str, stream_paths: tuple[str, ...], hidden: torch.Tensor, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `layer` up to its linear `path`; what arrives there (tokens, n), and the residual stream (tokens, hidden).

    The residual stream is the layer's input plus the outputs so far of the linears that write into it.
    """
    stream, arrived = [hidden], []

    def stop(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        arrived.append(args[0])
        raise _Reached

    handles = [layer.get_submodule(path).register_forward_pre_hook(stop)]
    for writer in stream_paths:
        handles.append(layer.get_submodule(writer).register_forward_hook(lambda _, __, y: stream.append(y)))
    args, kwargs = arguments
    try:
        with suppress(_Reached):
            layer(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return arrived[0].flatten(0, -2).float(), sum(stream).flatten(0, -2).float()


class SequentialUpdate:
    """The calibration tokens on their way through the original layers and, for every target, the compressed ones.

    Several processes share the tokens; from the sums of their moments all of them make the same factors.

    Memory: one decoder layer and its moments for the original and for every target, and one batch. Hidden states
    pass through files in the partial folders of the outputs, so that a killed run goes on at its first missing layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: CalibrationCache,
        folders: dict[float, Path],
        first_layer: int,
        device: torch.device,
        activation_budget: float = 0,
    ) -> None:
        """Bring the streams of all targets in `folders` to `first_layer`, or to layer 0 if their files are gone.

        Raises:
            HiSVDError: the cache's tokens are damaged, or weights are missing or not finite.
        """
        self.checkpoint, self.cache, self.device = checkpoint, cache, device
        tokens = distributed.share(cache.read_tokens())
        batch_size = default_batch_size(tokens.shape[1])
        self.streamed = StreamedModel(checkpoint, batch_size, device, cache.dtype, activation_budget)
        self.adapter = self.streamed.adapter

        def stream_files(path: Path) -> list[ActivationFile]:
            names = [distributed.own_name(f"{path.name}_{parity}") for parity in (0, 1)]
            return [self.streamed.file(path.with_name(f"{name}.bin"), tokens) for name in names]

        self.original = stream_files(next(iter(folders.values())) / "original")
        self.compressed = {target: stream_files(folder / "hidden") for target, folder in folders.items()}
        whole = all(files[first_layer % 2].is_whole() for files in self._all_files())
        self.first_layer = first_layer if distributed.everywhere(whole) else 0
        hidden, self.arguments = self.streamed.first_inputs(tokens)
        if self.first_layer:
            for _ in hidden:  # only the layers' arguments are missing
                pass
        else:
            self.original[0].write(hidden)
            for files in self.compressed.values():
                shutil.copyfile(self.original[0].path, files[0].path)

    @torch.no_grad()
    def factor_layer(
        self,
        index: int,
        ranks: dict[float, dict[str, int]],
        stored: dict[str, torch.Tensor],
        form: str,
        whitening: str,
        export: str,
        int6_mode: str,
    ) -> Iterator[tuple[float, Sublayer, dict[str, torch.Tensor]]]:
        """Yield (target, sublayer, state dict entries) for decoder layer `index`, then take all streams through it.

        Entries have the dtype that `stored`, the layer's tensors of the checkpoint, has for the weight. A sublayer
        that is not factored gets a new weight.
        """
        original = self.streamed.layer(index)
        layers = {target: self.streamed.layer(index) for target in self.compressed}
        routed = any(is_routed(s.path) for s in self.cache.sublayers_of(index))
        statistics = self.cache.read_layer(index) if routed else self.cache.read_backward(index)

        def entries(s: Sublayer, weight: torch.Tensor, rank: int, own: torch.Tensor, root: torch.Tensor | None) -> dict:
            # In a scope of its own: F and the factors, as large as the moments, are gone before the next measurement.
            dtype = stored[self.checkpoint.stored_name(f"{s.name}.weight")].dtype
            tensors = {"weight": weight.to(dtype)}
            if not is_dense(rank, s.shape, form):
                f = output_moment(s, statistics, whitening, self.device)
                factors = low_rank_factors(weight, left_singular_vectors(whitened(weight, root, f)), rank, f)
                with naming(s.name):
                    tensors = factor_tensors(*factors, "dense" if export == "dense" else form, dtype, root)
            return int6_entries(tensors, own if int6_mode == "calibrated" else None) if export == "int6" else tensors

        for members in self.cache.groups_of(index):
            if is_routed(members[0].path):
                own = input_moment(members[0], statistics, self.device)
                measured = dict.fromkeys(layers, UpdateMoments(own))
            else:
                measured = self._measure(index, original, layers, members)
            for target, layer in layers.items():
                weights = self._updated(layer, members, measured[target])
                own = measured.pop(target).own
                root = cholesky_root(own, H_DAMPING) if whitening != "none" else None
                for s in members:
                    tensors = entries(s, weights.pop(s.path), ranks[target][s.name], own, root)
                    swap_linears(layer, modules_of(s.path, tensors))
                    layer.get_submodule(s.path).load_state_dict(tensors, strict=False)
                    yield target, s, tensors
            for s in members:
                statistics.pop(f"{s.path}.F_eigenvectors", None)  # large, and no later group needs them
        self._advance(index, original, self.original)
        for target, files in self.compressed.items():
            self._advance(index, layers[target], files)

    def _updated(self, layer: nn.Module, members: list[Sublayer], moments: UpdateMoments) -> dict[str, torch.Tensor]:
        """The weights that the factors of `members`, which share an input, are to come close to, by type."""
        weights = {s.path: layer.get_submodule(s.path).weight for s in members}
        if moments.lag is None:
            return weights
        root, writers = cholesky_root(moments.own, RIDGE), self.adapter.stream
        return {t: update_target(w, root, moments, MU, GAMMA if t in writers else 0) for t, w in weights.items()}

    def _measure(
        self, index: int, original: nn.Module, layers: dict[float, nn.Module], group: list[Sublayer]
    ) -> dict[float, UpdateMoments]:
        """The moments at the input that `group` shares in layer `index`, behind linears with their new weights."""
        path, writers = group[0].path, self.adapter.stream
        sums: dict[float, list[torch.Tensor]] = {}
        streams = [self.streamed.read(files[index % 2]) for files in self._all_files()]
        tokens = 0
        for arguments, hidden, *compressed in zip(self.arguments[index], *streams, strict=True):
            x, stream = input_and_stream(original, path, writers, hidden, arguments)
            tokens += len(x)
            for (target, layer), hidden_c in zip(layers.items(), compressed, strict=True):
                x_c, stream_c = input_and_stream(layer, path, writers, hidden_c, arguments)
                left = [x_c, x - x_c] + [stream - stream_c] * any(s.path in writers for s in group)
                if target not in sums:
                    sums[target] = [x.new_zeros(a.shape[1], x.shape[1], dtype=torch.float64) for a in left]
                for total, a in zip(sums[target], left, strict=True):
                    total += a.T @ x_c
        tokens = int(distributed.total(torch.tensor(tokens)))
        return {
            target: UpdateMoments(*(distributed.total(m).div_(tokens) for m in moments))
            for target, moments in sums.items()
        }

    def _all_files(self) -> list[list[ActivationFile]]:
        return [self.original, *self.compressed.values()]

    def _advance(self, index: int, layer: nn.Module, files: list[ActivationFile]) -> None:
        outputs = self.streamed.outputs(layer, index, files[index % 2], self.arguments[index])
        files[(index + 1) % 2].write(outputs)
