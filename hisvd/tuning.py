"""Train the layers of a compressed model, so that it predicts what the original does.

Adafactor (arXiv 1804.04235), without momentum, lowers the KL divergence of its predictions from the original's on the
calibration text, read once. A layer's state lies on disk between its turns. Sources: knowledge distillation, arXiv
1503.02531, on all weights of the layers; Norm Tweaking, arXiv 2309.02784, on the gains of the norms alone.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from hisvd.errors import HiSVDError
from hisvd.factoring import CompressionJob, Tensors
from hisvd.layer_tensors import compressed_layer, norm_gains, stored_prefix
from hisvd.schema import NUMBER, SIZE, one_of
from hisvd.utils import distributed
from hisvd.utils.eval_utils import tokens_at_once
from hisvd.utils.files import read_json, write_json, write_tensors
from hisvd.utils.model_folders import open_safetensors
from hisvd.utils.progress import progress_bar
from hisvd.utils.save_utils import ModelWriter
from hisvd.utils.streaming import Arguments, StreamedModel, decoder_layers, run_layer

TOKENS_PER_STEP = 2048  # at least
MAX_STEPS = 48  # each reads and writes all that is trained
# Of the first step; they fall to zero like a cosine.
GAIN_RATE = {"norms": 5e-3, "weights": 1e-3}  # as a fraction of a norm's gain, by what is refined
WEIGHT_RATE = 1e-4  # as a fraction of the root mean square of a weight's entries
DECAY = 0.95  # of the running means, per step
TINIEST = 1e-30  # squared gradient that counts
# The schema of tuning.json.
FIGURES = {
    "steps": SIZE,
    "divergences": [NUMBER],
    "divergence_before?": NUMBER,
    "divergence_after?": NUMBER,
    "written": one_of(False, True),
}


class Batch(NamedTuple):
    """Sequences: embedded, after the original's last layer, and what each layer gets besides hidden states."""

    embedded: torch.Tensor
    wanted: torch.Tensor
    arguments: tuple[Arguments, ...]


def tune(job: CompressionJob, target: float, writer: ModelWriter) -> dict:
    """Replace what `refine` names in the shards of `writer`; returns what the report says of it.

    If the divergence on held-out text is not lower in the end, the shards stay as they were. Memory: one decoder layer
    with its gradients, and for one step's tokens their hidden states at every layer. Disk: see `state_bytes`. A killed
    run resumes at the step that it was in. Several processes share the tokens of every step.

    Raises:
        HiSVDError: nothing of the layers can be trained, the loss is not finite, a working file is damaged, or see
            StreamedModel.
    """
    tuning = Tuning(job, target, writer)
    figures, steps = tuning.figures, tuning.num_steps
    if not {"divergence_before", "divergence_after"} <= figures.keys():
        tuning.run_original()
        if "divergence_before" not in figures:
            tuning.record(divergence_before=tuning.held_out_divergence())
        with progress_bar(None, f"tuning {job.settings.refine}", total=steps, initial=tuning.done) as bar:
            for batches in itertools.islice(tuning.steps(), tuning.done, steps):
                tuning.step(batches)
                bar.set_postfix(divergence=figures["divergences"][-1])
                bar.update()
        tuning.record(divergence_after=tuning.held_out_divergence())
    helps = figures["divergence_after"] < figures["divergence_before"]
    if helps and not figures["written"]:
        tuning.write()
    return {name: figures[name] for name in ("divergence_before", "divergence_after", "divergences")} | {"kept": helps}


