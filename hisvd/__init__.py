"""HiSVD: training-free low-rank compression of Hugging Face language models.

Importing this package registers the quantization method `hisvd` with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads compressed folders.
"""

from hisvd.attention_residual import attention_residual_study
from hisvd.calibration import calibrate
from hisvd.component import hf_quantizer as _registration  # noqa: F401 (imported for its effect)
from hisvd.component.torchao_linears import to_torchao
from hisvd.compression import CompressedModel, compress
from hisvd.compression_page import compression_report
from hisvd.errors import HiSVDError
from hisvd.estimates import estimate
from hisvd.evaluation import evaluate
from hisvd.evaluation_page import evaluation_report
from hisvd.int6_export import export_sparse_int6_model
from hisvd.plan import Plan, plan
from hisvd.settings import CalibrationSettings, CompressionSettings, EvaluationSettings, Resources, StudySettings
from hisvd.utils.load_utils import load

__all__ = [
    "CalibrationSettings",
    "CompressedModel",
    "CompressionSettings",
    "EvaluationSettings",
    "HiSVDError",
    "Plan",
    "Resources",
    "StudySettings",
    "attention_residual_study",
    "calibrate",
    "compress",
    "compression_report",
    "estimate",
    "evaluate",
    "evaluation_report",
    "export_sparse_int6_model",
    "load",
    "plan",
    "to_torchao",
]
