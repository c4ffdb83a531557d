"""Stream text through the model layer by layer and store what compression needs to know of each layer."""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hisvd.calibration_cache import MANIFEST, CalibrationCache, read_cache
from hisvd.component.adapter import Adapter
from hisvd.component.families import adapter_for
from hisvd.errors import HiSVDError
from hisvd.shape_utils import Sublayer
from hisvd.utils.files import make_folder
from hisvd.utils.model_utils import Checkpoint, empty_model
from hisvd.utils.streaming import (
    ActivationFile,
    first_inputs,
    layer_outputs,
    load_layer,
    load_outside_layers,
)
from hisvd.whitening_svd import left_singular_vectors, singular_values, whitened

LEADING_VECTORS = 64  # right singular vectors of W that the cache keeps


class InputMoments:
    """Σ x xᵀ over tokens for every distinct input tensor of a layer's linears.

    Hooks note the tensor each linear receives; linears that receive the same tensor (by identity) share one
    moment, summed in float32 within a batch and float64 across batches.
    """

    def __init__(self, layer: nn.Module, paths: list[str]) -> None:
        self.groups: list[list[str]] = []
        self.moments: list[torch.Tensor] = []
        self.tokens = 0
        self._seen: list[tuple[str, torch.Tensor]] = []
        self._hooks = [layer.get_submodule(p).register_forward_pre_hook(self._noting(p)) for p in paths]

    def _noting(self, path: str):  # noqa: ANN202 (a hook's closure)
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            self._seen.append((path, args[0].detach()))

        return hook

    def add_batch(self) -> None:
        """Add what the hooks noted during one forward."""
        groups: list[tuple[list[str], torch.Tensor]] = []
        for path, x in self._seen:
            same = next((paths for paths, y in groups if y.data_ptr() == x.data_ptr() and y.shape == x.shape), None)
            if same is None:
                groups.append(([path], x))
            else:
                same.append(path)
        self._seen.clear()
        if not self.groups:
            self.groups = [paths for paths, _ in groups]
            self.moments = [x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float64) for _, x in groups]
        for moment, (_, x) in zip(self.moments, groups, strict=True):
            rows = x.reshape(-1, x.shape[-1]).float()
            moment += rows.T @ rows
        self.tokens += rows.shape[0]

    def remove_hooks(self) -> None:
        """Take the hooks off the layer."""
        for hook in self._hooks:
            hook.remove()


def calibrate(
    checkpoint: Checkpoint,
    tokens: torch.Tensor,
    cache: CalibrationCache,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fill `cache` layer by layer from tokens (sequences, seqlen); continues behind its finished layers.

    Memory: one decoder layer, its moments and one batch; hidden states pass through two files in the cache
    folder, so that a killed run resumes at its first missing layer.

    Raises:
        HiSVDError: missing or non-finite weights, or non-finite activations.
    """
    shape = (*tokens.shape, checkpoint.config.get_text_config().hidden_size)
    files = [ActivationFile(cache.folder / f"hidden_{parity}.bin", shape, dtype) for parity in ("even", "odd")]
    if not cache.complete:
        _calibrate_missing_layers(checkpoint, tokens, cache, files, batch_size, device, dtype)
    for file in files:
        file.path.unlink(missing_ok=True)


def _calibrate_missing_layers(
    checkpoint: Checkpoint,
    tokens: torch.Tensor,
    cache: CalibrationCache,
    files: list[ActivationFile],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Layer k reads its inputs from files[k % 2] and writes its outputs to the other one."""
    model = empty_model(checkpoint.config)
    adapter = adapter_for(model)
    load_outside_layers(model, adapter, checkpoint, device, dtype)
    hidden, arguments = first_inputs(model, adapter, tokens, batch_size, device)
    start = len(cache.layers) if files[len(cache.layers) % 2].is_whole() else 0
    if start == 0:
        cache.layers.clear()
        files[0].write(tqdm(hidden, "embedding", len(tokens.split(batch_size)), leave=False))
    else:
        for _ in hidden:  # only the layers' arguments are missing
            pass
    model.base_model.to("meta")

    layers = range(start, cache.num_layers)
    for index in tqdm(layers, "calibrating layers", cache.num_layers, initial=start):
        layer = load_layer(model, adapter, index, checkpoint, device, dtype)
        name = f"{adapter.layers}.{index}"
        moments = InputMoments(layer, adapter.sublayer_paths(layer))
        inputs = files[index % 2].read(batch_size, device)
        files[(index + 1) % 2].write(layer_outputs(layer, name, inputs, arguments[index], moments.add_batch))
        moments.remove_hooks()
        groups = named_groups(adapter, moments.groups, name)
        cache.add_layer(*layer_statistics(layer, name, index, groups, moments))


def named_groups(adapter: Adapter, observed: list[list[str]], layer_name: str) -> dict[str, list[str]]:
    """Name the observed groups of linears that share an input: by the adapter, else by their first member.

    Raises:
        HiSVDError: the adapter's groups are not what the layer does.
    """
    if not adapter.inputs:
        return {paths[0]: paths for paths in observed}
    expected = {group: list(paths) for group, paths in adapter.inputs.items()}
    if sorted(map(sorted, expected.values())) != sorted(map(sorted, observed)):
        raise HiSVDError(
            f"In {layer_name} the linears that share an input are {observed}, not {list(expected.values())} as the "
            f"'{adapter.family}' adapter says; this version of transformers changed the family."
        )
    return expected


def layer_statistics(
    layer: nn.Module, layer_name: str, index: int, groups: dict[str, list[str]], moments: InputMoments
) -> tuple[dict[str, torch.Tensor], list[Sublayer]]:
    """The cache tensors of one layer (float32, CPU) and its sublayers in order.

    Per input group: `{group}.eigenvalues` (n,) and `{group}.eigenvectors` (n, n) of H = E[x xᵀ], undamped.
    Per sublayer: `{type}.singular_values` of W and `{type}.whitened_singular_values` of W H^{1/2}, both
    (min(m, n),), largest first, and `{type}.Vh`, the leading right singular vectors of W as rows.
    """
    tensors: dict[str, torch.Tensor] = {}
    sublayers = []
    for group, paths in groups.items():
        position = next(i for i, observed in enumerate(moments.groups) if paths[0] in observed)
        eigenvalues, eigenvectors = torch.linalg.eigh(moments.moments[position] / moments.tokens)
        moments.moments[position] = None  # free the largest tensors as early as possible
        tensors[f"{group}.eigenvalues"], tensors[f"{group}.eigenvectors"] = eigenvalues, eigenvectors
        for path in paths:
            weight = layer.get_submodule(path).weight
            sublayers.append(Sublayer(f"{layer_name}.{path}", index, path, group, *weight.shape))
            tensors[f"{path}.singular_values"] = singular_values(weight)
            tensors[f"{path}.whitened_singular_values"] = singular_values(whitened(weight, eigenvalues, eigenvectors))
            tensors[f"{path}.Vh"] = left_singular_vectors(weight.T)[:, :LEADING_VECTORS].T
    return {name: t.float().cpu() for name, t in tensors.items()}, sublayers


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
