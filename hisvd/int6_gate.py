"""Which linears are stored in INT6: as many as the perplexity on held-out calibration text allows.

Linears are ranked by the second-order estimate of the loss that their code adds, a weight; the longest start of that
list is taken whose model stays within the bound. Found by bisection: every step runs the held-out text once.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from hisvd.calibration_cache import CalibrationCache, input_moment, output_moment
from hisvd.component.low_rank import dense_weight, modules_of, swap_linears
from hisvd.int6_fit import int6_entries
from hisvd.shape_utils import FactorForm, Sublayer
from hisvd.utils.data_utils import default_batch_size
from hisvd.utils.eval_utils import tokens_at_once
from hisvd.utils.files import write_json, write_tensors
from hisvd.utils.model_utils import Checkpoint
from hisvd.utils.save_utils import ModelWriter
from hisvd.utils.streaming import StreamedModel
from hisvd.whitening_svd import H_DAMPING, cholesky_root, whitened

Entries = dict[str, torch.Tensor]  # a linear's state dict entries


def export_within(
    delta: float,
    checkpoint: Checkpoint,
    cache: CalibrationCache,
    writer: ModelWriter,
    ranks: dict[str, int],
    form: FactorForm,
    mode: str,
    device: torch.device,
) -> dict:
    """Put INT6 codes into the shards of `writer` so that the perplexity rises by at most `delta` (a fraction).

    Returns what the report says of it: perplexities before and after, and the linears exported and not.

    Raises:
        HiSVDError: the cache has no held-out text, or is damaged.
    """
    text = HeldOutText(checkpoint, cache, writer, ranks, form, device)
    decision = writer.folder / "int6_gate.json"
    if not decision.exists():  # else a killed run was about to put the codes into the shards
        damages = write_codes(checkpoint, cache, writer, mode, device)
        write_json(decision, {"delta": delta, **longest_within(delta, sorted(damages, key=damages.get), text)})
    report = json.loads(decision.read_text(encoding="utf-8"))
    for index in range(cache.num_layers):
        writer.write_shard(index, text.tensors(index, set(report["exported"])))
    decision.unlink()
    return report


def longest_within(delta: float, order: list[str], text: "HeldOutText") -> dict:
    """The longest start of `order` that raises the perplexity of `text` by at most `delta`, and the perplexities."""
    before = after = text.perplexity(set())
    fits, too_many = 0, len(order) + 1
    with tqdm(desc="quality gate", total=len(order).bit_length()) as bar:
        while too_many - fits > 1:
            count = (fits + too_many) // 2
            perplexity = text.perplexity(set(order[:count]))
            if perplexity <= (1 + delta) * before:
                fits, after = count, perplexity
            else:
                too_many = count
            bar.set_postfix(exported=fits, perplexity=after)
            bar.update()
    figures = {"perplexity_before": before, "perplexity_after": after, "tokens": text.tokens[:, 1:].numel()}
    return {**figures, "exported": sorted(order[:fits]), "not_exported": sorted(order[fits:])}


def codes_file(writer: ModelWriter, index: int) -> Path:
    """Where the INT6 codes of a layer wait for the decision."""
    return writer.folder / f"int6_{index:03d}.bin"


def write_codes(
    checkpoint: Checkpoint, cache: CalibrationCache, writer: ModelWriter, mode: str, device: torch.device
) -> dict[str, float]:
    """Write the INT6 codes of every linear beside the shards; the loss that each adds, a weight, by name.

    The estimate is ½ ‖F^{1/2} (W − Ŵ) H^{1/2}‖² over m n, without gradients that without F.
    """
    damages = {}
    whitening = "two_sided" if cache.has_gradients else "input"
    for index in tqdm(range(cache.num_layers), "INT6 codes"):
        statistics, shard, codes = cache.read_layer(index), writer.read_shard(index), {}
        for s in cache.sublayers_of(index):
            stored = entries_of(checkpoint, s, shard)
            stored = {name: tensor.to(device) for name, tensor in stored.items()}
            moment = input_moment(s, statistics, device)
            code = int6_entries(stored, moment if mode == "calibrated" else None)
            error = dense_weight(code, s.in_features) - dense_weight(stored, s.in_features)
            f = output_moment(s, statistics, whitening, device)
            damages[s.name] = whitened(error, cholesky_root(moment, H_DAMPING), f).square().sum().item() / (2 * s.size)
            codes |= {prefix_of(checkpoint, s) + name: tensor.cpu() for name, tensor in code.items()}
        write_tensors(codes_file(writer, index), codes)
    return damages


def prefix_of(checkpoint: Checkpoint, sublayer: Sublayer) -> str:
    """What the names of a sublayer's tensors in a shard start with."""
    return checkpoint.stored_name(f"{sublayer.name}.weight").removesuffix("weight")


