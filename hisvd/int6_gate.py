"""Which linears are stored in INT6: as many as the perplexity on held-out calibration text allows.

Linears are ranked by the second-order estimate of the loss that their code adds per weight, and the longest prefix of
that list whose model stays within the bound is exported. The search starts where the estimates add up to the bound;
every step runs the held-out text once. Linears get their final codes when a step first needs them.
"""

import itertools
import math

import torch
from safetensors.torch import load_file
from torch import nn

from hisvd.cached_moments import input_moment, output_moment
from hisvd.factor_forms import Entries
from hisvd.factoring import CompressionJob
from hisvd.int6_fit import SWEEPS, int6_entries
from hisvd.layer_tensors import compressed_layer, entries_of, replace_entries
from hisvd.narrowing import Kept
from hisvd.quantization import added_loss
from hisvd.schema import TEXT
from hisvd.shape_utils import Sublayer
from hisvd.sparse_int6 import COLUMNS
from hisvd.utils.data_utils import default_batch_size
from hisvd.utils.eval_utils import streamed_loss
from hisvd.utils.files import read_json, write_json, write_tensors
from hisvd.utils.progress import progress_bar
from hisvd.utils.save_utils import ModelWriter
from hisvd.utils.streaming import StreamedModel
from hisvd.whitening_svd import H_DAMPING, cholesky_root


def export_within(job: CompressionJob, target: float, writer: ModelWriter) -> dict:
    """Put INT6 codes into the shards of `writer` so that the perplexity rises by at most the settings' fraction.

    Returns what the report says about it: perplexities before and after, and the linears exported and not exported. A
    run that is killed after the decision keeps it.

    Raises:
        HiSVDError: the cache has no held-out text, or is damaged.
    """
    cache, codes, delta = job.cache, Int6Codes(job, target, writer), job.settings.quality_gate_delta
    assert delta is not None  # else all linears are exported
    decision = writer.work / "int6_gate.json"
    if not decision.exists():
        text = HeldOutText(codes)
        losses = codes.estimated_losses()
        candidates = [s for s in cache.sublayers if s.in_features >= COLUMNS]
        order = [s.name for s in sorted(candidates, key=lambda s: losses[s.name] / s.size)]
        expected = sum(total <= math.log1p(delta) for total in itertools.accumulate(losses[name] for name in order))
        found = longest_within(delta, order, expected, text)
        rest = sorted({s.name for s in cache.sublayers} - set(found["exported"]))
        write_json(decision, {"delta": delta, **found, "not_exported": rest})
    report = read_json(decision, {"exported": [TEXT]})
    for index in range(cache.num_layers):
        writer.write_shard(index, codes.shard(index, set(report["exported"])))
    return report


