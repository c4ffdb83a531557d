"""HiSVD: training-free low-rank compression of Hugging Face language models.

Importing it registers the quantization method `hisvd` with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads compressed folders.
"""

from hisvd.attention_residual import attention_residual_study
from hisvd.component import hf_quantizer as _registration  # noqa: F401 (imported for its effect)
from hisvd.errors import HiSVDError
from hisvd.evaluation import evaluate
from hisvd.settings import EvaluationSettings, Resources, StudySettings
from hisvd.utils.load_utils import load

__all__ = [
    "EvaluationSettings",
    "HiSVDError",
    "Resources",
    "StudySettings",
    "attention_residual_study",
    "evaluate",
    "load",
]