def entries_of(checkpoint: Checkpoint, sublayer: Sublayer, tensors: Entries) -> Entries:
    """The state dict entries of a sublayer, without bias, among the tensors of a layer."""
    prefix = prefix_of(checkpoint, sublayer)
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix) and k != f"{prefix}bias"}


class HeldOutText:
    """The held-out calibration text, run through the compressed layers, one in memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: CalibrationCache,
        writer: ModelWriter,
        ranks: dict[str, int],
        form: FactorForm,
        device: torch.device,
    ) -> None:
        """Embed the text.

        Raises:
            HiSVDError: the cache has none.
        """
        self.checkpoint, self.cache, self.writer = checkpoint, cache, writer
        self.ranks, self.form = ranks, form
        self.tokens = cache.read_held_out()
        dtype = getattr(torch, cache.identity["dtype"].removeprefix("torch."))
        self.streamed = StreamedModel(checkpoint, default_batch_size(self.tokens.shape[1]), device, dtype)
        names = ("embedded", "held_out_0", "held_out_1")
        files = [self.streamed.file(writer.folder / f"{name}.bin", self.tokens) for name in names]
        self.embedded, *self.hidden = files
        inputs, self.arguments = self.streamed.first_inputs(self.tokens)
        self.embedded.write(inputs)

    def tensors(self, index: int, exported: set[str]) -> Entries:
        """The shard of layer `index` with the codes of the sublayers in `exported` in place of their weights."""
        tensors = self.writer.read_shard(index)
        codes = load_file(codes_file(self.writer, index))
        for s in self.cache.sublayers_of(index):
            if s.name in exported:
                prefix = prefix_of(self.checkpoint, s)
                for name in entries_of(self.checkpoint, s, tensors):
                    del tensors[prefix + name]
                tensors |= {prefix + name: t for name, t in entries_of(self.checkpoint, s, codes).items()}
        return tensors

    @torch.no_grad()
    def perplexity(self, exported: set[str]) -> float:
        """Of the model with the sublayers in `exported` in INT6."""
        streamed, source = self.streamed, self.embedded
        for index in range(self.cache.num_layers):
            layer, target = self._layer(index, self.tensors(index, exported)), self.hidden[index % 2]
            target.write(streamed.outputs(layer, index, source, self.arguments[index]))
            source = target
        total, chunk = 0.0, tokens_at_once(streamed.skeleton)
        for states, ids in zip(streamed.read(source), self.tokens.split(streamed.batch_size), strict=True):
            flat, labels = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(states.device)
            for part, part_labels in zip(flat.split(chunk), labels.split(chunk), strict=True):
                logits = streamed.logits(part).float()
                total += nn.functional.cross_entropy(logits, part_labels, reduction="sum").item()
        return math.exp(total / self.tokens[:, 1:].numel())

    def _layer(self, index: int, tensors: Entries) -> nn.Module:
        layer = self.streamed.layer(index)
        for s in self.cache.sublayers_of(index):
            entries = entries_of(self.checkpoint, s, tensors)
            swap_linears(layer, modules_of(s.type, entries, self.form, self.ranks[s.name]))
            layer.get_submodule(s.type).load_state_dict(entries, strict=False)
        return layer
