"""Lets transformers load compressed folders in processes that never import hisvd.

`import torch` calls `install` through the entry point group `torch.backends`; TORCH_DEVICE_BACKEND_AUTOLOAD=0 disables
that. The module stands outside the package hisvd, whose import would load torch and transformers, and costs well under
a millisecond: the package is imported once transformers meets a model of the quantization method `hisvd`.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LOOK_UP = "transformers.quantizers.auto"
# Loading imports both; whichever of them imports torch, and so calls `install`, is already half imported itself.
TARGETS = (LOOK_UP, "transformers.modeling_utils")


def install() -> None:
    """Have transformers' quantizer look-up import hisvd where it needs it, now or once it is imported."""
    if not _patch() and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds TARGETS like the other finders, and patches the look-up once they are imported."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The module's ordinary spec for TARGETS, None for any other."""
        if name not in TARGETS:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not cls)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            _patch_after(spec)
        return spec


def _patch_after(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute = loader.exec_module

    def execute_and_patch(module: ModuleType) -> None:
        execute(module)
        if _patch() and _Finder in sys.meta_path:
            sys.meta_path.remove(_Finder)

    loader.exec_module = execute_and_patch


def _patch() -> bool:
    """Patch the look-up of transformers; False where it is not imported to its end yet."""
    quantizer = getattr(sys.modules.get(LOOK_UP), "AutoHfQuantizer", None)
    if quantizer is None:
        return False
    supports = quantizer.supports_quant_method
    if getattr(supports, "__module__", None) == __name__:
        return True

    def supports_quant_method(quantization_config_dict: dict) -> bool:
        if quantization_config_dict.get("quant_method") == "hisvd":
            importlib.import_module("hisvd.component.hf_quantizer")  # registers the method
        return supports(quantization_config_dict)

    quantizer.supports_quant_method = staticmethod(supports_quant_method)
    return True