def longest_within(delta: float, order: list[str], expected: int, text: "HeldOutText") -> dict:
    """The longest prefix of `order` that raises the perplexity of `text` by at most `delta`, and the perplexities.

    Tries `expected` first, moves away in growing steps until the bound lies between two tries, then bisects.
    """
    before = after = text.perplexity(set())
    fits, too_many = 0, len(order) + 1
    count, step = min(max(expected, 1), len(order)), max(1, expected // 4)
    with progress_bar(None, "quality gate") as bar:
        while too_many - fits > 1:
            perplexity = text.perplexity(set(order[:count]))
            if perplexity <= (1 + delta) * before:
                fits, after = count, perplexity
            else:
                too_many = count
            if too_many > len(order):
                count = min(count + step, len(order))
            elif not fits:
                count = max(count - step, 1)
            else:
                count = (fits + too_many) // 2
            step *= 2
            bar.set_postfix(exported=fits, perplexity=after)
            bar.update()
    figures = {"perplexity_before": before, "perplexity_after": after, "tokens": text.tokens[:, 1:].numel()}
    return {**figures, "exported": sorted(order[:fits])}


class Int6Codes:
    """The INT6 codes of the linears in the shards of `writer`, made on first use and kept beside them."""

    def __init__(self, job: CompressionJob, target: float, writer: ModelWriter) -> None:
        self.job, self.checkpoint, self.cache, self.writer = job, job.checkpoint, job.cache, writer
        self.target = target

    def estimated_losses(self) -> dict[str, float]:
        """The loss that the code of each linear adds, ½ ‖F^{1/2} (W − Ŵ) H^{1/2}‖²; without gradients, F is left out.

        It is estimated for codes fitted in one pass, which are quick to make.
        """
        losses = {}
        whitening = "two_sided" if self.cache.has_gradients else "input"
        for index in progress_bar(range(self.cache.num_layers), "estimating INT6 losses"):
            statistics, shard = self.cache.read_layer(index), self.writer.read_shard(index)
            for members in self.cache.groups_of(index):
                moment, kept = self._moment(members, statistics)
                root = cholesky_root(moment, H_DAMPING)
                for s in members:
                    stored = self._stored(s, shard)
                    coded = self._coded(stored, moment, sweeps=0)
                    rows = kept.rows if kept and not kept.at_output else None
                    f = output_moment(s, statistics, whitening, self.job.device, rows)
                    losses[s.name] = added_loss(stored, coded, root, f)
        return losses

    def shard(self, index: int, exported: set[str]) -> Entries:
        """The tensors of layer `index` with the codes of the sublayers in `exported` instead of their weights."""
        tensors, statistics = self.writer.read_shard(index), None
        for s in self.cache.sublayers_of(index):
            if s.name not in exported:
                continue
            path = self.writer.work / f"int6_{s.name}.safetensors"
            if not path.exists():
                statistics = statistics or self.cache.read_layer(index)
                code = self._coded(self._stored(s, tensors), self._moment([s], statistics)[0], SWEEPS)
                write_tensors(path, {name: tensor.cpu() for name, tensor in code.items()})
            replace_entries(self.checkpoint, s, tensors, load_file(path))
        return tensors

    def _moment(self, members: list[Sublayer], statistics: Entries) -> tuple[torch.Tensor, Kept | None]:
        """E[x xᵀ] of what `members` read, without removed neurons, and which neurons of their MLP stay."""
        moment = input_moment(members[0], statistics, self.job.device)
        kept = self.job.neurons_kept(self.target, members, statistics)
        return moment if kept is None or not kept.at_output else moment[kept.neurons][:, kept.neurons], kept

    def _stored(self, sublayer: Sublayer, shard: Entries) -> Entries:
        entries = entries_of(self.checkpoint, sublayer, shard)
        return {name: tensor.to(self.job.device) for name, tensor in entries.items()}

    def _coded(self, stored: Entries, moment: torch.Tensor, sweeps: int) -> Entries:
        return int6_entries(stored, moment if self.job.settings.int6_mode == "calibrated" else None, sweeps)


class HeldOutText:
    """The held-out calibration text, run through the compressed layers, one in memory."""

    def __init__(self, codes: Int6Codes) -> None:
        """Embed the text.

        Raises:
            HiSVDError: the cache has none.
        """
        self.codes, self.cache = codes, codes.cache
        self.tokens = self.cache.read_held_out()
        batch_size = default_batch_size(self.tokens.shape[1])
        self.streamed = StreamedModel(codes.checkpoint, batch_size, codes.job.device, self.cache.dtype)
        self.hidden = self.streamed.pair(codes.writer.work / "held_out", self.tokens, keep_first=True)
        self.arguments = self.streamed.embed(self.tokens, self.hidden[0])

    @torch.no_grad()
    def perplexity(self, exported: set[str]) -> float:
        """The perplexity of the model with the sublayers in `exported` in INT6."""

        def layer_of(index: int) -> nn.Module:
            tensors = self.codes.shard(index, exported)
            return compressed_layer(self.streamed, index, self.codes.job.shapes(self.codes.target, index), tensors)

        total = streamed_loss(self.streamed, self.tokens, self.hidden, self.arguments, layer_of)
        return math.exp(total / self.tokens[:, 1:].numel())
