"""What each stage of the chain needs, from the shapes of a model: memory, disk and arithmetic.

Memory counts what is alive at the worst moment of a stage, on one device: BASE for Python and its libraries, one layer
(compress.py: one for the original and one per target), its second moments in float64, and the largest temporaries of a
decomposition; or, while tokens are embedded and logits computed, what lies outside the decoder layers. n is the width
of an input, m that of an output.
"""

from dataclasses import dataclass, field, replace
from math import prod

import torch

from hisvd.cached_moments import packed_shape
from hisvd.integer_codes import INTEGERS
from hisvd.layer_statistics import NUM_LEADING_VECTORS
from hisvd.machine_rates import Work
from hisvd.neurons import BLOCK, spectrum_widths
from hisvd.tuning import state_bytes
from hisvd.tuning_text import steps_for
from hisvd.utils.data_utils import TOKENS_PER_BATCH
from hisvd.utils.eval_utils import LOGITS_AT_ONCE

BASE = 0.55 * 2**30  # bytes: torch, transformers, tokenizer, text
EVALUATED_TOKENS = 341_469  # WikiText-2's test split by Llama 2's tokenizer
GRAM = 9 / 16  # of a full product, see whitening_svd.gram
# How often elementwise operations read or write: hidden states, in norms and sums; logits, in softmax, draws, losses
# and their gradients; a weight, when it is rounded; the inverse, when a block of neurons goes; a weight, in a step of
# Adafactor.
NORMS_AND_SUMS, LOGITS_MOVED, ROUNDING_MOVED, ELIMINATION_MOVED, ADAFACTOR_MOVED = 8, 16, 12, 1, 15
F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Layer:
    """Shapes of one decoder layer: `inputs` lists (n, [m of every linear that reads it]).

    `mlps` lists (hidden neurons, (m, n) of every linear, the output linear last).
    """

    inputs: list[tuple[int, list[int]]]
    parameters: int
    mlps: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of all linears."""
        return [(m, n) for n, outputs in self.inputs for m in outputs]


@dataclass(frozen=True)
class Shapes:
    """Shapes of a model: its decoder layers, hidden width, vocabulary, and parameters outside the layers."""

    layers: list[Layer]
    hidden: int
    vocabulary: int
    outside: int

    @property
    def parameters(self) -> int:
        """The parameters of all tensors."""
        return self.outside + sum(layer.parameters for layer in self.layers)


@dataclass(frozen=True)
class RunSizes:
    """How much text a run reads, and in which dtypes it computes.

    Second moments of inputs come from `nsamples` windows of `seqlen` tokens, those of output gradients from
    `grad_nsamples` of them. `compute` is the dtype of the forward passes, `stored` that of the checkpoint, `targets`
    the number of compression targets in one run, `tuning` the dtype of the passes of `--refine` (None: `compute`).
    """

    nsamples: int
    grad_nsamples: int
    seqlen: int
    compute: torch.dtype
    stored: torch.dtype
    targets: int = 1
    tuning: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.nsamples * self.seqlen


@dataclass(frozen=True)
class Stage:
    """One stage of the chain: bytes of memory and of disk, and what there is to compute."""

    name: str
    memory: float
    disk: float
    work: Work


def estimated_stages(shapes: Shapes, sizes: RunSizes) -> list[Stage]:
    """The stages of calibrate.py, of compress.py with its default settings, what `--refine weights` adds to it, and of
    evaluate.py layer by layer on WikiText-2's test split; one process.
    """
    stages = [_forward(shapes, sizes)]
    if sizes.grad_nsamples:
        stages.append(_backward(shapes, sizes))
    return [*stages, _compression(shapes, sizes), _tuning(shapes, sizes), _evaluation(shapes, sizes)]


def activation_bytes(shapes: Shapes, sizes: RunSizes) -> int:
    """Bytes of the hidden states that calibrate.py keeps in files: two files for all sequences, which layers read and
    write in turn, and for those with gradients the inputs of all layers and two files of gradients.
    """
    count = 2 * sizes.nsamples + sizes.grad_nsamples * (len(shapes.layers) + 1 + 2)
    return count * sizes.seqlen * shapes.hidden * sizes.compute.itemsize


def cache_bytes(shapes: Shapes, gradients: bool) -> int:
    """Bytes of the finished cache: the lower triangles of H (n, n) per input, in float64, and of F (m, m) per linear,
    in float32; the leading singular vectors, spectra and rounding errors of each linear.
    """
    total = 0
    for layer in shapes.layers:
        total += sum(8 * prod(packed_shape(n)) for n, _ in layer.inputs)
        for m, n in layer.shapes:
            leading = min(NUM_LEADING_VECTORS, m, n)
            total += 4 * (leading * n + 2 * min(m, n))
            total += gradients * (4 * (prod(packed_shape(m)) + min(m, n)) + 8 * len(INTEGERS))
        for neurons, linears in layer.mlps if gradients else ():
            total += 4 * neurons + 16 * (neurons + 1) + 4 * len(spectrum_widths(neurons)) * sum(map(min, linears))
    return total


def stream_bytes(hidden: int, tokens: int, compute: torch.dtype, targets: int) -> int:
    """Bytes of the hidden states that compress.py's update keeps in files: two of the original and two per target."""
    return 2 * (1 + targets) * tokens * hidden * compute.itemsize


