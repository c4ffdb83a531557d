"""What the entries of config.json must be, checked once, when it is read."""

from transformers import PreTrainedConfig

from hisvd.component.hf_quantizer import METHOD, check_entries
from hisvd.schema import SIZE, TEXT, Kind, check

MOST_LAYERS = 10_000
LAYERS = Kind(f"a whole number from 1 to {MOST_LAYERS}", lambda v: SIZE.holds(v) and v <= MOST_LAYERS)
# A family may give one size for every layer.
SIZES = Kind(SIZE.title, lambda v: all(map(SIZE.holds, v if isinstance(v, (list, tuple)) and v else [v])))
CONFIG = {
    "num_hidden_layers?": LAYERS,
    "hidden_size?": SIZE,
    "vocab_size?": SIZE,
    "num_attention_heads?": SIZES,
    "num_key_value_heads?": SIZES,
    "intermediate_size?": SIZES,
    "head_dim?": SIZES,
}
QUANTIZATION = {"quant_method": TEXT}


def check_config(config: PreTrainedConfig, source: str) -> None:
    """Refuse a configuration, from the file `source`, with impossible sizes or a damaged table of modules.

    Raises:
        HiSVDError: it has some.
    """
    text = config.get_text_config()
    found = {key: getattr(text, key, None) for key in (key.rstrip("?") for key in CONFIG)}
    check({key: value for key, value in found.items() if value is not None}, CONFIG, source)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        check(quantization, QUANTIZATION, source, "quantization_config")
        if quantization["quant_method"] == METHOD:
            check_entries(quantization, source)
