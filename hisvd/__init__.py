"""HiSVD: training-free low-rank compression of Hugging Face language models.

Importing this package lets `AutoModelForCausalLM.from_pretrained` load compressed folders. PyTorch and transformers are
imported when one of its names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hisvd_autoload import install

if TYPE_CHECKING:  # a test compares these with _MODULES
    from hisvd.attention_residual import attention_residual_study as attention_residual_study
    from hisvd.calibration import calibrate as calibrate
    from hisvd.component.torchao_linears import to_torchao as to_torchao
    from hisvd.compression import CompressedModel as CompressedModel
    from hisvd.compression import compress as compress
    from hisvd.compression_page import compression_report as compression_report
    from hisvd.errors import HiSVDError as HiSVDError
    from hisvd.estimates import estimate as estimate
    from hisvd.evaluation import evaluate as evaluate
    from hisvd.evaluation_page import evaluation_report as evaluation_report
    from hisvd.int6_export import export_sparse_int6_model as export_sparse_int6_model
    from hisvd.planning import Plan as Plan
    from hisvd.planning import plan as plan
    from hisvd.quality_search import compress_within as compress_within
    from hisvd.settings import CalibrationSettings as CalibrationSettings
    from hisvd.settings import CompressionSettings as CompressionSettings
    from hisvd.settings import EvaluationSettings as EvaluationSettings
    from hisvd.settings import Resources as Resources
    from hisvd.settings import StudySettings as StudySettings
    from hisvd.utils.load_utils import load as load

_MODULES = {
    "CalibrationSettings": "settings",
    "CompressedModel": "compression",
    "CompressionSettings": "settings",
    "EvaluationSettings": "settings",
    "HiSVDError": "errors",
    "Plan": "planning",
    "Resources": "settings",
    "StudySettings": "settings",
    "attention_residual_study": "attention_residual",
    "calibrate": "calibration",
    "compress": "compression",
    "compress_within": "quality_search",
    "compression_report": "compression_page",
    "estimate": "estimates",
    "evaluate": "evaluation",
    "evaluation_report": "evaluation_page",
    "export_sparse_int6_model": "int6_export",
    "load": "utils.load_utils",
    "plan": "planning",
    "to_torchao": "component.torchao_linears",
}
__all__ = list(_MODULES)

install()


def __getattr__(name: str) -> Any:
    """Import what the public name `name` stands for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hisvd' has no attribute '{name}'")
    globals()[name] = value = getattr(import_module(f"hisvd.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
