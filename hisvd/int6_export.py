"""The INT6 2:4 pairwise sparse format for a model that is in memory, without calibration."""

from torch import nn

from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.errors import HiSVDError, naming
from hisvd.sparse_int6 import BITS, COLUMNS, FORMAT_NAME, PAIR_SPARSITY, USER_ALIAS


def export_sparse_int6_model(model: nn.Module, quality_gate_delta: float = 0.025) -> dict:
    """Every linear of `model` in the INT6 2:4 pairwise sparse format, by its plain rule: larger pairs stay.

    Takes in any module, on any device; every `nn.Linear` with at least 64 inputs is packed. The model stays as it is:
    to make it sparse, put the new modules in, `model.set_submodule(name, module)` for each of the `layers`. To fit
    codes to calibration text, and to store only as many as the perplexity allows, use compress.py with --export int6.

    `quality_gate_delta` is the rise of the perplexity, as a fraction, that the caller will accept (0.025: 2.5 %). It is
    noted in the result for whoever measures; nothing is measured here.

    Returns:
        A dict with `format` and `user_alias` (names of the format), `quality_gate_delta`, `bits_per_stored_value`,
        `pair_sparsity`, `effective_payload_bits_per_dense_weight_before_metadata` (without metadata, 0.5 bits per
        weight, and scales, 32 bits per row), and `layers`, which maps the name of each linear to its INT6SparseLinear.
        A linear with several names has the same new one under each of them.

    Raises:
        HiSVDError: a weight is not finite (the linear is named), or `quality_gate_delta` is negative.
    """
    if not quality_gate_delta >= 0:
        raise HiSVDError(f"quality_gate_delta {quality_gate_delta} is not a number of at least 0; 0.025 means 2.5 %.")
    packed: dict[nn.Module, INT6SparseLinear] = {}
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and module.in_features >= COLUMNS:
            if module not in packed:
                with naming(name or "the model"):
                    packed[module] = INT6SparseLinear.from_dense(module)
            layers[name] = packed[module]
    return {
        "format": FORMAT_NAME,
        "user_alias": USER_ALIAS,
        "quality_gate_delta": quality_gate_delta,
        "bits_per_stored_value": BITS,
        "pair_sparsity": PAIR_SPARSITY,
        "effective_payload_bits_per_dense_weight_before_metadata": BITS / 2,  # half of the values are stored
        "layers": layers,
    }
