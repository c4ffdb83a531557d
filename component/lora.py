"""Lets peft put LoRA adapters beside the modules of compressed models; imported where peft is installed."""

from typing import Any

from peft.tuners.lora import Linear, LoraModel

from hisvd.component.coded_linears import CODED_LINEARS
from hisvd.component.low_rank import MODULE_OF_FORM
from hisvd.errors import HiSVDError


class LoraBeside(Linear):
    """An adapter beside a module that has no weight matrix: y = module(x) + scaling · B A x."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            HiSVDError: it needs the weight matrix, as DoRA and PiSSA do.
        """
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        except AttributeError as error:
            if "'weight'" not in str(error):
                raise
            raise HiSVDError(
                f"{self._described()} has no weight matrix, which this kind of adapter reads; use plain LoRA (no "
                f"use_dora or the like, init_lora_weights=True){self._or_its_factors()}."
            ) from None

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the sum of the module's matrix and the adapter's has a higher rank, or another format.

        Raises:
            HiSVDError: always.
        """
        raise HiSVDError(
            f"The adapter of {self._described()} cannot be merged, since the sum would not keep the rank or format; "
            f"keep it beside the model (save_pretrained, PeftModel.from_pretrained){self._or_its_factors()}."
        )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # peft's own warns of types that it does not know

    def _described(self) -> str:
        module = self.get_base_layer()
        return f"{self.kwargs.get('target_name', 'the module')} ({type(module).__name__}: {module.extra_repr()})"

    def _or_its_factors(self) -> str:
        factors = [name for name, child in self.get_base_layer().named_children() if hasattr(child, "weight")]
        return f", or adapt its factors ({', '.join(factors)}), which are ordinary linears" if factors else ""


_lora_model: Any = LoraModel  # so that mypy says the same with peft and without
_inject_adapter = _lora_model.inject_adapter


def _inject_beside(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """`inject_adapter` after our modules are registered in the adapter's configuration, by peft's own means."""
    register = getattr(self.peft_config[adapter_name], "_register_custom_module", None)
    if register is not None:  # AdaLoRA and others then say themselves what they do not support
        register(dict.fromkeys((*CODED_LINEARS, *MODULE_OF_FORM.values()), LoraBeside))
    _inject_adapter(self, model, adapter_name, *args, **kwargs)


_lora_model.inject_adapter = _inject_beside
