"""The backward half of calibration: second moments of the gradients at every linear's output.

Layers are visited in reverse, one in memory. Each is run again from its stored inputs with autograd on; the
gradient of its inputs is what the layer below starts from.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from hisvd.errors import HiSVDError
from hisvd.rare_experts import pool_rare
from hisvd.utils import distributed
from hisvd.utils.eval_utils import tokens_at_once
from hisvd.utils.streaming import Arguments, StreamedModel
from hisvd.whitening_svd import gram


def gradients_at_top(
    streamed: StreamedModel, hidden: Iterator[torch.Tensor], tokens: torch.Tensor, draws: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Gradients (b, seqlen, 2 hidden) of summed next-token losses with respect to the last layer's outputs.

    `hidden` yields those outputs for consecutive batches of `tokens`; `draws` (sequences, seqlen − 1) holds numbers
    drawn from [0, 1). Consume it inside `streamed.outside_weights`. The first half is for the text's own tokens,
    the second for tokens drawn from the model's predictions: F is then the mean of the empirical Fisher matrix and of a
    sample of the exact one, which errs less than either. Norm and head treat tokens independently, and run on few at
    a time because logits are large.
    """
    batch_size, chunk = streamed.batch_size, tokens_at_once(streamed.skeleton)
    for states, ids, uniform in zip(hidden, tokens.split(batch_size), draws.split(batch_size), strict=True):
        gradient = states.new_zeros(*states.shape[:2], 2 * states.shape[2])
        flat, flat_gradient = states[:, :-1].flatten(0, 1), []
        per_token = (flat, ids[:, 1:].flatten().to(states.device), uniform.flatten().to(states.device))
        for part, labels, part_draws in zip(*(t.split(chunk) for t in per_token), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                logits = streamed.logits(leaf).float()
                targets = (labels, sample_labels(logits.detach(), part_draws))
                losses = [nn.functional.cross_entropy(logits, t, reduction="sum") for t in targets]
                parts = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]
            flat_gradient.append(torch.cat(parts, -1))
        gradient[:, :-1] = torch.cat(flat_gradient).view_as(gradient[:, :-1])
        yield gradient


def sample_labels(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A token (tokens,) from each distribution softmax(logits), (tokens, vocabulary), by inverting its cumulative sums.

    `uniform` (tokens,) holds numbers drawn from [0, 1).
    """
    sums = logits.softmax(-1).cumsum_(-1)
    return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


class OutputGradientMoments:
    """Σ g gᵀ over tokens for the output of every linear of a layer, summed in float32 within a batch and float64 across
    batches."""

    def __init__(self, layer: nn.Module, paths: list[str]) -> None:
        self.paths = paths
        sizes = {path: layer.get_parameter(f"{path}.weight").shape[0] for path in paths}
        device = next(layer.parameters()).device
        self.moments = {p: torch.zeros(n, n, dtype=torch.float64, device=device) for p, n in sizes.items()}
        self.outputs: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self.tokens_at = dict.fromkeys(paths, 0)  # those that reach the linear: for an expert, not all
        for path in paths:
            layer.get_submodule(path).register_forward_hook(self._recorder(path))

    def _recorder(self, path: str) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def hook(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
            self.outputs[path] = output

        return hook

    def add(self, tokens: int, gradients: dict[str, torch.Tensor]) -> None:
        """Add the gradients (..., m) of one batch of `tokens` tokens."""
        for path, gradient in gradients.items():
            rows = gradient.reshape(-1, gradient.shape[-1])
            self.moments[path] += gram(rows)
            self.tokens_at[path] += rows.shape[0]
        self.tokens += tokens

    def finish(self) -> None:
        """Sum the moments and token counts over all processes, and pool those of rare experts."""
        self.moments = {path: distributed.total(moment) for path, moment in self.moments.items()}
        self.tokens = int(distributed.total(torch.tensor(self.tokens)))
        self.tokens_at = {path: int(distributed.total(torch.tensor(n))) for path, n in self.tokens_at.items()}
        pool_rare(self.moments, self.tokens_at)


def input_gradients(
    layer: nn.Module,
    name: str,
    moments: OutputGradientMoments,
    inputs: Iterator[torch.Tensor],
    arguments: list[Arguments],
    output_gradients: Iterator[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Take gradients from the outputs of `layer` to its inputs, batch by batch, filling `moments` on the way.

    The gradients of both losses (see gradients_at_top) are side by side, (b, seqlen, 2 hidden), and count equally.

    Raises:
        HiSVDError: a gradient is not finite; the layer is named.
    """
    for hidden, (args, kwargs), both in zip(inputs, arguments, output_gradients, strict=True):
        hidden.requires_grad_()
        with torch.enable_grad():
            output = layer(hidden, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
        reached = [path for path in moments.paths if path in moments.outputs]  # some experts may receive no token
        outputs, at_inputs = [moments.outputs.pop(path) for path in reached], []
        for gradient, retain_graph in zip(both.chunk(2, -1), (True, False), strict=True):
            below, *at_linears = torch.autograd.grad(output, [hidden, *outputs], gradient, retain_graph)
            if not torch.isfinite(below).all():
                raise HiSVDError(f"The gradients in {name} are NaN or infinite; use --dtype float32 or --no_gradients.")
            moments.add(hidden.shape[:-1].numel(), dict(zip(reached, at_linears, strict=True)))
            at_inputs.append(below)
        yield torch.cat(at_inputs, -1)
