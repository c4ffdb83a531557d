"""The calibration cache on disk: a folder with manifest.json and one safetensors file a decoder layer."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from hisvd.errors import HiSVDError
from hisvd.shape_utils import Sublayer
from hisvd.utils.files import sha256_of_file, sha256_of_tensors, write_json, write_tensors
from hisvd.utils.model_utils import open_safetensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# Per-sublayer spectra, small: all that a rank plan needs.
SPECTRA = ("singular_values", "whitened_singular_values")


@dataclass
class CalibrationCache:
    """One cache folder.

    `identity` is what the moments depend on (model and data fingerprints, nsamples, seqlen, dtype); two runs
    with the same identity may share a cache. `layers` lists the finished layers in order.
    """

    folder: Path
    identity: dict
    num_layers: int
    options: dict = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every layer is there."""
        return len(self.layers) == self.num_layers

    @property
    def sublayers(self) -> list[Sublayer]:
        """All sublayers of the model, layer by layer."""
        return [Sublayer(**s) for layer in self.layers for s in layer["sublayers"]]

    def sublayers_of(self, index: int) -> list[Sublayer]:
        """The sublayers of one decoder layer."""
        return [Sublayer(**s) for s in self.layers[index]["sublayers"]]

    def add_layer(self, tensors: dict[str, torch.Tensor], sublayers: list[Sublayer]) -> None:
        """Write the next layer's file, then the manifest that lists it."""
        file = f"layer_{len(self.layers):03d}.safetensors"
        write_tensors(self.folder / file, tensors)
        spectra = {name: t for name, t in tensors.items() if name.endswith(SPECTRA)}
        entry = {
            "file": file,
            "sha256": sha256_of_file(self.folder / file),
            "spectra_sha256": sha256_of_tensors(spectra),
            "sublayers": [asdict(s) for s in sublayers],
        }
        self.layers.append(entry)
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write manifest.json atomically."""
        manifest = {
            "format": "hisvd-calibration",
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "options": self.options,
            "num_layers": self.num_layers,
            "layers": self.layers,
        }
        write_json(self.folder / MANIFEST, manifest)

    def read_layer(self, index: int) -> dict[str, torch.Tensor]:
        """All tensors of one layer, checked against the manifest's checksum.

        Raises:
            HiSVDError: the file is missing, truncated or edited.
        """
        path = self.folder / self.layers[index]["file"]
        tensors = self._read(path)
        if sha256_of_file(path) != self.layers[index]["sha256"]:
            raise _damaged(path)
        return tensors

    def read_spectra(self) -> Iterator[dict[str, torch.Tensor]]:
        """The spectra of every layer in order, each checked; reads a small part of each file.

        Raises:
            HiSVDError: a file is missing, truncated or its spectra were edited.
        """
        for layer in self.layers:
            path = self.folder / layer["file"]
            spectra = self._read(path, SPECTRA)
            if sha256_of_tensors(spectra) != layer["spectra_sha256"]:
                raise _damaged(path)
            yield spectra

    def _read(self, path: Path, endings: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
        try:
            with open_safetensors(path) as file:
                return {k: file.get_tensor(k).clone() for k in file.keys() if k.endswith(endings)}  # noqa: SIM118
        except SafetensorError:
            raise _damaged(path) from None


def _damaged(path: Path) -> HiSVDError:
    return HiSVDError(
        f"The cache file {path} does not match its checksum in {MANIFEST}; delete the cache folder and run "
        "calibrate.py again."
    )


def cache_folder(output_dir: str, model_name: str, nsamples: int, seqlen: int) -> Path:
    """Where calibrate.py keeps the cache of these settings."""
    return Path(output_dir) / f"{model_name}_n{nsamples}_s{seqlen}_with_hessian"


def read_cache(folder: Path) -> CalibrationCache:
    """Open a cache folder, finished or not.

    Raises:
        HiSVDError: no manifest, or one of another program or version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != "hisvd-calibration" or manifest["format_version"] != FORMAT_VERSION:
            raise ValueError
        return CalibrationCache(
            folder, manifest["identity"], manifest["num_layers"], manifest["options"], manifest["layers"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise HiSVDError(
            f"{folder} holds no readable {MANIFEST} of a HiSVD calibration cache; make one with calibrate.py."
        ) from None


def open_finished_cache(name: str) -> CalibrationCache:
    """Open the cache that `--calib_cache` names: the folder X, or X.pkl as a second spelling of it.

    Raises:
        HiSVDError: it is missing, unfinished, or a pickle file.
    """
    path = Path(name)
    if path.is_file():
        raise HiSVDError(
            f"{path} is a file (a pickle of another tool?), and HiSVD never loads pickles because they can run code; "
            "make a cache folder with calibrate.py and pass that."
        )
    folder = path.with_suffix("") if path.suffix == ".pkl" else path
    if not folder.is_dir():
        raise HiSVDError(f"The calibration cache {folder} does not exist; make it with calibrate.py.")
    cache = read_cache(folder)
    if not cache.complete:
        raise HiSVDError(
            f"The calibration in {folder} is not finished ({len(cache.layers)} of {cache.num_layers} layers); "
            "run the same calibrate.py command again to finish it."
        )
    return cache


def check_same_model(cache: CalibrationCache, fingerprint: str, model_folder: Path) -> None:
    """Refuse a cache that was made from another model.

    Raises:
        HiSVDError: the fingerprints differ; both are named.
    """
    if cache.identity["model"] != fingerprint:
        raise HiSVDError(
            f"The cache {cache.folder} was made from another model (fingerprint {cache.identity['model'][:12]}, "
            f"{cache.options.get('model_path')}) than {model_folder} (fingerprint {fingerprint[:12]}); "
            "run calibrate.py on this model."
        )
