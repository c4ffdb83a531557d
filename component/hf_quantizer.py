"""Registers the quantization method `hisvd` with transformers, so that `from_pretrained` loads compressed folders."""

from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hisvd.component.experts import SeparateExperts
from hisvd.component.families import separate_experts
from hisvd.component.int6_linear import check_int6_modules
from hisvd.component.low_rank import swap_linears

METHOD = "hisvd"


@register_quantization_config(METHOD)
class HiSVDConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of config.json: which linears are factored, how, at which rank."""

    def __init__(self, modules: dict[str, dict], format_version: int = 1, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment] # registered methods are strings outside of its enum
        self.format_version = format_version
        self.modules = modules


@register_quantizer(METHOD)
class HiSVDQuantizer(HfQuantizer):
    """Swaps the factored modules into the empty model; transformers then loads the weights as usual."""

    quantization_config: HiSVDConfig
    experts_are_separate = False

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
        check_int6_modules(model)

    def is_serializable(self) -> bool:
        """`save_pretrained` of a loaded model writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters, so they can be fine-tuned."""
        return True