def steps_for(sequences: int, seqlen: int, processes: int = 1) -> tuple[int, int, int]:
    """Sequences per batch, batches per step, and steps, where each of the processes has its share of the sequences."""
    batch_size = max(1, TOKENS_PER_STEP // (processes * seqlen))
    batches = -(-sequences // (processes * batch_size))  # of the process with the most
    batches_per_step = -(-batches // MAX_STEPS)
    return batch_size, batches_per_step, -(-batches // batches_per_step)


def zero_squares(value: torch.Tensor) -> Tensors:
    """The `squares` of `adafactor_step` before the first step."""
    sizes = {"rows": (len(value), 1), "columns": (1, value.shape[1])} if value.dim() == 2 else {"entries": value.shape}
    return {kind: value.new_zeros(size) for kind, size in sizes.items()}


def adafactor_step(
    value: torch.Tensor, gradient: torch.Tensor, squares: Tensors, step: int, size: torch.Tensor
) -> None:
    """Step number `step`, from 0, against `gradient`, in place, by about `size` per entry (a scalar, or one each).

    `squares` holds running means of the squared gradients: of a matrix by rows (m, 1) and by columns (1, n), whose
    product stands for those of the entries; of a vector those of the entries.
    """
    square = gradient.square().add_(TINIEST)
    for mean in squares.values():
        mean.lerp_(square.sum_to_size(mean.shape) * (mean.numel() / square.numel()), 1 - DECAY)
    if "entries" in squares:
        expected = squares["entries"]
    else:
        expected = squares["rows"] / squares["rows"].mean() * squares["columns"]
    value -= size * gradient / (expected / (1 - DECAY ** (step + 1))).sqrt()


def rounded_at_random(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`value` (float32) in a `dtype` of 16 bits, up or down at random and right on average: small changes are not lost.

    Source: stochastic rounding, arXiv 1502.02551.
    """
    gap = torch.ldexp(torch.full_like(value, torch.finfo(dtype).eps / 2), torch.frexp(value).exponent)
    noise = torch.rand(value.shape, generator=generator, device=value.device) - 0.5
    return (value + gap * noise * value.ne(0)).to(dtype)  # the exponent of 0 is that of 1


def divergence_gradient(
    logits_of: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, wanted: torch.Tensor, at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p ‖ q) of every token (tokens,) in float32, and the gradients (tokens, hidden) of its sum at `states`.

    `logits_of` gives the logits of hidden states (tokens, hidden): p from `wanted`, q from `states`.
    """
    divergences, gradients = [], []
    for part, part_wanted in zip(states.split(at_once), wanted.split(at_once), strict=True):
        leaf = part.detach().requires_grad_()
        with torch.no_grad():
            log_p = logits_of(part_wanted).float().log_softmax(-1)
        with torch.enable_grad():
            logits = logits_of(leaf).float()
        log_q, p = logits.detach().log_softmax(-1), log_p.exp()
        divergences.append((p * (log_p - log_q)).sum(-1))
        gradients += torch.autograd.grad(logits, leaf, log_q.exp() - p)
    return torch.cat(divergences), torch.cat(gradients)


def state_bytes(trained: int) -> int:
    """Bytes on disk while `trained` numbers are trained: their values before and after a step."""
    return 2 * torch.float32.itemsize * trained


class Tuning:
    """The compressed model of one target, run forwards and backwards with one layer in memory.

    `figures` has "divergence_before" and "divergence_after", on held-out text, once they are known, and "divergences",
    that on each step's text before the step. After k steps, `_state_file(k, i)` holds the trained tensors of layer i,
    by their names in the model's files, after "value.", and the `squares` of each, after their names.
    """

    def __init__(self, job: CompressionJob, target: float, writer: ModelWriter) -> None:
        self.job, self.target, self.writer, self.cache = job, target, writer, job.cache
        tokens, processes = job.cache.read_tokens(), distributed.count()
        batch_size, self.batches_per_step, self.num_steps = steps_for(len(tokens), tokens.shape[1], processes)
        self.streamed = StreamedModel(job.checkpoint, batch_size, job.device, job.cache.dtype)
        layers = decoder_layers(self.streamed.skeleton, self.streamed.adapter)
        if job.settings.refine == "norms" and not any(map(norm_gains, layers)):
            raise HiSVDError("--refine norms: the decoder layers of this model have no norms with gains; leave it out.")
        self.texts = {"tokens": distributed.share(tokens), "held_out": job.cache.read_held_out()}
        self.path = writer.work / "tuning.json"
        self.figures: dict[str, Any] = {"steps": self.num_steps, "divergences": [], "written": False}
        found = read_json(self.path, FIGURES) if self.path.is_file() else {}
        if found.get("steps") == self.num_steps:  # else of another number of processes, whose steps are larger
            self.figures = found
        distributed.wait()  # until all have read it
        self._delete_states(but=self.done)  # those of a step that was not finished, or of an old one

    @property
    def done(self) -> int:
        """The number of steps done."""
        return len(self.figures["divergences"])

    def record(self, **figures: Any) -> None:
        """Keep `figures`, so that a killed run resumes here."""
        self.figures |= figures
        if distributed.is_first():
            write_json(self.path, self.figures)
        distributed.wait()

    def run_original(self) -> None:
        """Embed all text, and take it through the original's layers."""
        self.read = {name: self._read_by_original(name, tokens) for name, tokens in self.texts.items()}

    def _read_by_original(self, name: str, tokens: torch.Tensor) -> Callable[[], Iterator[Batch]]:
        """What gives the batches of `tokens`, once the original has run; `name` is that of its files."""
        path = self.writer.work / distributed.own_name(f"hidden_{name}")
        states = self.streamed.pair(path, tokens, keep_first=True)
        arguments = self.streamed.embed(tokens, states[0])
        for index in progress_bar(range(self.cache.num_layers), "the original's predictions", leave=False):
            layer = self.streamed.layer(index)
            states[index + 1].write(self.streamed.outputs(layer, index, states[index], arguments[index]))
        files = states[0], states[self.cache.num_layers]
        return lambda: map(Batch, *map(self.streamed.read, files), zip(*arguments, strict=True))

    def steps(self) -> Iterator[list[Batch]]:
        """This process's batches, step by step, from the start again once they end: other processes may have more."""
        batches = itertools.chain.from_iterable(self.read["tokens"]() for _ in itertools.count())
        while True:
            yield list(itertools.islice(batches, self.batches_per_step))

    def held_out_divergence(self) -> float:
        """The mean KL divergence per token of held-out text from the original's predictions.

        Raises:
            HiSVDError: it is not finite.
        """
        batches, last = list(self.read["held_out"]()), list[torch.Tensor]()
        for states in self._forward(batches, as_stored=True):
            last = states
        return self._at_top(batches, last)[0]

    @torch.no_grad()
    def step(self, batches: list[Batch]) -> None:
        """Run `batches` forwards and backwards, and change every layer on the way back.

        Raises:
            HiSVDError: the divergence is not finite.
        """
        inputs = list(self._forward(batches))
        divergence, tokens, gradients = self._at_top(batches, inputs.pop())
        for index in reversed(range(self.cache.num_layers)):
            layer, hidden = self._layer(index), inputs.pop()
            gains, weights = self._trained(index, layer)
            trained = {name: p.requires_grad_() for name, p in (gains | weights).items()}
            sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
            for place, batch in enumerate(batches):
                with torch.enable_grad():
                    output = run_layer(layer, hidden[place].requires_grad_(), batch.arguments[index])
                sources = [hidden[place], *trained.values()]
                # Some families have norms that they do not use, and not every expert gets a token.
                gradients[place], *found = torch.autograd.grad(
                    output, sources, gradients[place], materialize_grads=True
                )
                for total, gradient in zip(sums.values(), found, strict=True):
                    total += gradient
            self._change(index, {name: distributed.total(total).div_(tokens) for name, total in sums.items()}, gains)
        self.record(divergences=[*self.figures["divergences"], divergence])
        self._delete_states(but=self.done)

    def write(self) -> None:
        """Put the trained tensors into the shards, in the dtype that they have there."""
        for index in range(self.cache.num_layers) if distributed.is_first() else ():
            shard = self.writer.read_shard(index)
            self.writer.write_shard(index, shard | {k: t.cpu() for k, t in self._values(index, shard, True).items()})
        self.record(written=True)
        self._delete_states()

    @torch.no_grad()
    def _forward(self, batches: list[Batch], as_stored: bool = False) -> Iterator[list[torch.Tensor]]:
        """The hidden states of every batch before the first layer, and after each."""
        states = [batch.embedded for batch in batches]
        yield states
        for index in range(self.cache.num_layers):
            layer = self._layer(index, as_stored)
            states = [run_layer(layer, h, batch.arguments[index]) for h, batch in zip(states, batches, strict=True)]
            yield states

    def _at_top(self, batches: list[Batch], last: list[torch.Tensor]) -> tuple[float, int, list[torch.Tensor]]:
        """Over all processes, the mean divergence and the number of tokens; the gradients of its sum at `last`."""
        divergences, gradients = [], []
        with self.streamed.outside_weights():
            at_once = tokens_at_once(self.streamed.skeleton)
            for batch, states in zip(batches, last, strict=True):
                flat = states.flatten(0, 1), batch.wanted.flatten(0, 1)
                divergence, gradient = divergence_gradient(self.streamed.logits, *flat, at_once)
                divergences.append(divergence)
                gradients.append(gradient.view_as(states))
        own = torch.cat(divergences).cpu().double()
        total, tokens = distributed.total(torch.tensor([own.sum(), len(own)], dtype=torch.float64)).tolist()
        if not math.isfinite(total):
            raise HiSVDError(
                "The divergence from the original is NaN or infinite; use --refine none and another --save_model."
            )
        return total / tokens, int(tokens), gradients

    def _layer(self, index: int, as_stored: bool = False) -> nn.Module:
        """Layer `index` of the compressed model, as trained so far; `as_stored`: in the dtype of the files."""
        shard, shapes = self.writer.read_shard(index), self.job.shapes(self.target, index)
        tensors = shard | self._values(index, shard, as_stored)
        return compressed_layer(self.streamed, index, shapes, tensors).requires_grad_(False)

    def _trained(self, index: int, layer: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The gains and the weights of `layer` that are trained, by their names in the files."""
        checkpoint, path = self.job.checkpoint, self.streamed.layer_name(index)
        gains = {checkpoint.stored_name(f"{path}.{name}"): gain for name, gain in norm_gains(layer).items()}
        weights = {
            f"{stored_prefix(checkpoint, s)}{name}": parameter
            for s in (self.cache.sublayers_of(index) if self.job.settings.refine == "weights" else ())
            for name, parameter in layer.get_submodule(s.path).named_parameters()
        }
        return gains, weights

    def _change(self, index: int, gradients: Tensors, gains: Collection[str]) -> None:
        """Write the state of layer `index` after one more step; `gains` are the names of gains among the gradients."""
        if not distributed.is_first():
            return
        shard = self.writer.read_shard(index)
        state, offset = self._state(index, shard), self.streamed.adapter.gain_offset
        rate = 0.5 * (1 + math.cos(math.pi * self.done / self.num_steps))
        for name, gradient in gradients.items():
            start = shard[name].to(gradient.device, torch.float32)
            if name in gains:
                size = rate * GAIN_RATE[self.job.settings.refine] * (start + offset).abs()
            else:
                size = rate * WEIGHT_RATE * start.square().mean().sqrt()
            value = state.setdefault(f"value.{name}", start.clone())
            squares = {k: state.setdefault(f"{k}.{name}", zero) for k, zero in zero_squares(start).items()}
            adafactor_step(value, gradient, squares, self.done, size)
        write_tensors(self._state_file(self.done + 1, index), {name: t.cpu() for name, t in state.items()})

    def _values(self, index: int, shard: Tensors, as_stored: bool) -> Tensors:
        """The trained tensors of layer `index`, by their names in the files; none before the first step.

        They are in the dtype of the passes or, `as_stored`, in those of the `shard`.
        """
        generator: torch.Generator | None = None
        values = {}
        for key, tensor in self._state(index, shard).items():
            kind, _, name = key.partition(".")
            if kind == "value":
                dtype = shard[name].dtype if as_stored else self.cache.dtype
                if dtype.itemsize < tensor.dtype.itemsize:
                    seed = self.done * self.cache.num_layers + index
                    generator = generator or torch.Generator(self.job.device).manual_seed(seed)
                    tensor = rounded_at_random(tensor, dtype, generator)
                values[name] = tensor.to(dtype)
        return values

    def _state(self, index: int, shard: Tensors) -> Tensors:
        """The state of layer `index`, on the device; none before the first step. It is checked against the `shard`.

        Raises:
            HiSVDError: it is damaged.
        """
        if not self.done:
            return {}
        path = self._state_file(self.done, index)
        damaged = HiSVDError(f"{path} is damaged; delete {self.writer.folder} and run the same command again.")
        try:
            with open_safetensors(path) as file:
                state = {name: file.get_tensor(name).to(self.job.device) for name in file.keys()}  # noqa: SIM118
        except (HiSVDError, SafetensorError):
            raise damaged from None
        names = {key.removeprefix("value.") for key in state if key.startswith("value.")} & shard.keys()
        squares = {f"{k}.{name}": zero for name in names for k, zero in zero_squares(shard[name]).items()}
        expected = {f"value.{name}": shard[name] for name in names} | squares
        found, due = ({name: tensor.shape for name, tensor in part.items()} for part in (state, expected))
        if found != due or any(t.dtype != torch.float32 or not t.isfinite().all() for t in state.values()):
            raise damaged
        return state

    def _delete_states(self, but: int | None = None) -> None:
        """Delete the state files, except those after `but` steps."""
        for path in self.writer.work.glob("tuned_*") if distributed.is_first() else ():
            if not path.name.startswith(f"tuned_{but}_"):
                path.unlink()

    def _state_file(self, steps: int, index: int) -> Path:
        return self.writer.work / f"tuned_{steps}_{index}.safetensors"
