"""Stream text through the model layer by layer and store what compression needs to know of each layer."""

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hisvd.calibration_cache import AGAIN as CALIBRATE_AGAIN
from hisvd.calibration_cache import MANIFEST, CalibrationCache, read_cache
from hisvd.errors import HiSVDError
from hisvd.estimates import shapes_of
from hisvd.gradient_pass import DRAWN, OutputGradientMoments, gradients_at_top, input_gradients
from hisvd.input_moments import InputMoments
from hisvd.layer_statistics import gradient_statistics, layer_statistics
from hisvd.settings import CalibrationSettings, Resources
from hisvd.stage_estimates import RunSizes, activation_bytes, cache_bytes
from hisvd.utils import distributed
from hisvd.utils.activation_files import AGAIN, ActivationFile, ActivationPair, is_reusable
from hisvd.utils.data_utils import (
    CALIBRATION_SPLIT,
    HELD_OUT_WINDOWS,
    calibration_tokens,
    check_vocabulary,
    default_batch_size,
    join_documents,
    leading_bos,
    load_documents,
    token_fingerprint,
    tokenize,
)
from hisvd.utils.files import check_disk, is_left_behind, locked, make_folder
from hisvd.utils.load_utils import check_tensors
from hisvd.utils.model_utils import (
    Checkpoint,
    check_calibratable,
    load_tokenizer,
    open_checkpoint,
    resolve_device,
    resolve_dtype,
    stored_dtype,
)
from hisvd.utils.progress import progress_bar, progress_shown
from hisvd.utils.streaming import Arguments, StreamedModel
from hisvd.utils.text_mixture import interleaved, shared_out, weighted_sources


def calibrate(
    model: str | os.PathLike,
    folder: str | os.PathLike,
    settings: CalibrationSettings = CalibrationSettings(),
    resources: Resources = Resources(),
) -> CalibrationCache:
    """Measure what compression needs to know of a model, once, with one decoder layer in memory at a time.

    The cache holds the second moment of every linear's input, on request that of its output gradient, the spectra that
    ranks are chosen from, and the tokens. A run that was interrupted resumes at its first missing layer; a finished
    cache is left as it is. Under torchrun the processes share the sequences.

    Args:
        model: A folder with safetensors and a tokenizer, or a Hub id.
        folder: The folder of this cache, made if need be. Each model and each set of settings needs its own.
        settings: The text, how much of it, and whether gradients are measured; `hisvd.CalibrationSettings` lists them.
        resources: Device, memory for hidden states, progress bars.

    Returns:
        The finished cache, for `hisvd.plan` and `hisvd.compress`, which take its folder as well.

    Raises:
        HiSVDError: the model, text or tokenizer cannot be used, or the model's tensors are not those of its
            configuration; the folder holds something else or a cache of other settings, or another run is at work on
            it; the disk is too small; weights, activations or gradients are not finite.

    Example:
        >>> import hisvd
        >>> settings = hisvd.CalibrationSettings(nsamples=128, seqlen=2048, dataset="wikitext2")
        >>> cache = hisvd.calibrate("models/llama-7b", "caches/llama-7b", settings)
        >>> cache.complete, cache.has_gradients
        (True, True)
    """
    check_shares(settings)
    model, folder, device = os.fspath(model), Path(folder), resolve_device(resources.device)
    checkpoint = open_checkpoint(model)
    check_calibratable(checkpoint.config, settings.seqlen, model)
    stored = stored_dtype(checkpoint.config)
    dtype = resolve_dtype(settings.dtype, device, stored) or stored
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
    with ExitStack() as locks:
        with distributed.first_alone():
            cache = open_or_create_cache(CalibrationCache(folder, identity, num_layers, options), locks)
            cache.write_tokens(tokens, held_out)
        if not cache.complete:
            batch_size = settings.batch_size or default_batch_size(settings.seqlen)
            streamed = StreamedModel(checkpoint, batch_size, device, dtype, 1e9 * resources.activation_budget_gb)
            check_tensors(checkpoint, streamed.skeleton)
            if distributed.is_first():
                shapes = shapes_of(streamed.skeleton)
                needed = cache_bytes(shapes, settings.gradients) + activation_bytes(shapes, sizes)
                check_disk([folder], needed, "Calibration")
            distributed.wait()
            with progress_shown(resources.progress):
                Calibration(streamed, tokens, cache).run()
        distributed.wait()
        if distributed.is_first():
            remove_working_files(folder)
    return cache


