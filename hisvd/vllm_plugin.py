"""Registers the quantization method `hisvd` with vLLM, so that `vllm serve FOLDER` runs compressed folders.

vLLM merges the linears that read one input (q, k and v; gate and up). The parts of such a layer may be dense, narrow
or factored, at ranks of their own: one product makes everything that reads the input, one more product per factored
part follows, and one gather puts the rows of pivoted parts in order. Written for vLLM 0.32.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from hisvd.component.hf_quantizer import METHOD
from hisvd.component.low_rank import MODULE_OF_FORM, select_columns
from hisvd.factor_forms import DENSE, FORMS, Entries, Shape, form_of
from hisvd.integer_codes import INTEGERS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Shard = str | int | None  # what vLLM's loader calls a part of a merged layer; None: the layer has one part
# vLLM's merged layers: the name of each part in the checkpoint.
MERGED: dict[str, dict[Shard, str]] = {
    "qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "gate_up_proj": {0: "gate_proj", 1: "up_proj"},
}
# Reading this many parameters takes as long as what a factored part needs besides: a second product, and for pivoted
# parts a gather (SmolLM2's shapes, one and 16 tokens, float32 and bfloat16, one core).
SECOND_PRODUCT, GATHER = 100_000, 50_000


def register() -> None:
    """What vLLM calls in each of its processes; a second call changes nothing."""
    register_quantization_config(METHOD)(HiSVDConfig)


class HiSVDConfig(QuantizationConfig):
    """The `quantization_config` of config.json: a table from the linears' names to form, rank and new sizes."""

    def __init__(self, modules: dict[str, dict]) -> None:
        super().__init__()
        self.modules = modules

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HiSVDConfig":
        """From config.json.

        Raises:
            ValueError: the model stores linears in INT6, or in a form that this version does not know.
        """
        for name, entry in config["modules"].items():
            if entry["form"] == "int6":
                raise ValueError(
                    f"hisvd: vLLM cannot run linears stored in INT6, such as {name}; compress the model again without "
                    "--export int6."
                )
            if entry["form"] in INTEGERS:
                raise ValueError(
                    f"hisvd: vLLM cannot run linears stored in {entry['form']} yet, such as {name}; compress the model "
                    "again with --target_compression and without --linear_dtype."
                )
            if entry["form"] not in (DENSE, "narrow", *MODULE_OF_FORM):
                raise ValueError(f"hisvd: {name} has the unknown form '{entry['form']}'; install a newer hisvd.")
        return cls(config["modules"])

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        """Refuse families that are not supported; vLLM calls it once it has read the whole config.json.

        Raises:
            ValueError: a mixture of experts, or any other family that is not in FAMILIES.
        """
        family = getattr(hf_config, "model_type", None)
        if family not in FAMILIES:
            raise ValueError(
                f"hisvd: compressed models of the family '{family}' do not run in vLLM, only {', '.join(FAMILIES)} do; "
                "use transformers, or compress the model again with --export dense or plain."
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method for the linear that vLLM calls `prefix`; None for layers of other kinds.

        Raises:
            ValueError: vLLM splits the layer among several processes.
        """
        if not isinstance(layer, LinearBase):
            return None
        if get_tensor_model_parallel_world_size() > 1:
            raise ValueError("hisvd: factors cannot be split among processes; use --tensor-parallel-size 1.")
        parent, _, name = prefix.rpartition(".")
        paths = {shard: f"{parent}.{part}" for shard, part in MERGED.get(name, {None: name}).items()}
        if self.modules.keys().isdisjoint(paths.values()):
            return UnquantizedLinearMethod()
        return HiSVDLinearMethod({shard: self.modules.get(path, {"form": DENSE}) for shard, path in paths.items()})

    def get_name(self) -> str:
        """As in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any dtype that plain linears run in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """There are no kernels of our own, so any GPU will do."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []


def stored_tensors(entry: dict, shape: Shape, dtype: torch.dtype) -> Entries:
    """What the checkpoint holds for a linear of weight (m, n) = `shape`, without its bias, as meta tensors."""
    outputs, inputs = shape
    with torch.device("meta"):
        if entry["form"] in (DENSE, "narrow"):
            return {"weight": torch.empty(outputs, inputs, dtype=dtype)}
        return MODULE_OF_FORM[entry["form"]](inputs, outputs, entry["rank"], bias=False).to(dtype).state_dict()


def register_shards(layer: Any, name: str, shards: dict[Shard, torch.Tensor]) -> None:
    """Add the parameter `name` ("base.weight", in a module `base` if need be): the shards one after another, flat.

    The loader of the parameter raises ValueError for a tensor of the wrong shape.
    """
    any_shard = next(iter(shards.values()))
    flat = torch.zeros(sum(t.numel() for t in shards.values()), dtype=any_shard.dtype)
    parameter: Any = nn.Parameter(flat, requires_grad=False)
    parameter.shapes, parameter.loaded = {shard: t.shape for shard, t in shards.items()}, set()

    def load(_: nn.Parameter, tensor: torch.Tensor, shard: Shard = None) -> None:
        expected = parameter.shapes.get(shard)
        if tensor.shape != expected:
            found = tuple(tensor.shape)
            raise ValueError(f"hisvd: {layer.prefix}.{name} ({shard}) has the shape {found}, not {tuple(expected)}.")
        split_shards(parameter)[shard].copy_(tensor)
        parameter.loaded.add(shard)

    parameter.weight_loader = load
    *path, leaf = name.split(".")
    owner = layer
    for step in path:
        if not hasattr(owner, step):
            owner.add_module(step, nn.Module())
        owner = getattr(owner, step)
    owner.register_parameter(leaf, parameter)


def split_shards(parameter: Any) -> dict[Shard, torch.Tensor]:
    """Views of a parameter made by `register_shards`, by shard."""
    flat = parameter.data.split([shape.numel() for shape in parameter.shapes.values()])
    return {shard: t.view(shape) for t, (shard, shape) in zip(flat, parameter.shapes.items(), strict=True)}


def take_shards(layer: Any) -> dict[Shard, Entries]:
    """The tensors of every shard by name, whose parameters are removed from `layer`.

    Raises:
        ValueError: the checkpoint had a tensor for some of the shards that need it, but not for all.
    """
    shards: dict[Shard, Entries] = {}
    parameter: Any
    for name, parameter in list(layer.named_parameters()):
        if not hasattr(parameter, "shapes"):
            continue
        missing = parameter.shapes.keys() - parameter.loaded
        if missing and parameter.loaded:  # nothing is loaded at all with --load-format dummy
            raise ValueError(f"hisvd: the checkpoint lacks {name} of {layer.prefix} ({', '.join(map(str, missing))}).")
        for shard, tensor in split_shards(parameter).items():
            shards.setdefault(shard, {})[name] = tensor
        owner, _, leaf = name.rpartition(".")
        delattr(layer.get_submodule(owner), leaf)
    return shards


@dataclass(frozen=True)
class Part:
    """One linear of a merged layer: its rows are `order` of [first x (if `keeps_first`); second (first x)]."""

    first: torch.Tensor
    second: torch.Tensor | None
    keeps_first: bool
    order: torch.Tensor


def part_of(tensors: Entries) -> Part:
    """The part with these tensors as it runs fastest: dense, as two factors, or pivoted."""
    name = form_of(tensors)
    if name is None:
        return _whole(tensors["weight"])
    inner, outer = (tensors[f"{path}.weight"] for path in (FORMS[name].inner, FORMS[name].outer))
    rank, inputs = inner.shape
    is_pivoted = "permutation" in tensors
    outputs = len(outer) + (rank if is_pivoted else 0)
    dense = outputs * inputs
    two_factors = rank * (outputs + inputs) + SECOND_PRODUCT
    pivoted = rank * (outputs + inputs - rank) + SECOND_PRODUCT + GATHER
    if is_pivoted and pivoted < min(dense, two_factors):
        return Part(inner, outer, True, tensors["permutation"].long())
    # The product with the unit matrix instead of the inner factor is the left factor of two, whatever the form.
    right = inner.float() if dense <= two_factors else torch.eye(rank, dtype=torch.float32, device=inner.device)
    product = FORMS[name].product(right, outer.float(), tensors).to(inner.dtype)
    if dense <= two_factors:
        return _whole(product)
    return Part(inner, product, False, torch.arange(outputs, device=inner.device))


def _whole(weight: torch.Tensor) -> Part:
    return Part(weight, None, True, torch.arange(len(weight), device=weight.device))


class HiSVDLinearMethod(LinearMethodBase):
    """Loads and runs one linear layer of vLLM; `entries` are the table's entries of its parts, in order."""

    def __init__(self, entries: dict[Shard, dict]) -> None:
        self.entries = entries
        self.dense = UnquantizedLinearMethod()  # the platform's own matrix product, of packed weights on CPUs

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *_: Any,
        params_dtype: torch.dtype,
        **__: Any,
    ) -> None:
        """Register one parameter per name in the checkpoint, and give `layer` the sizes that narrow parts have."""
        sizes = [e.get("out", size) for e, size in zip(self.entries.values(), output_partition_sizes, strict=True)]
        inputs = next(iter(self.entries.values())).get("in", input_size_per_partition)
        layer.input_size = layer.input_size_per_partition = inputs
        layer.output_size = layer.output_size_per_partition = sum(sizes)  # vLLM makes a bias of this size next
        layer.output_partition_sizes = sizes
        if hasattr(layer, "output_sizes"):
            layer.output_sizes = sizes
        stored: dict[str, dict[Shard, torch.Tensor]] = {}
        for (shard, entry), size in zip(self.entries.items(), sizes, strict=True):
            for name, tensor in stored_tensors(entry, (size, inputs), params_dtype).items():
                stored.setdefault(name, {})[shard] = tensor
        for name, shards in stored.items():
            register_shards(layer, name, shards)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack the matrices that read the layer's input, pack every matrix, and note where each row of y is.

        Raises:
            ValueError: the checkpoint lacks a tensor of one of the parts.
        """
        tensors = take_shards(layer)
        parts = [part_of(tensors[shard]) for shard in self.entries]
        offsets = accumulate((len(part.order) for part in parts), initial=0)
        order = torch.cat([part.order + offset for part, offset in zip(parts, offsets, strict=False)])
        layer.hisvd_order = None if bool((order.diff() == 1).all()) else order
        layer.hisvd_parts = [(len(p.first), p.keeps_first, p.second is not None) for p in parts]
        layer.hisvd_first = self._packed(torch.cat([part.first for part in parts]))
        layer.hisvd_seconds = nn.ModuleList(self._packed(p.second) for p in parts if p.second is not None)

    def _packed(self, weight: torch.Tensor) -> nn.Module:
        """A module that `self.dense` can apply."""
        module = nn.Module()
        module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.dense.process_weights_after_loading(module)
        return module

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map (tokens, n) to (tokens, m)."""
        if not layer.hisvd_seconds:
            return self.dense.apply(layer.hisvd_first, x, bias)
        first = self.dense.apply(layer.hisvd_first, x)
        seconds, pieces, start = iter(layer.hisvd_seconds), [], 0
        for size, keeps_first, has_second in layer.hisvd_parts:
            part = first[..., start : start + size]
            start += size
            pieces += [part] if keeps_first else []
            pieces += [self.dense.apply(next(seconds), part)] if has_second else []
        y = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]
        if layer.hisvd_order is not None:
            y = select_columns(y, layer.hisvd_order)
        return y if bias is None else y + bias
