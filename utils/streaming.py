"""Run a decoder layer by layer, one layer in memory, its hidden states on disk.

Any family works: the model's own forward prepares the masks and position embeddings, and the layer's own
forward uses them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hisvd.component.adapter import Adapter
from hisvd.component.coded_linears import CODED_LINEARS, check_buffers
from hisvd.component.families import adapter_for
from hisvd.component.int6_linear import FEW_TOKENS
from hisvd.errors import HiSVDError
from hisvd.utils.activation_files import ActivationFile, ActivationPair
from hisvd.utils.memory import release_freed_memory
from hisvd.utils.model_utils import Checkpoint, empty_model
from hisvd.utils.progress import progress_bar

Arguments = tuple[tuple, dict[str, Any]]  # what a decoder layer receives besides the hidden states


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Within the context, replace each module's forward by the given one; on exit, even after errors, restore them."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def decoder_layers(model: PreTrainedModel, adapter: Adapter) -> nn.ModuleList:
    """The decoder layers of `model`."""
    layers = model.get_submodule(adapter.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def run_layer(layer: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """The hidden states after decoder layer `layer`, which some families' layers return in a tuple."""
    args, kwargs = arguments
    output = layer(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


class StreamedModel:
    """A causal language model with one decoder layer at a time in memory, or what lies outside the layers.

    Batches have `batch_size` sequences and live on `device` in `dtype`. Its activation files, in the order in which
    they are requested, are also held in memory while they take at most `activation_budget` bytes in all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        activation_budget: float = 0,
    ) -> None:
        """Build the model without weights."""
        self.checkpoint, self.batch_size, self.device, self.dtype = checkpoint, batch_size, device, dtype
        self._memory_left = activation_budget
        self._files: dict[tuple[Path, torch.Size], ActivationFile] = {}
        self.skeleton = empty_model(checkpoint.config)
        self.adapter = adapter_for(self.skeleton)
        inside = set(self._layers().modules())
        for module in self.skeleton.modules():
            if module not in inside:
                for key, buffer in module.named_buffers(recurse=False):
                    module._buffers[key] = buffer.to(device)

    @contextmanager
    def outside_weights(self) -> Iterator[None]:
        """Within the context, load the weights outside the decoder layers: embeddings, final norm, head.

        Raises:
            HiSVDError: a weight is missing or not finite.
        """
        names = {
            name: self.checkpoint.stored_name(name)
            for name, _ in self.skeleton.named_parameters()
            if not name.startswith(f"{self.adapter.layers}.")
        }
        ties = getattr(self.skeleton, "all_tied_weights_keys", {})
        tied = {name for name in ties if names.get(name) not in self.checkpoint.files}
        self._load_weights(self.skeleton, self._stored({k: v for k, v in names.items() if k not in tied}))
        self.skeleton.tie_weights()
        try:
            yield
        finally:
            meta = {name: self.skeleton.get_parameter(name).to("meta") for name in names}
            self.skeleton.load_state_dict(meta, strict=False, assign=True)
            self.skeleton.tie_weights()

    def _layers(self) -> nn.ModuleList:
        return decoder_layers(self.skeleton, self.adapter)

    def _load_weights(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Fill meta parameters and buffers of `module` in place with `tensors`, by their names there."""
        # Their scales are part of a format, as permutations are integers.
        linears = ((name, part) for name, part in module.named_modules() if isinstance(part, CODED_LINEARS))
        fixed = {f"{name}.{part.scale_name}" for name, part in linears}
        weights = {}
        for name, tensor in tensors.items():
            cast = tensor.is_floating_point() and name not in fixed
            weights[name] = tensor.to(self.device, self.dtype if cast else None)
        module.load_state_dict(weights, strict=False, assign=True)
        module.requires_grad_(False)

    def layer_name(self, index: int) -> str:
        """The path of decoder layer `index` in the model."""
        return f"{self.adapter.layers}.{index}"

    def layer(self, index: int) -> nn.Module:
        """A copy of decoder layer `index` with its weights; dropping it frees them.

        Raises:
            HiSVDError: a weight is missing, not finite or, in codes, damaged.
        """
        release_freed_memory()
        layer, prefix = self.empty_layer(index), self.layer_name(index)
        names = {name: self.checkpoint.stored_name(f"{prefix}.{name}") for name in layer.state_dict()}
        computed = {name for name, _ in layer.named_buffers() if names.get(name) not in self.checkpoint.files}
        return self.filled(layer, index, self._stored({k: v for k, v in names.items() if k not in computed}))

    def empty_layer(self, index: int) -> nn.Module:
        """A copy of decoder layer `index` without weights, to be changed and `filled`."""
        return copy.deepcopy(self._layers()[index])

    def filled(self, layer: nn.Module, index: int, tensors: dict[str, torch.Tensor]) -> nn.Module:
        """`layer`, a copy of decoder layer `index`, with `tensors`, by their names in it.

        Raises:
            HiSVDError: codes are damaged.
        """
        self._load_weights(layer, tensors)
        check_buffers(layer, f"{self.layer_name(index)}.")
        return layer.to(self.device)

    def _stored(self, names: dict[str, str]) -> dict[str, torch.Tensor]:
        """Tensors of the checkpoint by names of ours; `names` maps each to the name in the files."""
        tensors = self.checkpoint.read(names.values())
        return {name: tensors[stored] for name, stored in names.items()}

    def file(self, path: Path, tokens: torch.Tensor) -> ActivationFile:
        """The file at `path` for a hidden state per token of `tokens` (sequences, seqlen)."""
        key = path, tokens.shape
        if key not in self._files:
            width = self.checkpoint.config.get_text_config().hidden_size
            size = tokens.numel() * width * self.dtype.itemsize
            self._files[key] = ActivationFile(path, (*tokens.shape, width), self.dtype, size <= self._memory_left)
            self._memory_left -= size if size <= self._memory_left else 0
        return self._files[key]

    def read(self, file: ActivationFile) -> Iterator[torch.Tensor]:
        """Consecutive batches of a file."""
        return file.read(self.batch_size, self.device)

    def pair(self, path: Path, tokens: torch.Tensor, keep_first: bool = False) -> ActivationPair:
        """The pair of files `path`_even.bin and `path`_odd.bin, with `keep_first` `path`_first.bin beside them."""
        names = ("even", "odd", *(["first"] if keep_first else []))
        return ActivationPair(*(self.file(path.with_name(f"{path.name}_{n}.bin"), tokens) for n in names))

    @torch.no_grad()
    def embed(
        self, tokens: torch.Tensor, target: ActivationFile | None, head: ActivationFile | None = None
    ) -> list[list[Arguments]]:
        """Write the first decoder layer's hidden states for `tokens`; returns the other arguments of every layer.

        Runs the model's own forward with decoder layers that only record their arguments. Without a `target` (a run
        that resumes has its hidden states) nothing is written; `head` also receives the first sequences. The
        result is [layer][batch]; equal arguments are kept once, so that masks and position embeddings take the memory
        of one batch.
        """
        layers = self._layers()
        calls: list[list[Arguments]] = [[] for _ in layers]
        known: list[Arguments] = []
        first: list[torch.Tensor] = []

        def recorder(index: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, arguments = _split(args, kwargs)
                if index == 0:
                    first.append(hidden)
                calls[index].append(_known_equal(arguments, known))
                return as_returned(hidden)

            return forward

        def embedded() -> Iterator[torch.Tensor]:
            batches = tokens.split(self.batch_size)
            for batch in progress_bar(batches, "embedding", leave=False):
                self.skeleton.base_model(input_ids=batch.to(self.device), use_cache=False)
                yield first.pop()

        forwards = {layer: recorder(index) for index, layer in enumerate(layers)}
        with self.outside_weights():
            as_returned = self._as_returned
            with replaced_forwards(forwards):
                if target:
                    target.write(embedded(), head)
                else:
                    for _ in embedded():
                        pass
        return calls

    def outputs(
        self,
        layer: nn.Module,
        index: int,
        inputs: ActivationFile,
        arguments: list[Arguments],
        after_batch: Callable[[], None] = lambda: None,
    ) -> Iterator[torch.Tensor]:
        """Run all batches through `layer`, decoder layer `index`; `after_batch` is called after each forward.

        Raises:
            HiSVDError: an output is not finite; the layer is named.
        """
        for hidden, others in zip(self.read(inputs), arguments, strict=True):
            with torch.no_grad():
                output = run_layer(layer, hidden, others)
            if not torch.isfinite(output).all():
                raise HiSVDError(
                    f"The activations after {self.layer_name(index)} are NaN or infinite; check the checkpoint, "
                    "or use --dtype float32."
                )
            after_batch()
            yield output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of the last decoder layer's outputs (tokens, hidden), differentiable.

        Call it inside `outside_weights`. The model's own forward runs with the decoder layers bypassed, so final norm,
        head and logit scaling are the family's. Every token is a sequence of its own, because a single sequence could
        have more tokens than the model has learned positions.
        """
        result = self._as_returned(hidden[:, None])
        dummy = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with replaced_forwards(dict.fromkeys(self._layers(), lambda *args, **kwargs: result)):
            return self.skeleton(input_ids=dummy, use_cache=False).logits[:, 0]

    @cached_property
    def _as_returned(self) -> Callable[[torch.Tensor], Any]:
        """The function that gives hidden states the form in which decoder layers return them: bare, or in a tuple.

        Found by running the first layer, on enough tokens that INT6 linears do not compile their product for few
        tokens. Call it inside `outside_weights`, before layers are replaced.
        """
        layers, first, outputs = self._layers(), self.layer(0), []

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs.append(first(*args, **kwargs))
            return outputs[0]

        others = dict.fromkeys(layers, lambda *args, **kwargs: outputs[0])
        with torch.no_grad(), replaced_forwards(others | {layers[0]: forward}):
            ids = torch.zeros(1, FEW_TOKENS + 1, dtype=torch.long, device=self.device)
            self.skeleton.base_model(input_ids=ids, use_cache=False)
        output = outputs[0]
        return (lambda hidden: (hidden, *output[1:])) if isinstance(output, tuple) else (lambda hidden: hidden)


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Arguments]:
    """The hidden states among the arguments of a decoder layer, and the others."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def _known_equal(arguments: Arguments, known: list[Arguments]) -> Arguments:
    """An equal one among the last few of `known`, else `arguments` itself, which is then added."""
    for candidate in known[-4:]:
        if _equal(arguments, candidate):
            return candidate
    known.append(arguments)
    return arguments


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a == b