def _memory(shapes: Shapes, sizes: RunSizes, in_layer: float, layers: int = 1) -> float:
    """BASE plus the worst of three moments: inside a layer, of which `layers` copies are held; outside the layers,
    while weights are converted; there with one layer loaded too, to see what it returns.
    """
    largest = max(layer.parameters for layer in shapes.layers)
    outside = (sizes.compute.itemsize + sizes.stored.itemsize) * shapes.outside
    with_layer = sizes.compute.itemsize * (shapes.outside + largest)
    return BASE + max(sizes.compute.itemsize * layers * largest + in_layer, outside, with_layer)


def _batch(shapes: Shapes, compute: torch.dtype, graph: bool) -> float:
    """One batch inside a layer: the inputs of linears, and with autograd their outputs and gradients as well."""
    widths = max(sum(n + 2 * graph * sum(ms) for n, ms in layer.inputs) for layer in shapes.layers)
    return TOKENS_PER_BATCH * compute.itemsize * (8 * shapes.hidden + widths)


def _decomposition(m: int, n: int) -> float:
    """Float64 temporaries for one linear: weight, its whitened form and products, the smaller Gram matrix's eigh."""
    return 8 * (4 * m * n + 3 * min(m, n) ** 2)


def _forward(shapes: Shapes, sizes: RunSizes) -> Stage:
    tokens, peak, work = sizes.tokens, 0.0, Work()
    for layer in shapes.layers:
        sums = sum(8 * n * n for n, _ in layer.inputs)
        stored = sum(4 * n * n for n, _ in layer.inputs)
        for n, outputs in layer.inputs:
            # The moment is among the sums. To pack it takes two matrices, and so does its Cholesky root, which is one.
            held = max(16 * n * n, *(8 * n * n + _decomposition(m, n) for m in outputs))
            peak = max(peak, sums + max(_batch(shapes, sizes.compute, False) + 4 * n * n, stored + held))
        _pass(work, layer, shapes, sizes, sizes.nsamples)
        for n, _ in layer.inputs:
            _gram(work, tokens, n, sizes.compute)
            work.decompositions["cholesky", F64, n] += 1
        for m, n in layer.shapes:
            small = min(m, n)
            work.products[F64] += 2 * m * n * (n + 2 * GRAM * small + NUM_LEADING_VECTORS)
            work.decompositions["eigh", F64, small] += 1
            work.decompositions["eigvalsh", F64, small] += 1
    work.disk += activation_bytes(shapes, replace(sizes, grad_nsamples=0)) * len(shapes.layers)  # read and written
    work.disk += _kept_bytes(shapes, sizes) + cache_bytes(shapes, False) + sizes.stored.itemsize * shapes.parameters
    disk = activation_bytes(shapes, sizes) + cache_bytes(shapes, False)
    return Stage("calibrate: inputs", _memory(shapes, sizes, peak), disk, work)


def _backward(shapes: Shapes, sizes: RunSizes) -> Stage:
    tokens, peak, work = sizes.grad_nsamples * sizes.seqlen, 0.0, Work()
    # Logits, and the gradients at them taken down; softmax, sums and draws in float32.
    work.products[sizes.compute] += 4 * tokens * shapes.hidden * shapes.vocabulary
    work.memory += LOGITS_MOVED * 4 * tokens * shapes.vocabulary
    for layer in shapes.layers:
        sums = sum(8 * m * m for m, _ in layer.shapes)
        read = sum(4 * n * n for n, _ in layer.inputs)
        largest = max(max(m, n) for m, n in layer.shapes)
        held = max(16 * n * n + max(16 * m * m, 8 * m * m + _decomposition(m, n)) for m, n in layer.shapes)
        peak = max(peak, sums + max(_batch(shapes, sizes.compute, True) + 4 * largest**2, read + held))
        _pass(work, layer, shapes, sizes, sizes.grad_nsamples, backward=1)
        for n, _ in layer.inputs:
            work.decompositions["cholesky", F64, n] += 2
        for m, n in layer.shapes:
            small = min(m, n)
            _gram(work, tokens, m, sizes.compute)
            work.products[F64] += 2 * m * n * (2 * n + m + GRAM * small)
            work.decompositions["cholesky", F64, m] += 1
            work.decompositions["eigvalsh", F64, small] += 1
            work.memory += ROUNDING_MOVED * len(INTEGERS) * 8 * m * n
        for neurons, linears in layer.mlps:
            # Statistics of all its linears; C, its inverse and the part that is kept of it, or F and its root.
            kept = sum(2 * m * m for m, _ in linears) + 4 * neurons**2
            peak = max(peak, kept + 8 * (4 * max(max(s) for s in linears) ** 2 + 2 * sum(m * n for m, n in linears)))
            work.products[F64] += _elimination_flops(neurons, linears)
            work.memory += ELIMINATION_MOVED * 8 * neurons**3 / BLOCK
            work.decompositions["cholesky", F64, neurons] += 2
            for size in (linears[-1][0], *(n for _, n in linears[:-1])):
                work.decompositions["eigvalsh", F64, size] += len(spectrum_widths(neurons))
    work.disk += 6 * _kept_bytes(shapes, sizes) + 2 * cache_bytes(shapes, True)
    disk = activation_bytes(shapes, sizes) + cache_bytes(shapes, True)
    memory = max(BASE + _top(shapes, sizes), _memory(shapes, sizes, peak))
    return Stage("calibrate: gradients", memory, disk, work)


