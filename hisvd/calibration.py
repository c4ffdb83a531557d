"""Stream text through the model layer by layer and store what compression needs to know of each layer."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from hisvd.calibration_cache import MANIFEST, CalibrationCache, read_cache
from hisvd.errors import HiSVDError
from hisvd.estimates import RunSizes, activation_bytes, cache_bytes, shapes_of
from hisvd.gradient_pass import OutputGradientMoments, gradients_at_top, input_gradients
from hisvd.input_moments import InputMoments
from hisvd.layer_statistics import gradient_statistics, layer_statistics
from hisvd.settings import CalibrationSettings, Resources
from hisvd.utils import distributed
from hisvd.utils.activation_files import ActivationFile, ActivationPair
from hisvd.utils.data_utils import (
    CALIBRATION_SPLIT,
    calibration_tokens,
    default_batch_size,
    leading_bos,
    load_text,
    token_fingerprint,
    tokenize,
)
from hisvd.utils.files import check_disk, make_folder
from hisvd.utils.load_utils import check_layer_count
from hisvd.utils.model_utils import Checkpoint, load_tokenizer, open_checkpoint, resolve_device, resolve_dtype
from hisvd.utils.progress import progress_bar, progress_shown
from hisvd.utils.streaming import StreamedModel


def calibrate(
    model: str | os.PathLike,
    folder: str | os.PathLike,
    settings: CalibrationSettings = CalibrationSettings(),
    resources: Resources = Resources(),
) -> CalibrationCache:
    """Measure what compression needs to know of a model, with one decoder layer in memory at a time.

    `model` is a folder with safetensors or a Hub id, `folder` the cache's own, made if need be. A run that was
    interrupted resumes at its first missing layer, and a finished cache is left alone. Several processes (torchrun)
    share the sequences.

    Returns:
        the finished cache.

    Raises:
        HiSVDError: the model, text or tokenizer cannot be used, or the model's files hold more layers than its
            configuration; the folder holds something else or a cache of other settings; the disk is too small;
            weights, activations or gradients are not finite.
    """
    check_shares(settings)
    model, folder, device = os.fspath(model), Path(folder), resolve_device(resources.device)
    checkpoint = open_checkpoint(model)
    stored = checkpoint.config.dtype or torch.bfloat16
    dtype = resolve_dtype(settings.dtype, device, stored)
    tokens, held_out = calibration_text(checkpoint, settings)
    sizes = RunSizes(settings.nsamples, settings.gradient_windows, settings.seqlen, dtype, stored)
    identity = {
        "model": checkpoint.fingerprint(),
        "data": token_fingerprint(tokens),
        "held_out": token_fingerprint(held_out),
        "nsamples": sizes.nsamples,
        "grad_nsamples": sizes.grad_nsamples,
        "seqlen": sizes.seqlen,
        "dtype": str(dtype),
    }
    options = {"model_path": model, "dataset": settings.dataset, "sampling": settings.sampling, "seed": settings.seed}
    num_layers = checkpoint.config.get_text_config().num_hidden_layers
    with distributed.first_alone():
        cache = open_or_create_cache(CalibrationCache(folder, identity, num_layers, options))
        cache.write_tokens(tokens, held_out)
    if not cache.complete:
        batch_size = settings.batch_size or default_batch_size(settings.seqlen)
        streamed = StreamedModel(checkpoint, batch_size, device, dtype, 1e9 * resources.activation_budget_gb)
        check_layer_count(checkpoint, streamed.skeleton, streamed.adapter.layers)
        if distributed.is_first():
            shapes = shapes_of(streamed.skeleton)
            needed = cache_bytes(shapes, settings.gradients) + activation_bytes(shapes, sizes)
            check_disk([folder], needed, "Calibration")
        distributed.wait()
        with progress_shown(resources.progress):
            Calibration(streamed, tokens, cache).run()
    distributed.wait()
    if distributed.is_first():
        cache.remove_activations()
    return cache


def check_shares(settings: CalibrationSettings) -> None:
    """Refuse to start more processes than there are sequences.

    Raises:
        HiSVDError: a process would have none.
    """
    if min(settings.nsamples, settings.gradient_windows or settings.nsamples) < distributed.count():
        raise HiSVDError(
            f"--nsamples {settings.nsamples} and --grad_nsamples {settings.grad_nsamples} must give each of the "
            f"{distributed.count()} processes a sequence; raise them, or start fewer processes."
        )


def calibration_text(checkpoint: Checkpoint, settings: CalibrationSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (nsamples, seqlen) to calibrate on, and windows (k, seqlen) of the same text held out from them.

    Raises:
        HiSVDError: the data set or the tokenizer cannot be read, or the text is too short.
    """
    text = load_text(settings.dataset, CALIBRATION_SPLIT, settings.data_dir)
    tokenizer = load_tokenizer(checkpoint.folder)
    return calibration_tokens(tokenize(text, tokenizer), settings, leading_bos(checkpoint.config, tokenizer))


def open_or_create_cache(cache: CalibrationCache) -> CalibrationCache:
    """What the folder of the empty `cache` holds of it already, else the cache itself, newly written.

    Raises:
        HiSVDError: the folder holds a cache of other settings, or something else, or cannot be written.
    """
    folder = cache.folder
    if (folder / MANIFEST).exists():
        found = read_cache(folder)
        for key, value in cache.identity.items():
            if found.identity.get(key) != value:
                raise HiSVDError(
                    f"The cache {folder} was made with another {key} ({found.identity.get(key)}, now {value}); "
                    "choose another --model_name or --output_dir, or delete that folder."
                )
        return found
    make_folder(folder)
    if any(folder.iterdir()):
        raise HiSVDError(
            f"{folder} exists and is not a calibration cache; choose another --model_name or --output_dir."
        )
    cache.write_manifest()
    return cache


class Calibration:
    """One calibration run: the model a layer at a time, the tokens, and the files that carry them from layer to layer.

    Memory: one decoder layer, its moments and one batch. Hidden states and gradients pass through files in the cache
    folder, so that a killed run resumes at its first missing layer.
    """

    def __init__(self, streamed: StreamedModel, tokens: torch.Tensor, cache: CalibrationCache) -> None:
        """Prepare for tokens (sequences, seqlen), of which every process takes its share."""
        self.streamed, self.tokens, self.cache = streamed, distributed.share(tokens), cache

    def run(self) -> None:
        """Add to the cache what it does not hold yet.

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
