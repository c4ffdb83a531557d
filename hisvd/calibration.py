"""Stream text through the model layer by layer and store what compression needs to know of each layer."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hisvd.calibration_cache import MANIFEST, CalibrationCache, input_moment, read_cache
from hisvd.component.adapter import Adapter
from hisvd.errors import HiSVDError
from hisvd.gradient_pass import OutputGradientMoments, gradients_at_top, input_gradients
from hisvd.rare_experts import pool_rare
from hisvd.shape_utils import Sublayer
from hisvd.utils import distributed
from hisvd.utils.activation_files import ActivationFile, ActivationPair
from hisvd.utils.files import make_folder
from hisvd.utils.progress import progress_bar
from hisvd.utils.streaming import StreamedModel
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


class InputMoments:
    """Σ x xᵀ over tokens for every distinct input tensor of a layer's linears.

    Hooks note the tensor each linear receives; linears that receive the same tensor (by identity) share one
    moment, summed in float32 within a batch and float64 across batches. `groups` names them by the adapter, else by
    their first member.
    """

    def __init__(self, layer: nn.Module, layer_name: str, adapter: Adapter) -> None:
        self.layer_name, self.adapter = layer_name, adapter
        self.groups = {name: list(paths) for name, paths in adapter.groups(layer).items()}
        self.moments: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        for name, paths in self.groups.items():
            self._start(name, layer.get_submodule(paths[0]).weight)
        self._seen: list[tuple[str, torch.Tensor]] = []
        for path in adapter.sublayer_paths(layer):
            layer.get_submodule(path).register_forward_pre_hook(self._noting(path))

    def _start(self, group: str, like: torch.Tensor) -> None:
        self.moments[group] = like.new_zeros(like.shape[-1], like.shape[-1], dtype=torch.float64)
        self.tokens[group] = 0

    def _noting(self, path: str):  # noqa: ANN202 (a hook's closure)
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            self._seen.append((path, args[0].detach()))

        return hook

    def add_batch(self) -> None:
        """Add what the hooks noted during one forward.

        Raises:
            HiSVDError: the adapter's groups are not what the layer does.
        """
        observed: list[tuple[list[str], torch.Tensor]] = []
        for path, x in self._seen:
            same = next((paths for paths, y in observed if y.data_ptr() == x.data_ptr() and y.shape == x.shape), None)
            if same is None:
                observed.append(([path], x))
            else:
                same.append(path)
        self._seen.clear()
        for paths, x in observed:
            group = self._name(paths)
            if group not in self.moments:
                self._start(group, x)
            rows = x.reshape(-1, x.shape[-1]).float()
            self.moments[group] += rows.T @ rows
            self.tokens[group] += rows.shape[0]

    def _name(self, paths: list[str]) -> str:
        name = next((n for n, members in self.groups.items() if sorted(members) == sorted(paths)), None)
        if name is None and self.adapter.inputs:
            raise HiSVDError(
                f"In {self.layer_name} the linears that share an input are {paths}, which the '{self.adapter.family}' "
                f"adapter does not say; this version of transformers changed the family."
            )
        if name is None:
            name = paths[0]
            self.groups[name] = paths
        return name

    def finish(self) -> None:
        """Make the moments and the counts of tokens those of all processes, and pool those of rare experts.

        Raises:
            HiSVDError: a linear that every token should reach was not called.
        """
        self.moments = {group: distributed.total(moment) for group, moment in self.moments.items()}
        self.tokens = {group: int(distributed.total(torch.tensor(count))) for group, count in self.tokens.items()}
        rare = pool_rare(self.moments, self.tokens)
        if rare and distributed.is_first():
            names = ", ".join(rare)
            tqdm.write(f"{self.layer_name}: too few tokens reach {names}; all experts' moments stand in.", sys.stderr)
        for group, count in self.tokens.items():
            if not count:
                raise HiSVDError(
                    f"In {self.layer_name} nothing calls {self.groups[group]}, as the '{self.adapter.family}' adapter "
                    "says; this version of transformers changed the family."
                )


class Calibration:
    """One calibration run: the model a layer at a time, the tokens, and the files that carry them from layer to layer.

    Memory: one decoder layer, its moments and one batch. Hidden states and gradients pass through files in the cache
    folder, so that a killed run resumes at its first missing layer.
    """

    def __init__(self, streamed: StreamedModel, tokens: torch.Tensor, cache: CalibrationCache) -> None:
        """Prepare for tokens (sequences, seqlen), of which every process takes its share."""
        self.streamed, self.tokens, self.cache = streamed, distributed.share(tokens), cache

    def run(self) -> None:
        """Fill the cache, behind what it holds already.

        Raises:
            HiSVDError: missing or non-finite weights, or non-finite activations.
        """
        self.forward_pass()
        if self.cache.has_gradients:
            self.gradient_pass()

    def forward_pass(self) -> None:
        """Moments of the inputs."""
        streamed, tokens, cache = self.streamed, self.tokens, self.cache
        hidden = self._pair("hidden", tokens)
        if not cache.layers or not distributed.everywhere(hidden[len(cache.layers)].is_whole()):
            cache.layers.clear()
            arguments = streamed.embed(tokens, hidden[0], self._kept(0))
        elif len(cache.layers) < cache.num_layers:
            arguments = streamed.embed(tokens, None)
        for index in _progress("calibrating layers", len(cache.layers), cache.num_layers):
            layer, name = streamed.layer(index), streamed.layer_name(index)
            moments = InputMoments(layer, name, streamed.adapter)
            outputs = streamed.outputs(layer, index, hidden[index], arguments[index], moments.add_batch)
            hidden[index + 1].write(outputs, self._kept(index + 1))
            moments.finish()
            if distributed.is_first():
                cache.add_layer(*layer_statistics(layer, name, index, moments))
            self._wait_for_the_first()

    def gradient_pass(self) -> None:
        """Moments of the output gradients, from the top down."""
        streamed, cache = self.streamed, self.cache
        count = cache.identity["grad_nsamples"]
        # Drawn for all sequences at once: the same whatever the batches and the processes are.
        draws = torch.rand(count, self.tokens.shape[1] - 1, generator=torch.Generator().manual_seed(0))
        draws = distributed.share(draws)
        tokens = self.tokens[: len(draws)]
        gradients = self._pair("gradient", tokens, 2)
        arguments = streamed.embed(tokens, None)
        todo = cache.num_layers - len(cache.gradients)
        if not cache.gradients or not distributed.everywhere(gradients[todo].is_whole()):
            cache.gradients.clear()
            top = streamed.read(self._kept(cache.num_layers))
            with streamed.outside_weights():
                gradients[cache.num_layers].write(gradients_at_top(streamed, top, tokens, draws))
        for done in _progress("gradients of layers", len(cache.gradients), cache.num_layers):
            index = cache.num_layers - 1 - done
            layer, name = streamed.layer(index), streamed.layer_name(index)
            moments = OutputGradientMoments(layer, streamed.adapter.sublayer_paths(layer))
            inputs, above = (streamed.read(file) for file in (self._kept(index), gradients[index + 1]))
            gradients[index].write(input_gradients(layer, name, moments, inputs, arguments[index], above))
            moments.finish()
            if distributed.is_first():
                cache.add_gradients(gradient_statistics(layer, cache, index, moments))
            self._wait_for_the_first()

    def _wait_for_the_first(self) -> None:
        """The first process has written a layer: the others learn of it."""
        distributed.wait()
        if not distributed.is_first():
            self.cache.refresh()

    def _pair(self, name: str, tokens: torch.Tensor, side_by_side: int = 1) -> ActivationPair:
        return self.streamed.pair(self.cache.folder / distributed.own_name(name), tokens, side_by_side)

    def _kept(self, index: int) -> ActivationFile | None:
        """The inputs of layer `index` that the gradient pass will need."""
        count = self.cache.identity["grad_nsamples"]
        mine = len(distributed.share(torch.empty(count)))
        path = self.cache.folder / f"{distributed.own_name(f'inputs_{index:03d}')}.bin"
        return self.streamed.file(path, self.tokens[:mine]) if count else None


def _progress(title: str, done: int, total: int) -> Iterable[int]:
    return progress_bar(range(done, total), title, total=total, initial=done)


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
        moment = moments.moments.pop(group).div_(moments.tokens[group])  # popped: the largest tensors go early
        tensors[f"{group}.eigenvalues"], tensors[f"{group}.eigenvectors"] = map(_stored, torch.linalg.eigh(moment))
        root = cholesky_root(moment, H_DAMPING)
        for path in paths:
            weight = layer.get_submodule(path).weight
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
            f = torch.linalg.eigh(moments.moments.pop(path).div_(moments.tokens))
            tensors[f"{path}.F_eigenvalues"], tensors[f"{path}.F_eigenvectors"] = map(_stored, f)
            a = whitened(layer.get_submodule(path).weight, root, damped(*f, F_DAMPING))
            tensors[f"{path}.two_sided_singular_values"] = _stored(singular_values(a))
    return tensors


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().cpu().contiguous()


def open_or_create_cache(folder: Path, identity: dict, options: dict, num_layers: int) -> CalibrationCache:
    """The cache in `folder`, to be filled or continued.

    Raises:
        HiSVDError: the folder holds a cache of other settings, or something else, or cannot be written.
    """
    if (folder / MANIFEST).exists():
        cache = read_cache(folder)
        for key, value in identity.items():
            if cache.identity.get(key) != value:
                raise HiSVDError(
                    f"The cache {folder} was made with another {key} ({cache.identity.get(key)}, now {value}); "
                    "choose another --model_name or --output_dir, or delete that folder."
                )
        return cache
    make_folder(folder)
    if any(folder.iterdir()):
        raise HiSVDError(f"{folder} exists and is no calibration cache; choose another --model_name or --output_dir.")
    cache = CalibrationCache(folder, identity, num_layers, options)
    cache.write_manifest()
    return cache
