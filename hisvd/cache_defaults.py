"""What compression settings leave open and the calibration cache decides."""

from dataclasses import replace

from hisvd.calibration_cache import CalibrationCache
from hisvd.errors import HiSVDError
from hisvd.exports import EXPORTS
from hisvd.integer_codes import INTEGERS
from hisvd.settings import CompressionSettings
from hisvd.sparse_int6 import COLUMNS

# Rows of so many 16-bit numbers are what the kernels of GPUs and CPUs are made for (cuBLAS: 16 bytes), and of so many
# codes; linears whose smaller side is below the last number would lose too many choices.
ALIGNED, ALIGNED_CODES, SMALLEST_ALIGNED = 8, 32, 128
SAVING = 0.05  # the least that factors of such linears save


def resolved(settings: CompressionSettings, cache: CalibrationCache) -> CompressionSettings:
    """The settings with the defaults that depend on the cache.

    Raises:
        HiSVDError: they need what the cache does not have.
    """
    if settings.whitening == "two_sided" and not cache.has_gradients:
        raise HiSVDError(
            f"--whitening two_sided needs gradients, and {cache.folder} was made with --no_gradients; "
            "use --whitening input, or calibrate again with gradients."
        )
    if settings.export == "int6" and all(s.in_features < COLUMNS for s in cache.sublayers):
        raise HiSVDError(
            f"--export int6 finds nothing to store: no linear of this model has the {COLUMNS} inputs that the "
            "format needs; leave the option out."
        )
    allocation = settings.allocation or ("loss" if cache.has_gradients else "hisvd")
    whitening = settings.whitening or ("two_sided" if cache.has_gradients else "input")
    for name, value, default in (("rank_multiple", settings.rank_multiple, 1), ("min_saving", settings.min_saving, 0)):
        if value and value > default and allocation != "loss":
            raise HiSVDError(f"--{name} {value} needs --allocation loss, not {allocation}; change one of them.")
    large = allocation == "loss" and all(s.full_rank >= SMALLEST_ALIGNED for s in cache.sublayers)
    coded = settings.budget == "bytes" or settings.linear_dtype in INTEGERS
    multiple = settings.rank_multiple or ((ALIGNED_CODES if coded else ALIGNED) if large else 1)
    if settings.budget == "bytes":
        _check_bytes(allocation, whitening)
    return replace(
        settings,
        allocation=allocation,
        whitening=whitening,
        moves=_moves(settings, cache, allocation, whitening),
        rank_multiple=multiple,
        min_saving=settings.min_saving if settings.min_saving is not None else SAVING * large,
    )


def _check_bytes(allocation: str, whitening: str) -> None:
    """Refuse what does not go with a budget in bytes.

    Raises:
        HiSVDError: there is something.
    """
    if allocation != "loss" or whitening != "two_sided":
        raise HiSVDError(
            "--target_bytes needs --allocation loss and --whitening two_sided, and so a cache with gradients, not "
            f"{allocation} and {whitening}; change them, or use --target_compression."
        )


def _moves(settings: CompressionSettings, cache: CalibrationCache, allocation: str, whitening: str) -> str:
    """The moves that are made, by default all that cache and metric allow.

    Raises:
        HiSVDError: they do not go with the cache or with other settings.
    """
    stock, by_loss = EXPORTS[settings.export].stock, allocation == "loss" and whitening == "two_sided"
    if stock and settings.moves not in (None, "neurons"):
        raise HiSVDError(f"--export plain removes neurons alone, so it does not go with --moves {settings.moves}.")
    moves = settings.moves or ("neurons" if stock else "both" if by_loss and cache.has_neurons else "low_rank")
    needs = f"--moves {moves}" if not stock else "--export plain"
    if moves != "low_rank" and not by_loss:
        raise HiSVDError(
            f"{needs} needs --allocation loss and --whitening two_sided, not {allocation} and {whitening}; change "
            "them, or use --moves low_rank."
        )
    if moves != "low_rank" and not cache.has_neurons:
        raise HiSVDError(
            f"{needs} needs what calibration measures of the MLPs, and {cache.folder} lacks it (made with "
            "--no_gradients, or the model's family has no adapter); calibrate again, or use --moves low_rank."
        )
    return moves
