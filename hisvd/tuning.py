"""Train the layers of a compressed model, so that it predicts what the original does.

Adafactor (arXiv 1804.04235), without momentum, lowers the KL divergence of its predictions from the original's on the
calibration text, read once. A layer's state lies on disk between its turns. Sources: knowledge distillation, arXiv
1503.02531, on all weights of the layers; Norm Tweaking, arXiv 2309.02784, on the gains of the norms alone.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hisvd.errors import HiSVDError
from hisvd.factoring import CompressionJob, Tensors
from hisvd.layer_tensors import compressed_layer, norm_gains, stored_prefix
from hisvd.schema import NUMBER, SIZE, one_of
from hisvd.tuning_text import Batch, TuningText
from hisvd.utils import distributed
from hisvd.utils.eval_utils import tokens_at_once
from hisvd.utils.files import read_json, write_json, write_tensors
from hisvd.utils.model_folders import open_safetensors
from hisvd.utils.progress import progress_bar
from hisvd.utils.save_utils import ModelWriter
from hisvd.utils.streaming import run_layer

WARM_UP = 1 / 6  # of the steps, in which rates rise to what follows; over all, they fall to zero like a cosine
# As a fraction of a norm's gain, by what is refined, and of the root mean square of a weight's entries. Both times the
# square root of the divergence before: what chance adds in a step grows with its square, whatever is to be gained.
GAIN_RATE = {"norms": 6e-3, "weights": 1.25e-3}
WEIGHT_RATE = 2.5e-4
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


def tune(job: CompressionJob, target: float, writer: ModelWriter, text: TuningText) -> dict:
    """Replace what `refine` names in the shards of `writer`; returns what the report says of it.

    If the divergence on held-out text is not lower in the end, the shards stay as they were. Memory: one decoder layer
    with its gradients, and for one step's tokens their hidden states at every layer. Disk: see `state_bytes`. A killed
    run resumes at the step that it was in. Several processes share the tokens of every step.

    Raises:
        HiSVDError: the loss is not finite, a working file is damaged, or see StreamedModel.
    """
    tuning = Tuning(job, target, writer, text)
    figures, steps = tuning.figures, text.num_steps
    if not {"divergence_before", "divergence_after"} <= figures.keys():
        if "divergence_before" not in figures:
            tuning.record(divergence_before=tuning.held_out_divergence())
        with progress_bar(None, f"tuning {job.settings.refine}", total=steps, initial=tuning.done) as bar:
            for batches in itertools.islice(text.steps(), tuning.done, steps):
                tuning.step(batches)
                bar.set_postfix(divergence=figures["divergences"][-1])
                bar.update()
        tuning.record(divergence_after=tuning.held_out_divergence())
    helps = figures["divergence_after"] < figures["divergence_before"]
    if helps and not figures["written"]:
        tuning.write()
    return {name: figures[name] for name in ("divergence_before", "divergence_after", "divergences")} | {"kept": helps}


def zero_squares(value: torch.Tensor) -> Tensors:
    """The `squares` of `adafactor_step` before the first step."""
    sizes = {"rows": (len(value), 1), "columns": (1, value.shape[1])} if value.dim() == 2 else {"entries": value.shape}
    return {kind: value.new_zeros(size) for kind, size in sizes.items()}


def adafactor_step(
    value: torch.Tensor, gradient: torch.Tensor, squares: Tensors, step: int, size: torch.Tensor
) -> None:
    """Step number `step`, from 0, against `gradient`, in place, by about `size` per entry (a scalar, or one each).

    `squares` holds running means of the squared gradients: of a matrix by rows (m, 1) and by columns (1, n), whose
    product stands for those of the entries; of a vector those of the entries. `gradient` is overwritten.
    """
    square = gradient.square().add_(TINIEST)
    for mean in squares.values():
        mean.lerp_(square.sum_to_size(mean.shape) * (mean.numel() / square.numel()), 1 - DECAY)
    gradient *= size * (1 - DECAY ** (step + 1)) ** 0.5
    if "entries" in squares:
        gradient /= squares["entries"].sqrt()
    else:
        rows, columns = squares["rows"], squares["columns"]
        gradient.div_((rows / rows.mean()).sqrt()).div_(columns.sqrt())
    value -= gradient


def rounded_at_random(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`value` (float32) in a `dtype` of 16 bits, up or down at random and right on average: small changes are not lost.

    Source: stochastic rounding, arXiv 1502.02551.
    """
    # Between a number of `dtype` and the next there are as many of float32, and their bits count up.
    steps = round(torch.finfo(dtype).eps / torch.finfo(value.dtype).eps)
    noise = torch.randint(steps, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return noise.add_(value.view(torch.int32)).bitwise_and_(-steps).view(value.dtype).to(dtype)


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
        divergences.append(log_p.sub_(log_q).mul_(p).sum(-1))  # in place: these are the largest tensors
        gradients += torch.autograd.grad(logits, leaf, log_q.exp_().sub_(p))
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

    def __init__(self, job: CompressionJob, target: float, writer: ModelWriter, text: TuningText) -> None:
        self.job, self.target, self.writer, self.cache = job, target, writer, job.cache
        self.text, self.streamed = text, text.streamed
        self.path = writer.work / "tuning.json"
        self.figures: dict[str, Any] = {"steps": text.num_steps, "divergences": [], "written": False}
        found = read_json(self.path, FIGURES) if self.path.is_file() else {}
        if found.get("steps") == text.num_steps:  # else of another number of processes, whose steps are larger
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

    def held_out_divergence(self) -> float:
        """The mean KL divergence per token of held-out text from the original's predictions.

        Raises:
            HiSVDError: it is not finite.
        """
        batches, last = list(self.text.read["held_out"]()), list[torch.Tensor]()
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
            (layer, shard, state), hidden = self._layer(index), inputs.pop()
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
            means = {name: distributed.total(total).div_(tokens) for name, total in sums.items()}
            if distributed.is_first():
                self._change(index, shard, state, means, gains)
        self.record(divergences=[*self.figures["divergences"], divergence])
        self._delete_states(but=self.done)

    def write(self) -> None:
        """Put the trained tensors into the shards, in the dtype that they have there."""
        for index in range(self.cache.num_layers) if distributed.is_first() else ():
            shard = self.writer.read_shard(index)
            values = self._values(index, shard, self._state(index, shard), as_stored=True)
            self.writer.write_shard(index, shard | {name: tensor.cpu() for name, tensor in values.items()})
        self.record(written=True)
        self._delete_states()

    @torch.no_grad()
    def _forward(self, batches: list[Batch], as_stored: bool = False) -> Iterator[list[torch.Tensor]]:
        """The hidden states of every batch before the first layer, and after each."""
        states = [batch.embedded for batch in batches]
        yield states
        for index in range(self.cache.num_layers):
            layer, _, _ = self._layer(index, as_stored)
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

    def _layer(self, index: int, as_stored: bool = False) -> tuple[nn.Module, Tensors, Tensors]:
        """Layer `index` as trained so far, and the shard and the state that it is made of; `as_stored`: see _values."""
        shard, shapes = self.writer.read_shard(index), self.job.shapes(self.target, index)
        state = self._state(index, shard)
        values = self._values(index, shard, state, as_stored)
        layer = compressed_layer(self.streamed, index, shapes, shard | values).requires_grad_(False)
        return layer, shard, state

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

    def _change(self, index: int, shard: Tensors, state: Tensors, gradients: Tensors, gains: Collection[str]) -> None:
        """Write the state of layer `index` after one more step; `gains` are the names of gains among the gradients."""
        offset = self.streamed.adapter.gain_offset
        rate = max(0.0, self.figures["divergence_before"]) ** 0.5
        rate *= min(1, (self.done + 1) / max(1, WARM_UP * self.text.num_steps))
        rate *= 0.5 * (1 + math.cos(math.pi * self.done / self.text.num_steps))
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

    def _values(self, index: int, shard: Tensors, state: Tensors, as_stored: bool = False) -> Tensors:
        """The trained tensors in the `state` of layer `index`, by their names in the files.

        They are in the dtype of the passes or, `as_stored`, in those of the `shard`.
        """
        generator: torch.Generator | None = None
        values = {}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if kind == "value":
                dtype = shard[name].dtype if as_stored else self.streamed.dtype
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
        if found != due or any(t.dtype != torch.float32 or not t.sum().isfinite() for t in state.values()):
            raise damaged
        return state

    def _delete_states(self, but: int | None = None) -> None:
        """Delete the state files, except those after `but` steps."""
        for path in self.writer.work.glob("tuned_*") if distributed.is_first() else ():
            if not path.name.startswith(f"tuned_{but}_"):
                path.unlink()

    def _state_file(self, steps: int, index: int) -> Path:
        return self.writer.work / f"tuned_{steps}_{index}.safetensors"