def check_shares(settings: CalibrationSettings) -> None:
    """Refuse to start more processes than there are sequences.

    Raises:
        HiSVDError: a process would have none.
    """
    if min(settings.nsamples, settings.gradient_windows or settings.nsamples) < distributed.count():
        raise HiSVDError(
            f"--nsamples {settings.nsamples} and --grad_nsamples {settings.grad_nsamples} must give each of the "
            f"{distributed.count()} processes at least one sequence; raise them, or start fewer processes."
        )


def calibration_text(checkpoint: Checkpoint, settings: CalibrationSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (nsamples, seqlen) to calibrate on, and windows (k, seqlen) of the same text held out from them.

    Several sources share the windows by their weights, and take turns in them.

    Raises:
        HiSVDError: a data set or the tokenizer cannot be read, a text is too short, or a source would get no window.
    """
    tokenizer, sources = load_tokenizer(checkpoint.folder), weighted_sources(settings.dataset)
    bos = leading_bos(checkpoint.config, tokenizer)
    shares = list(sources.values())
    counts = [shared_out(number, shares) for number in (settings.nsamples, HELD_OUT_WINDOWS)]
    found = []
    for name, nsamples, held_out in zip(sources, *counts, strict=True):
        if not nsamples:
            raise HiSVDError(
                f"--nsamples {settings.nsamples} leaves no window for {name}; raise it, or raise the source's weight."
            )
        documents = load_documents(name, CALIBRATION_SPLIT, settings.data_dir)
        ids = tokenize(join_documents(documents, tokenizer), tokenizer)
        check_vocabulary(ids, checkpoint.config, str(checkpoint.folder))
        windows, kept = calibration_tokens(ids, replace(settings, dataset=name, nsamples=nsamples), bos)
        found.append((windows, kept[:held_out]))
    windows, held_out = map(torch.cat, zip(*found, strict=True))
    return windows[interleaved(counts[0])], held_out


def _shown(cache: CalibrationCache, key: str) -> str:
    """A part of a cache's identity for a message, fingerprints by what they are of."""
    value = str(cache.identity.get(key))
    return f"{cache.options.get(FINGERPRINTS[key][1])}, fingerprint {value[:12]}" if key in FINGERPRINTS else value


def open_or_create_cache(cache: CalibrationCache, locks: ExitStack) -> CalibrationCache:
    """The cache that the folder of the empty `cache` already holds, else `cache` itself, newly written.

    Unless it is complete, the first of several processes locks the folder until `locks` is closed.

    Raises:
        HiSVDError: the folder holds a cache of other settings, or something else, or cannot be written, or another run
            is at work on it.
    """
    folder, manifest = cache.folder, cache.folder / MANIFEST
    if not manifest.exists():
        make_folder(folder)
        if not all(HALF_WRITTEN.fullmatch(path.name) or path.name == LOCK for path in folder.iterdir()):
            raise HiSVDError(
                f"{folder} exists and is not a calibration cache; choose another --model_name or --output_dir."
            )
    is_complete = manifest.exists() and read_cache(folder).complete
    if distributed.is_first() and (not is_complete or is_left_behind(folder / LOCK)):
        locks.enter_context(locked(folder / LOCK, str(folder)))
    if not manifest.exists():
        cache.write_manifest()
        return cache
    found = read_cache(folder)
    for key, value in cache.identity.items():
        if found.identity.get(key) != value:
            what, _ = FINGERPRINTS.get(key, (key, ""))
            raise HiSVDError(
                f"The cache {folder} was made with another {what} ({_shown(found, key)}, now {_shown(cache, key)}); "
                "choose another --model_name or --output_dir, or delete that folder."
            )
    if found.num_layers != cache.num_layers:
        raise HiSVDError(
            f"{manifest} says that the model has {found.num_layers} decoder layers, not {cache.num_layers}; "
            f"{CALIBRATE_AGAIN}."
        )
    return found


class Turns:
    """Deals layers out to the processes: each keeps the moments of one, then all decompose theirs at the same time."""

    def __init__(self, cache: CalibrationCache, add: Callable[[list[dict]], None], layers: int) -> None:
        """For so many `layers` of `cache`, to whose manifest `add` adds what it says of them."""
        self.cache, self.add, self.left = cache, add, layers
        self.dealt, self.mine = 0, list[Callable[[], dict]]()

    def take(self, write: Callable[[], dict]) -> None:
        """One more layer; `write` writes its file and returns its entry in the manifest."""
        if self.dealt == distributed.index():
            self.mine.append(write)
        self.dealt, self.left = self.dealt + 1, self.left - 1
        if self.dealt < distributed.count() and self.left:
            return
        entries = distributed.gathered(json.dumps(self.mine.pop()()) if self.mine else "")
        self.dealt = 0
        if distributed.is_first():
            self.add([json.loads(entry) for entry in entries if entry])
        distributed.wait()
        if not distributed.is_first():
            self.cache.refresh()


class Calibration:
    """One calibration run: the model layer by layer, the tokens, and the files that hold their states.

    Memory: one decoder layer, its moments and one batch. Hidden states and gradients pass through files in the cache
    folder. A killed run resumes at its first missing layer; where its files are missing, or there are several
    processes, whose files may be a few layers ahead, the tokens first pass through the finished layers.
    """

    def __init__(self, streamed: StreamedModel, tokens: torch.Tensor, cache: CalibrationCache) -> None:
        """Prepare for tokens (sequences, seqlen), of which every process takes its share."""
        self.streamed, self.tokens, self.cache = streamed, distributed.share(tokens), cache
        # Drawn for all sequences at once, so that they do not depend on batches and processes.
        windows = cache.identity["grad_nsamples"]
        shape = (windows, tokens.shape[1] - 1, DRAWN + 1)
        self.draws = distributed.share(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
        self.gradient_tokens = self.tokens[: len(self.draws)]
        self.hidden = self._pair("hidden", self.tokens)
        points = range(cache.num_layers + 1) if windows else ()
        # What the gradient pass needs from the forward pass: the inputs of every layer and the outputs of the last.
        self.kept = [streamed.file(self._path(f"inputs_{i:03d}", ".bin"), self.gradient_tokens) for i in points]

    def run(self) -> None:
        """Add to the cache what it does not hold yet.

        Raises:
            HiSVDError: missing or non-finite weights, or non-finite activations.
        """
        if distributed.is_first():
            remove_working_files(self.cache.folder, keep_processes=distributed.count())
        distributed.wait()
        self.forward_pass()
        if self.cache.has_gradients:
            self.gradient_pass()

    def forward_pass(self) -> None:
        """Moments of the inputs."""
        streamed, cache, first = self.streamed, self.cache, len(self.cache.layers)
        arguments, turns = self._resume_forward(), Turns(cache, cache.add_layers, cache.num_layers - first)
        for index in _progress("calibrating layers", first, cache.num_layers):
            layer, name = streamed.layer(index), streamed.layer_name(index)
            moments = InputMoments(layer, name, streamed.adapter)
            outputs = streamed.outputs(layer, index, self.hidden[index], arguments[index], moments.add_batch)
            self.hidden[index + 1].write(outputs, self._kept(index + 1))
            moments.finish()
            turns.take(partial(self._layer_entry, layer, name, index, moments))

    def _layer_entry(self, layer: nn.Module, name: str, index: int, moments: InputMoments) -> dict:
        tensors, sublayers = layer_statistics(layer, name, index, moments)
        return self.cache.write_layer(index, tensors, sublayers, self.streamed.adapter.mlps_of(layer))

    def _resume_forward(self) -> list[list[Arguments]]:
        """Provide what the first missing layer reads; returns the arguments of all layers, finished ones included."""
        streamed, done = self.streamed, len(self.cache.layers)
        unfinished = done < self.cache.num_layers
        needed = [*self.kept[: done + 1], *([self.hidden[done]] if unfinished else [])]
        if done and distributed.count() == 1 and all(file.is_whole() for file in needed):
            return streamed.embed(self.tokens, None) if unfinished else []
        # Not into the run's own files: after a kill in between they would pass for those of layer `done`.
        files = self._pair(f"hidden{AGAIN}", self.tokens) if done else self.hidden
        arguments = streamed.embed(self.tokens, files[0], self._kept(0))
        for index in _progress("repeating finished layers", 0, done):
            outputs = streamed.outputs(streamed.layer(index), index, files[index], arguments[index])
            files[index + 1].write(outputs, self._kept(index + 1))
        if done:
            files.move_to(self.hidden, done)
        return arguments

    def gradient_pass(self) -> None:
        """Moments of the output gradients, from the top down."""
        streamed, cache = self.streamed, self.cache
        gradients = self._pair("gradient", self.gradient_tokens)
        arguments = streamed.embed(self.gradient_tokens, None)
        first = len(cache.gradients)
        self._resume_backward(gradients, arguments)
        turns = Turns(cache, cache.add_gradients, cache.num_layers - first)
        for done in _progress("gradients of layers", first, cache.num_layers):
            index = cache.num_layers - 1 - done
            layer = streamed.layer(index)
            moments = self._descend(layer, index, gradients, arguments)
            moments.finish()
            turns.take(partial(self._gradients_entry, layer, index, moments))

    def _gradients_entry(self, layer: nn.Module, index: int, moments: OutputGradientMoments) -> dict:
        return self.cache.write_gradients(index, gradient_statistics(layer, self.cache, index, moments))

    def _resume_backward(self, gradients: ActivationPair, arguments: list[list[Arguments]]) -> None:
        """Provide the gradients that the first missing layer starts from."""
        streamed, top, done = self.streamed, self.cache.num_layers, len(self.cache.gradients)
        if done and distributed.count() == 1 and gradients[top - done].is_whole():
            return
        files = self._pair(f"gradient{AGAIN}", self.gradient_tokens) if done else gradients
        with streamed.outside_weights():
            hidden = streamed.read(self.kept[top])
            files[top].write(gradients_at_top(streamed, hidden, self.gradient_tokens, self.draws))
        for index in _progress("repeating finished gradients", 0, done):
            self._descend(streamed.layer(top - 1 - index), top - 1 - index, files, arguments)
        if done:
            files.move_to(gradients, top - done)

    def _descend(
        self, layer: nn.Module, index: int, gradients: ActivationPair, arguments: list[list[Arguments]]
    ) -> OutputGradientMoments:
        """Take the gradients through layer `index`; returns this process's sums."""
        streamed = self.streamed
        moments = OutputGradientMoments(layer, streamed.adapter.sublayer_paths(layer))
        inputs, above = streamed.read(self.kept[index]), streamed.read(gradients[index + 1])
        name = streamed.layer_name(index)
        gradients[index].write(input_gradients(layer, name, moments, inputs, arguments[index], above))
        return moments

    def _path(self, name: str, suffix: str = "") -> Path:
        return self.cache.folder / f"{distributed.own_name(name)}{suffix}"

    def _pair(self, name: str, tokens: torch.Tensor) -> ActivationPair:
        return self.streamed.pair(self._path(name), tokens)

    def _kept(self, index: int) -> ActivationFile | None:
        return self.kept[index] if self.kept else None


def _progress(title: str, done: int, total: int) -> Iterable[int]:
    return progress_bar(range(done, total), title, total=total, initial=done)


# In a cache's identity: what they are of, and the option that says where that came from.
FINGERPRINTS = {"model": ("model", "model_path"), "data": ("text", "dataset"), "held_out": ("held-out text", "dataset")}
# Names of the files that a run or a kill leaves in the cache folder besides the cache itself: Calibration's hidden
# states and gradients, and half-written files of utils.files.
LOCK = ".lock"  # of the run that is at work on the folder
ONE_OF = r"(_\d+_of_\d+)?"
ACTIVATIONS = re.compile(rf"((hidden|gradient)({AGAIN})?{ONE_OF}_(even|odd)|inputs_\d{{3,}}{ONE_OF})\.bin")
HALF_WRITTEN = re.compile(r"\.hisvd_probe_\d+|\.(manifest\.json|(tokens|(layer|gradients)_\d{3,})\.safetensors)\.tmp")


def remove_working_files(folder: Path, keep_processes: int = 0) -> None:
    """Delete what runs have left in a cache folder besides the cache, and nothing else.

    Files with which a run of `keep_processes` processes can resume are kept.
    """
    for path in folder.iterdir():
        activations = ACTIVATIONS.fullmatch(path.name)
        is_stale_lock = path.name == LOCK and not keep_processes  # the cache is complete, so no run is at work on it
        is_outdated = activations and not is_reusable(path, keep_processes)
        if is_stale_lock or is_outdated or HALF_WRITTEN.fullmatch(path.name):
            path.unlink(missing_ok=True)
