"""HiSVD: training-free low-rank compression of Hugging Face language models.

Importing it registers the quantization method `hisvd` with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads compressed folders.
"""

from hisvd.component import hf_quantizer as _registration  # noqa: F401 (imported for its effect)
from hisvd.errors import HiSVDError
from hisvd.utils.load_utils import load

__all__ = ["HiSVDError", "load"]
