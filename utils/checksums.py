"""Checksums of a finished model's weights: SHA-256 of files in hisvd.json, CRC-32 of the parts of a `.pt` in itself."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from hisvd.errors import HiSVDError
from hisvd.schema import NUMBER, SIZE, TEXT
from hisvd.utils.files import check_regular, read_json, sha256_of_file
from hisvd.utils.model_folders import weight_file_names

REPORT = "hisvd.json"
CHECKSUMS = "weight_files_sha256"
# What is read again.
REPORT_SCHEMA = {
    "linear_numbers_before": SIZE,
    "source_model?": TEXT,
    "predicted_loss?": {"total": NUMBER},
    f"{CHECKSUMS}?": {"*": TEXT},
}
AGAIN = "create or copy the model again"


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """File name → SHA-256, for hisvd.json."""
    return {path.name: sha256_of_file(path) for path in files}


def verify_weights(path: Path) -> None:
    """Compare the weights of a finished model, a folder or a `.pt`, with their checksums; memory for 1 MiB is enough.

    Of a `.pt`, the bytes that nothing reads (padding between its parts) have none.

    Raises:
        HiSVDError: a weight file is damaged, missing or not one of the model's, or there are no checksums.
    """
    if path.is_file():
        _verify_pt(path)
        return
    report = read_json(path / REPORT, REPORT_SCHEMA) if (path / REPORT).is_file() else {}
    if CHECKSUMS not in report:
        raise HiSVDError(
            f"{path} holds no checksums (it was not written by HiSVD, or by an older version), so that nothing can be "
            "verified; create it again, or leave the verification out."
        )
    expected = report[CHECKSUMS]
    # What the index names is loaded, whatever else is in the folder.
    found = {file.name for file in path.glob("*.safetensors")} | set(weight_file_names(path))
    for name in sorted(found - expected.keys()):
        raise HiSVDError(f"{path / name} is no weight file of the model, says {REPORT}; move it away, or {AGAIN}.")
    for name, digest in expected.items():
        if sha256_of_file(check_regular(path / name)) != digest:
            raise HiSVDError(f"The weight file {path / name} does not match its checksum in {REPORT}; {AGAIN}.")


def _verify_pt(path: Path) -> None:
    """The same for a `.pt`, a zip archive that PyTorch writes without compression.

    Raises:
        HiSVDError: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile and the decompressors each raise types of their own
        raise HiSVDError(f"{path} is damaged ({error}); {AGAIN}.") from None
    if damaged is not None:
        raise HiSVDError(f"{path} is damaged: its part '{damaged}' does not match its checksum; {AGAIN}.")