def _pass(work: Work, layer: Layer, shapes: Shapes, sizes: RunSizes, nsamples: float, backward: int = 0) -> None:
    """Add `nsamples` windows through a layer, and `backward` times their gradients at its inputs.

    The attention's products of queries and keys, and of probabilities and values, are of half the windows, since
    attention is causal; its gradients take 2.5 times as long. Elementwise operations read and write what linears do.
    """
    tokens, times = nsamples * sizes.seqlen, 1 + backward
    work.products[sizes.compute] += 2 * tokens * layer.parameters * times
    work.products[sizes.compute] += 2 * nsamples * sizes.seqlen**2 * shapes.hidden * (1 + 2.5 * backward)
    widths = NORMS_AND_SUMS * shapes.hidden + sum(n + sum(ms) for n, ms in layer.inputs)
    work.memory += 2 * tokens * widths * sizes.compute.itemsize * times


def _gram(work: Work, tokens: float, n: int, compute: torch.dtype) -> None:
    """Add Xᵀ X of so many tokens, in float32, and its sum over batches in float64."""
    work.products[F32] += GRAM * 2 * tokens * n * n
    work.memory += 20 * n * n * tokens / TOKENS_PER_BATCH + (4 + compute.itemsize) * tokens * n


def _kept_bytes(shapes: Shapes, sizes: RunSizes) -> float:
    """The inputs of all layers of the windows with gradients."""
    return sizes.grad_nsamples * sizes.seqlen * shapes.hidden * sizes.compute.itemsize * len(shapes.layers)


def _elimination_flops(neurons: int, linears: list[tuple[int, int]]) -> float:
    """Products and solutions in float64: removing neurons one by one, guarded losses, Gram matrices at all widths."""
    *inputs, (m, _) = linears
    flops = 2 * neurons**3 + m * neurons * (6 * neurons + 4 * m)
    return flops + sum(rows * (2 * GRAM * rows**2 + rows * n + 4 * n**2) for rows, n in inputs)


def _factoring_flops(m: int, n: int, gradients: bool) -> float:
    """Products and solutions in float64 to factor, pack and round one linear at half of its full rank."""
    rank = min(m, n) / 2
    flops = 2 * m * n * (n + gradients * m + GRAM * min(m, n))
    flops += rank * (2 * m * n + n**2) if m > n else rank * (4 * m * n + 4 * gradients * m**2)
    # LU and coefficients; the base and what it sees; rounding it; its Gram matrices; the outer factor and its rounding.
    packing = rank**2 * (2 * m + 4 * n + 2 * (1 + GRAM) * n + 3 * (m - rank) + 3 * rank)
    return flops + packing + rank * n**2


