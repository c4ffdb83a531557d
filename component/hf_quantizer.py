"""Registers the quantization method `hisvd` with transformers, so that `from_pretrained` loads compressed folders."""

import importlib
import importlib.util
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hisvd.component.coded_linears import CODED_LINEARS, check_buffers
from hisvd.component.experts import SeparateExperts
from hisvd.component.families import separate_experts
from hisvd.component.fold import fold_permutations
from hisvd.component.low_rank import MODULES, PivotedLinear, swap_linears
from hisvd.component.mapped_files import in_file
from hisvd.errors import HiSVDError
from hisvd.integer_codes import INTEGERS
from hisvd.schema import SIZE, check

METHOD = "hisvd"
# Version 1 lacked the entry below; the tensors are the same. Integer codes came with version 3.
FORMAT_VERSION, CODES_VERSION = 2, 3
# transformers reads this entry of config.json as the name of the weights' file, after it has consulted the quantizer.
# A transformers that does not know the method, and would draw random weights, raises instead, quoting the entry.
GUARD = {
    "transformers_weights": "none, since this model is compressed by HiSVD: install the package hisvd to load it, or, "
    "where TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set, import hisvd first"
}


def version_of(modules: dict[str, dict]) -> int:
    """The lowest version of the format that has all that the table of `modules` needs."""
    return CODES_VERSION if any(entry["form"] in INTEGERS for entry in modules.values()) else FORMAT_VERSION


def config_entries(modules: dict[str, dict]) -> dict:
    """The entries of config.json that describe the compressed `modules` (see swap_linears)."""
    table = {"quant_method": METHOD, "format_version": version_of(modules), "modules": modules}
    return {"quantization_config": table} | GUARD


def check_entries(entries: dict[str, Any], source: str) -> None:
    """Refuse a `quantization_config` of HiSVD, from the file `source`, that is damaged or of a later version.

    Raises:
        HiSVDError: it is.
    """
    check(entries, {"modules": MODULES, "format_version?": SIZE}, source, "quantization_config")
    if entries.get("format_version", 1) > CODES_VERSION:
        raise HiSVDError(
            f"{source} is in version {entries['format_version']} of the format, but this version of HiSVD only knows "
            f"versions up to {CODES_VERSION}; install a newer one."
        )


@register_quantization_config(METHOD)
class HiSVDConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of config.json: which linears are factored, how, at which rank."""

    def __init__(self, modules: dict[str, dict], format_version: int = 1, **_: Any) -> None:
        check_entries({"modules": modules, "format_version": format_version}, "config.json")
        self.quant_method = METHOD  # type: ignore[assignment] # registered methods are strings outside of its enum
        self.format_version = version_of(modules)  # what save_pretrained writes
        self.modules = modules


@register_quantizer(METHOD)
class HiSVDQuantizer(HfQuantizer):
    """Swaps the factored modules into the empty model; transformers then loads the weights as usual."""

    quantization_config: HiSVDConfig
    experts_are_separate = False

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Take GUARD away: the first method that sees the configuration, before the weights' files are looked for."""
        for key in GUARD.keys() & vars(config).keys():
            delattr(config, key)
        return config

    update_tp_plan = update_attn_implementation  # the same up to transformers 5.17

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        separate_experts(model)
        self.experts_are_separate = any(isinstance(module, SeparateExperts) for module in model.modules())
        swap_linears(model, self.quantization_config.modules)
        for name in self.quantization_config.modules:
            # Families that initialize a linear's weights from its parent, as GPT-2 does, would not find them; a
            # parent that computes buffers, as GPT-J's attention does, must still do so.
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            parent._is_hf_initialized = not parent._non_persistent_buffers_set

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        """Keep the conversions that rename tensors; nothing is to be merged into fused experts.

        transformers calls it after the modules are swapped: from 5.8 on without `model`, from 5.21 on with it.
        """
        return [c for c in weight_conversions if not (self.experts_are_separate and isinstance(c, WeightConverter))]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        release_files(model)
        check_buffers(model)
        fold_permutations(model)
        support_lora()
        if not any(isinstance(module, CODED_LINEARS) for module in model.modules()):
            # Trainer, .half() and .float() ask for it, but factors are ordinary parameters.
            model.is_quantized = False  # type: ignore[assignment] # not declared, so taken for a module
            for part in model.modules():
                if isinstance(part, PreTrainedModel):
                    vars(part.config).pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        """`save_pretrained` of a loaded model writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters, so they can be fine-tuned; modules of codes need adapters beside them."""
        return True


def release_files(model: nn.Module) -> None:
    """Copy the buffers of our modules where they alone keep the mapped files in memory.

    They keep their dtype, so they stay in the files when all parameters have been converted to another one. Where a
    parameter is in a file as well, that is needed in any case.
    """
    if any(map(in_file, model.parameters())):
        return
    for module in model.modules():
        if isinstance(module, (PivotedLinear, *CODED_LINEARS)):
            for name, buffer in module.named_buffers(recurse=False):
                if in_file(buffer):
                    setattr(module, name, buffer.clone())


def support_lora() -> None:
    """Teach peft, where it is installed, to put LoRA adapters beside the modules of compressed models."""
    if importlib.util.find_spec("peft"):
        try:
            importlib.import_module("hisvd.component.lora")
        except Exception as error:  # whatever a broken installation raises; the model is complete without it
            logging.getLogger("hisvd").warning("LoRA on factored modules is unavailable, since peft fails: %s", error)


_to_diff_dict = PreTrainedConfig.to_diff_dict


def _to_guarded_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """What config.json holds: `save_pretrained` drops GUARD's entry, also from a configuration that needs it."""
    guarded = isinstance(getattr(config, "quantization_config", None), HiSVDConfig)
    return _to_diff_dict(config) | (GUARD if guarded else {})


PreTrainedConfig.to_diff_dict = _to_guarded_dict  # type: ignore[assignment, method-assign]
