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
from hisvd.utils.streaming import Arguments, StreamedModel, run_layer
from hisvd.whitening_svd import gram

DRAWN = 32  # tokens drawn from each prediction


def gradients_at_top(
    streamed: StreamedModel, hidden: Iterator[torch.Tensor], tokens: torch.Tensor, draws: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Gradients (b, seqlen, hidden) with respect to the last layer's outputs, see `loss_gradient`.

    `hidden` yields those outputs for consecutive batches of `tokens`, `draws` (sequences, seqlen − 1, DRAWN + 1) holds
    numbers drawn from [0, 1). Consume it inside `streamed.outside_weights`. Norm and head treat tokens independently,
    and run on few at a time because logits are large.
    """
    batch_size, chunk = streamed.batch_size, tokens_at_once(streamed.skeleton)
    for states, ids, uniform in zip(hidden, tokens.split(batch_size), draws.split(batch_size), strict=True):
        gradient = torch.zeros_like(states)
        flat, flat_gradient = states[:, :-1].flatten(0, 1), []
        per_token = (flat, ids[:, 1:].flatten().to(states.device), uniform.flatten(0, 1).to(states.device))
        for part, labels, part_draws in zip(*(t.split(chunk) for t in per_token), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                logits = streamed.logits(leaf).float()
            flat_gradient += torch.autograd.grad(logits, leaf, loss_gradient(logits.detach(), labels, part_draws))
        gradient[:, :-1] = torch.cat(flat_gradient).view_as(gradient[:, :-1])
        yield gradient


def loss_gradient(logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Gradients g (tokens, vocabulary) at the logits, in their dtype, whose E[g gᵀ] is the mean of two Fisher matrices.

    The empirical one is that of the text's own next tokens, `labels` (tokens,); the exact one that of the model's
    predictions p, diag(p) − p pᵀ at the logits. Their mean errs less than either. For the exact one, tokens are drawn
    from p and their gradients added with random signs, so that one backward pass serves both: products of different
    terms vanish in the mean. `draws` (tokens, DRAWN + 1), from [0, 1), says which tokens, then which signs.
    """
    p = logits.softmax(-1)
    signs = torch.where(draws[:, 1:] < 0.5, -1.0, 1.0).to(p) / DRAWN**0.5
    weights = torch.cat([torch.ones_like(signs[:, :1]), signs], 1)
    chosen = torch.cat([labels[:, None], sample_labels(p, draws[:, 0])], 1)
    return (p * weights.sum(1, keepdim=True)).scatter_add_(1, chosen, -weights).mul_(0.5**0.5)


def sample_labels(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """DRAWN tokens (tokens, DRAWN) from each distribution p (tokens, vocabulary), evenly spread over it.

    `uniform` (tokens,), from [0, 1), shifts the points at which the cumulative sums are inverted.
    """
    sums = p.cumsum(-1)
    points = (uniform[:, None] + torch.arange(DRAWN, device=p.device)) / DRAWN
    return torch.searchsorted(sums, points * sums[:, -1:], right=True).clamp_max(p.shape[-1] - 1)


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

    Raises:
        HiSVDError: a gradient is not finite; the layer is named.
    """
    for hidden, others, gradient in zip(inputs, arguments, output_gradients, strict=True):
        hidden.requires_grad_()
        with torch.enable_grad():
            output = run_layer(layer, hidden, others)
        reached = [path for path in moments.paths if path in moments.outputs]  # some experts may receive no token
        outputs = [moments.outputs.pop(path) for path in reached]
        below, *at_linears = torch.autograd.grad(output, [hidden, *outputs], gradient)
        if not torch.isfinite(below).all():
            raise HiSVDError(f"The gradients in {name} are NaN or infinite; use --dtype float32 or --no_gradients.")
        moments.add(hidden.shape[:-1].numel(), dict(zip(reached, at_linears, strict=True)))
        yield below
