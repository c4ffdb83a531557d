"""The INT6 2:4 pairwise sparse format for a model in memory, without calibration."""

from torch import nn

from hisvd.component.int6_linear import INT6SparseLinear
from hisvd.errors import HiSVDError, naming
from hisvd.sparse_int6 import BITS, COLUMNS, FORMAT_NAME, PAIR_SPARSITY, USER_ALIAS


def export_sparse_int6_model(model: nn.Module, quality_gate_delta: float = 0.025) -> dict:
    """Pack the linears of a model into the INT6 2:4 pairwise sparse format by its plain rule: larger pairs are kept.

    To fit codes to calibration text, and to store only as many as the perplexity allows, use `hisvd.compress` with
    `CompressionSettings(export="int6")`.

    Args:
        model: Any module on any device; every `nn.Linear` in it with at least 64 inputs is packed. It is left
            unchanged: the new modules are put in by `set_submodule`, as below.
        quality_gate_delta: The rise of the perplexity that the caller accepts, as a fraction (0.025: 2.5 %). It is
            recorded in the result; nothing is measured here.

    Returns:
        A dict:
        "format", "user_alias": names of the format.
        "quality_gate_delta": as given.
        "bits_per_stored_value": 6.
        "pair_sparsity": which of the values are kept.
        "effective_payload_bits_per_dense_weight_before_metadata": 3.0, half of the values in 6 bits each; metadata take
            0.5 bits per weight more, and scales 32 bits per row.
        "layers": the new INT6SparseLinear of each linear by its name. A linear with several names has the same new
            module under each of them.

    Raises:
        HiSVDError: a weight is not finite (the linear is named), or `quality_gate_delta` is negative.

    Example:
        >>> import hisvd
        >>> export = hisvd.export_sparse_int6_model(model)
        >>> for name, module in export["layers"].items():
        ...     model.set_submodule(name, module)
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