def _compression(shapes: Shapes, sizes: RunSizes) -> Stage:
    tokens, targets, gradients = sizes.tokens, sizes.targets, sizes.grad_nsamples > 0
    peak, work, statistics_read = 0.0, Work(), cache_bytes(shapes, gradients)
    for layer in shapes.layers:
        weights = layer.parameters * sizes.stored.itemsize * (1 + targets)
        for index, (n, outputs) in enumerate(layer.inputs):
            statistics = gradients * sum(2 * m * m for _, later in layer.inputs[index:] for m in later)
            sums = targets * 8 * (2 * n * n + shapes.hidden * n)
            roots = [(24 * m * m, 8 * m * m) if gradients else (0, 0) for m in outputs]  # of F: to find, to hold
            held = 16 * n * n + max(max(f, r + _decomposition(m, n)) for m, (f, r) in zip(outputs, roots, strict=True))
            # Roots of F of the linears that feed neurons, which serve all targets.
            held += gradients * sum(8 * m * m for m in outputs if any((m, n) in mlp[:-1] for _, mlp in layer.mlps))
            batch = _batch(shapes, sizes.compute, False) + 4 * n * (
                3 * TOKENS_PER_BATCH + n
            )  # x, x', x − x', a product
            peak = max(peak, statistics + weights + sums + max(held, batch))
            # The layer up to these linears, of the original and of every target: on average half of it.
            _pass(work, layer, shapes, sizes, (1 + targets) * sizes.nsamples / 2)
            for _ in range(targets):
                _gram(work, tokens, n, sizes.compute)
                work.products[F32] += 2 * tokens * n * n
                work.memory += 12 * tokens * n + 20 * n * n * tokens / TOKENS_PER_BATCH
                work.decompositions["cholesky", F64, n] += 2
        for m, n in layer.shapes:
            small = min(m, n)
            work.products[F64] += targets * (2 * m * n * 3 * n + _factoring_flops(m, n, gradients))  # update first
            work.decompositions["eigh", F64, small] += targets
        stream = sum(2 * tokens * shapes.hidden * n for n, outputs in layer.inputs if shapes.hidden in outputs) / 2
        work.products[F32] += targets * stream
        _pass(work, layer, shapes, sizes, (1 + targets) * sizes.nsamples)
    result = targets * shapes.parameters * sizes.stored.itemsize
    disk = result + shapes.parameters * sizes.stored.itemsize  # one is made beside its shards
    work.disk += statistics_read + 2 * result
    streams = stream_bytes(shapes.hidden, tokens, sizes.compute, targets)
    work.disk += streams / 2 * len(shapes.layers) * (len(shapes.layers[0].inputs) + 2)
    return Stage("compress", _memory(shapes, sizes, peak, 1 + targets), disk + streams, work)


def _tuning(shapes: Shapes, sizes: RunSizes) -> Stage:
    """As if the model were as large as the original."""
    sizes = replace(sizes, compute=sizes.tuning or sizes.compute)
    tokens, layers, c = sizes.tokens, len(shapes.layers), sizes.compute.itemsize
    batch_size, batches, steps = steps_for(sizes.nsamples, sizes.seqlen)
    work, inside = Work(), 0.0
    for layer in shapes.layers:
        # Weights, gradients and their totals, values, and the tensors of the files; Adafactor's temporaries.
        held = (2 * c + 8 + sizes.stored.itemsize) * layer.parameters
        inside = max(inside, held + 8 * max(m * n for m, n in layer.shapes), held + _batch(shapes, sizes.compute, True))
        _pass(work, layer, shapes, sizes, (1 + sizes.targets) * sizes.nsamples)  # the original, and forwards
        _pass(work, layer, shapes, sizes, sizes.targets * sizes.nsamples, 2)  # again, and the gradients
        work.memory += sizes.targets * steps * ADAFACTOR_MOVED * 4 * layer.parameters
        work.disk += sizes.targets * steps * (2 * (sizes.stored.itemsize + 4) + 4) * layer.parameters
    work.products[sizes.compute] += sizes.targets * 6 * tokens * shapes.hidden * shapes.vocabulary
    work.memory += sizes.targets * LOGITS_MOVED * 4 * tokens * shapes.vocabulary
    states = c * batch_size * batches * sizes.seqlen * shapes.hidden * (layers + 1)
    disk = 3 * tokens * shapes.hidden * c
    disk += state_bytes(sum(layer.parameters for layer in shapes.layers))
    return Stage("compress: --refine weights", BASE + states + max(inside, _top(shapes, sizes)), disk, work)


def _top(shapes: Shapes, sizes: RunSizes) -> float:
    """Bytes while gradients of logits are computed: what lies outside the layers, logits, hidden states."""
    return 6 * 4 * LOGITS_AT_ONCE + sizes.compute.itemsize * (shapes.outside + TOKENS_PER_BATCH * 4 * shapes.hidden)


def _evaluation(shapes: Shapes, sizes: RunSizes) -> Stage:
    top = BASE + 3 * 4 * LOGITS_AT_ONCE + sizes.compute.itemsize * shapes.outside
    memory = max(top, _memory(shapes, sizes, _batch(shapes, sizes.compute, False)))
    work = Work()
    for layer in shapes.layers:
        _pass(work, layer, shapes, sizes, EVALUATED_TOKENS / sizes.seqlen)
    work.products[sizes.compute] += 2 * EVALUATED_TOKENS * shapes.hidden * shapes.vocabulary
    work.memory += 4 * 4 * EVALUATED_TOKENS * shapes.vocabulary
    disk = 2 * EVALUATED_TOKENS * shapes.hidden * sizes.compute.itemsize
    work.disk += disk * len(shapes.layers) + sizes.stored.itemsize * shapes.parameters
    return Stage("evaluate --offload_folder", memory, disk, work)
