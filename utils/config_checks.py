"""What the entries of config.json must be, checked once, when it is read."""

from transformers import PreTrainedConfig

from hisvd.component.hf_quantizer import METHOD, check_entries
from hisvd.errors import HiSVDError
from hisvd.schema import COUNT, SIZE, TEXT, Kind, check

MOST_LAYERS = 10_000
MOST_POSITIONS = 2**24  # some families compute tables of all positions when a model is built
LAYERS = Kind(f"a whole number from 1 to {MOST_LAYERS}", lambda v: SIZE.holds(v) and v <= MOST_LAYERS)
POSITIONS = Kind(f"a whole number from 1 to {MOST_POSITIONS:,}", lambda v: SIZE.holds(v) and v <= MOST_POSITIONS)
# A family may give one size for every layer.
SIZES = Kind(SIZE.title, lambda v: all(map(SIZE.holds, v if isinstance(v, (list, tuple)) and v else [v])))
EXPERTS = ("num_experts", "num_local_experts")  # the families' names for the number of experts
EXPERTS_CHOSEN = "num_experts_per_tok"
CONFIG = {
    "num_hidden_layers?": LAYERS,
    "hidden_size?": SIZE,
    "vocab_size?": SIZE,
    "num_attention_heads?": SIZES,
    "num_key_value_heads?": SIZES,
    "intermediate_size?": SIZES,
    "head_dim?": SIZES,
    "max_position_embeddings?": POSITIONS,
    **{f"{key}?": COUNT for key in (*EXPERTS, EXPERTS_CHOSEN)},  # 0 in dense models of families with mixtures
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
    experts, chosen = experts_of(config), found[EXPERTS_CHOSEN]
    if experts and chosen is not None and not 0 < chosen <= experts:
        raise HiSVDError(
            f"'{EXPERTS_CHOSEN}' in {source} is {chosen}, but there are {experts} experts; correct it, or create the "
            "file again."
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        check(quantization, QUANTIZATION, source, "quantization_config")
        if quantization["quant_method"] == METHOD:
            check_entries(quantization, source)


def experts_of(config: PreTrainedConfig) -> int:
    """The number of experts in every mixture of a model; 0 where it has none."""
    text = config.get_text_config()
    return next((found for key in EXPERTS if (found := getattr(text, key, None))), 0)
