"""Train the gains of the norms inside a compressed model's layers, so that it predicts what the original does.

All gains together are few (35 thousand beside SmolLM2's 135 million parameters), so what they learn from the
calibration text holds on other text too. Adam lowers the KL divergence of the compressed model's predictions from the
original's. Its steps are relative to each gain. Source: Norm Tweaking, arXiv 2309.02784, which goes layer by layer.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from hisvd.errors import HiSVDError
from hisvd.factoring import CompressionJob, Tensors
from hisvd.layer_tensors import compressed_layer, norm_gains
from hisvd.utils import distributed
from hisvd.utils.data_utils import default_batch_size
from hisvd.utils.eval_utils import tokens_at_once
from hisvd.utils.files import write_tensors
from hisvd.utils.progress import progress_bar
from hisvd.utils.save_utils import ModelWriter
from hisvd.utils.streaming import StreamedModel, run_layer

STEPS = 24
TOKENS_PER_STEP = 4096
RATE = 5e-3  # of the first step, as a fraction of a gain; falls to zero like a cosine
BETAS = (0.9, 0.95)  # Adam's

Batch = tuple[int, torch.Tensor, torch.Tensor]  # its number, embedded tokens, the original's last hidden states


def tune_norms(job: CompressionJob, target: float, writer: ModelWriter) -> dict:
    """Replace the gains in the shards of `writer`; returns what the report says of it.

    If the divergence on the first step's text is not lower in the end, the gains stay as they were. Memory: one decoder
    layer, and for one step's tokens their hidden states at every layer. A killed run resumes at the step that it was
    in. Several processes share the tokens of every step.

    Raises:
        HiSVDError: the layers have no norms with gains, the loss is not finite, or see StreamedModel.
    """
    tuning = NormTuning(job, target, writer)
    state = tuning.state()
    divergences = state["divergences"]
    with progress_bar(None, "tuning norms", total=STEPS, initial=int(state["step"])) as bar:
        if int(state["step"]) <= STEPS:
            tuning.run_original()
            for batches in itertools.islice(tuning.steps(), int(state["step"]), STEPS):
                divergence, gradients = tuning.divergence_and_gradients(batches, state)
                adam_step(state, gradients, divergence)
                tuning.save(state)
                bar.set_postfix(divergence=divergence)
                bar.update()
            divergences[STEPS] = tuning.divergence(next(tuning.steps()), state)
            state["step"] += 1
            tuning.save(state)
    before, after = float(divergences[0]), float(divergences[STEPS])
    if after < before:
        tuning.write(state)
    return {"divergence_before": before, "divergence_after": min(before, after), "divergences": divergences.tolist()}


def adam_step(state: Tensors, gradients: Tensors, divergence: float) -> None:
    """Change the gains of `state`, in place, against their `gradients`, by fractions of their scales."""
    step = int(state["step"])
    rate = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    state["divergences"][step] = divergence
    state["step"] += 1
    for name, gradient in gradients.items():
        mean, square = state[f"mean.{name}"], state[f"square.{name}"]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        size = (square / (1 - BETAS[1] ** (step + 1))).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        state[f"gain.{name}"] -= rate * state[f"scale.{name}"] * mean / (1 - BETAS[0] ** (step + 1)) / size


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


class NormTuning:
    """The compressed model of one target, run forwards and backwards with one layer in memory.

    Its state holds tensors by name: "step", the number of steps done, and "divergences" (STEPS + 1,), that of each
    step's text before it and that of the first step's text after all, which counts as a step; and for every gain, by
    its name in the files, "gain.", "mean." and "square." (Adam's moments), and "scale." (what a step is a fraction of).
    """

    def __init__(self, job: CompressionJob, target: float, writer: ModelWriter) -> None:
        self.job, self.target, self.writer, self.cache = job, target, writer, job.cache
        self.tokens = distributed.share(job.cache.read_tokens())
        batch_size = default_batch_size(self.tokens.shape[1])
        self.streamed = StreamedModel(job.checkpoint, batch_size, job.device, job.cache.dtype)
        own = max(1, TOKENS_PER_STEP // distributed.count() // (batch_size * self.tokens.shape[1]))
        self.batches_per_step = min(own, -(-len(self.tokens) // batch_size))
        self.path = writer.work / "norms.safetensors"

    def state(self) -> Tensors:
        """Where an earlier run has stopped, or the start."""
        if self.path.is_file():
            kept = load_file(self.path)
            return {name: t if name in ("step", "divergences") else t.to(self.job.device) for name, t in kept.items()}
        state = {"step": torch.zeros((), dtype=torch.long), "divergences": torch.zeros(STEPS + 1, dtype=torch.float64)}
        offset = self.streamed.adapter.gain_offset
        for index in range(self.cache.num_layers):
            for name, gain in norm_gains(self.streamed.layer(index)).items():
                value, stored = gain.detach().float(), self._stored(index, name)
                zeros = {f"{kind}.{stored}": torch.zeros_like(value) for kind in ("mean", "square")}
                state |= {f"gain.{stored}": value.clone(), f"scale.{stored}": (value + offset).abs(), **zeros}
        if len(state) == 2:
            raise HiSVDError("--refine norms: the decoder layers of this model have no norms with gains; leave it out.")
        return state

    def save(self, state: Tensors) -> None:
        """Keep the state, so that a killed run resumes here."""
        if distributed.is_first():
            write_tensors(self.path, {name: tensor.cpu() for name, tensor in state.items()})
        distributed.wait()

    def write(self, state: Tensors) -> None:
        """Put the gains into the shards, in the dtype that they have there."""
        for index in range(self.cache.num_layers) if distributed.is_first() else ():
            shard = self.writer.read_shard(index)
            gains = {
                name: state[f"gain.{name}"].to("cpu", t.dtype) for name, t in shard.items() if f"gain.{name}" in state
            }
            self.writer.write_shard(index, shard | gains)
        distributed.wait()

    def run_original(self) -> None:
        """Embed the tokens, and take them through the original's layers."""
        wanted = self.streamed.pair(self._path("hidden_wanted"), self.tokens)
        self.embedded = self.streamed.file(self._path("hidden_embedded").with_suffix(".bin"), self.tokens)
        self.arguments = self.streamed.embed(self.tokens, wanted[0], self.embedded)
        layers = range(self.cache.num_layers)
        for index in progress_bar(layers, "the original's predictions", leave=False):
            layer = self.streamed.layer(index)
            wanted[index + 1].write(self.streamed.outputs(layer, index, wanted[index], self.arguments[index]))
        self.wanted = wanted[self.cache.num_layers]

    def steps(self) -> Iterator[list[Batch]]:
        """The batches of this process's tokens, step by step, from the start again once they end."""

        def batches() -> Iterator[Batch]:
            while True:
                files = zip(self.streamed.read(self.embedded), self.streamed.read(self.wanted), strict=True)
                yield from ((number, *states) for number, states in enumerate(files))

        endless = batches()
        while True:
            yield list(itertools.islice(endless, self.batches_per_step))

    def divergence(self, batches: list[Batch], state: Tensors) -> float:
        """The mean KL divergence per token over all processes.

        Raises:
            HiSVDError: it is not finite.
        """
        return self._at_top(batches, self._forward(batches, state)[-1])[0]

    @torch.no_grad()
    def divergence_and_gradients(self, batches: list[Batch], state: Tensors) -> tuple[float, Tensors]:
        """`divergence`, and its gradients at the gains."""
        inputs = self._forward(batches, state)
        divergence, tokens, gradients = self._at_top(batches, inputs.pop())
        found: Tensors = {}
        for index in reversed(range(self.cache.num_layers)):
            layer, hidden = self._layer(index, state), inputs.pop()
            gains = {self._stored(index, name): gain.requires_grad_() for name, gain in norm_gains(layer).items()}
            for place, (number, *_) in enumerate(batches):
                with torch.enable_grad():
                    output = run_layer(layer, hidden[place].requires_grad_(), self.arguments[index][number])
                sources = [hidden[place], *gains.values()]
                # Some families have norms that they do not use.
                below, *at_gains = torch.autograd.grad(output, sources, gradients[place], allow_unused=True)
                gradients[place] = below
                for name, gradient in zip(gains, at_gains, strict=True):
                    if gradient is not None:
                        found[name] = found.get(name, 0) + gradient.float()
        return divergence, {name: distributed.total(gradient) / tokens for name, gradient in found.items()}

    @torch.no_grad()
    def _forward(self, batches: list[Batch], state: Tensors) -> list[list[torch.Tensor]]:
        """The hidden states of every batch before the first layer, and after each."""
        states = [[hidden for _, hidden, _ in batches]]
        for index in range(self.cache.num_layers):
            layer = self._layer(index, state)
            before = zip(batches, states[-1], strict=True)
            states.append([run_layer(layer, hidden, self.arguments[index][b[0]]) for b, hidden in before])
        return states

    def _at_top(self, batches: list[Batch], last: list[torch.Tensor]) -> tuple[float, int, list[torch.Tensor]]:
        """Over all processes, the mean divergence and the number of tokens; the gradients of its sum, by batch."""
        divergences, gradients = [], []
        with self.streamed.outside_weights():
            at_once = tokens_at_once(self.streamed.skeleton)
            for (*_, wanted), states in zip(batches, last, strict=True):
                flat = states.flatten(0, 1), wanted.flatten(0, 1)
                divergence, gradient = divergence_gradient(self.streamed.logits, *flat, at_once)
                divergences.append(divergence)
                gradients.append(gradient.view_as(states))
        own = torch.cat(divergences).cpu().double()
        total, tokens = distributed.total(torch.tensor([own.sum(), len(own)], dtype=torch.float64)).tolist()
        if not math.isfinite(total):
            raise HiSVDError("The divergence from the original is NaN or infinite; use --refine none.")
        return total / tokens, int(tokens), gradients

    def _layer(self, index: int, state: Tensors) -> nn.Module:
        """Layer `index` of the compressed model, with the gains of `state`."""
        shapes = self.job.shapes(self.target, index)
        layer = compressed_layer(self.streamed, index, shapes, self.writer.read_shard(index)).requires_grad_(False)
        for name, gain in norm_gains(layer).items():
            gain.copy_(state[f"gain.{self._stored(index, name)}"])
        return layer

    def _stored(self, index: int, name: str) -> str:
        return self.job.checkpoint.stored_name(f"{self.streamed.layer_name(index)}.{name}")

    def _path(self, name: str) -> Path:
        return self.writer.work / distributed.own_name(name)
