"""The calibration cache on disk: a folder with manifest.json and one safetensors file per decoder layer and pass.

The forward pass writes layer_000.safetensors upwards, the gradient pass gradients_000.safetensors from the top down.
tokens.safetensors holds the calibration text, for what compress.py measures again on the compressed layers.
"""

import itertools
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

from hisvd.cached_moments import packed_shape
from hisvd.component.adapter import Mlp
from hisvd.errors import HiSVDError
from hisvd.integer_codes import INTEGERS
from hisvd.schema import COUNT, FILE_NAME, OBJECT, SIZE, TEXT, one_of
from hisvd.shape_utils import Sublayer
from hisvd.utils.data_utils import token_fingerprint
from hisvd.utils.files import check_regular, read_json, sha256_of_file, sha256_of_tensor, write_json, write_tensors
from hisvd.utils.model_folders import open_safetensors
from hisvd.utils.model_utils import Checkpoint

FORMAT_VERSION = 5
AGAIN = "delete the cache folder and run calibrate.py again"
MANIFEST = "manifest.json"
TOKENS = "tokens.safetensors"
# Name endings of the small tensors, which are all that a rank plan needs.
SPECTRA = "singular_values"
REMOVAL = "removal_losses"  # of hidden neurons
ROUNDING = "rounding_errors"
LEADING_VECTORS = "Vh"
# The schema of manifest.json.
FILE = {"file": FILE_NAME, "sha256": TEXT, "small_tensors_sha256": {"*": TEXT}}
SUBLAYER = {
    "name": TEXT,
    "layer": COUNT,
    "type": TEXT,
    "input_group": TEXT,
    "out_features": SIZE,
    "in_features": SIZE,
}
IDENTITY = {
    "model": TEXT,
    "data": TEXT,
    "held_out?": TEXT,
    "nsamples": SIZE,
    "grad_nsamples": COUNT,
    "seqlen": SIZE,
    "dtype": one_of(*(f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64"))),
}
SCHEMA = {
    "format": one_of("hisvd-calibration"),
    "format_version": one_of(FORMAT_VERSION),
    "identity": IDENTITY,
    "options": OBJECT,
    "num_layers": SIZE,
    "layers": [FILE | {"sublayers": [SUBLAYER], "mlps": [{"inputs": [TEXT], "output": TEXT, "fused": SIZE}]}],
    "gradients": [FILE],
}


@dataclass
class CalibrationCache:
    """One cache folder.

    `identity` is what the content depends on (fingerprints of model, data and held-out text, nsamples, grad_nsamples,
    seqlen, dtype); two runs with the same identity may share a cache. `layers` lists the layers that the forward pass
    has finished, first to last, `gradients` those of the gradient pass, last to first.
    """

    folder: Path
    identity: dict
    num_layers: int
    options: dict = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)
    gradients: list[dict] = field(default_factory=list)

    @property
    def has_gradients(self) -> bool:
        """Whether the cache holds (or will hold) moments of the output gradients."""
        return self.identity["grad_nsamples"] > 0

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the calibration's forward passes."""
        return getattr(torch, self.identity["dtype"].removeprefix("torch."))

    @property
    def complete(self) -> bool:
        """Whether both passes have finished every layer."""
        return len(self.layers) == self.num_layers and len(self.gradients) == self.num_layers * self.has_gradients

    @property
    def sublayers(self) -> list[Sublayer]:
        """All sublayers of the model, layer by layer."""
        return [s for index in range(len(self.layers)) for s in self.sublayers_of(index)]

    def sublayers_of(self, index: int) -> list[Sublayer]:
        """The sublayers of one decoder layer."""
        return [_sublayer(record) for record in self.layers[index]["sublayers"]]

    def groups_of(self, index: int) -> list[list[Sublayer]]:
        """The sublayers of one decoder layer, grouped by shared input."""
        return [list(group) for _, group in itertools.groupby(self.sublayers_of(index), lambda s: s.input_group)]

    def mlps_of(self, index: int) -> list[Mlp]:
        """The MLPs of one decoder layer whose neurons can be removed."""
        return [Mlp(tuple(r["inputs"]), r["output"], r["fused"]) for r in self.layers[index]["mlps"]]

    @property
    def has_neurons(self) -> bool:
        """Whether the cache knows what removing hidden neurons would cost."""
        return self.has_gradients and any(self.mlps_of(index) for index in range(len(self.layers)))

    def write_layer(
        self, index: int, tensors: dict[str, torch.Tensor], sublayers: list[Sublayer], mlps: list[Mlp]
    ) -> dict:
        """Write a layer of the forward pass; returns what the manifest says of it."""
        entry = self._write(f"layer_{index:03d}.safetensors", tensors)
        return {**entry, "sublayers": [_record(s) for s in sublayers], "mlps": [asdict(mlp) for mlp in mlps]}

    def write_gradients(self, index: int, tensors: dict[str, torch.Tensor]) -> dict:
        """Write a layer of the gradient pass; returns what the manifest says of it."""
        return self._write(f"gradients_{index:03d}.safetensors", tensors)

    def add_layers(self, entries: list[dict]) -> None:
        """List the forward pass's next layers, which are written, in the manifest."""
        self.layers += entries
        self.write_manifest()

    def add_gradients(self, entries: list[dict]) -> None:
        """List the gradient pass's next layers (from the top down), which are written, in the manifest."""
        self.gradients += entries
        self.write_manifest()

    def _write(self, file: str, tensors: dict[str, torch.Tensor]) -> dict:
        write_tensors(self.folder / file, tensors)
        endings = (SPECTRA, LEADING_VECTORS, REMOVAL, ROUNDING)
        small = {n: sha256_of_tensor(t) for n, t in tensors.items() if n.endswith(endings)}
        return {"file": file, "sha256": sha256_of_file(self.folder / file), "small_tensors_sha256": small}

    def write_manifest(self) -> None:
        """Write manifest.json atomically."""
        manifest = {
            "format": "hisvd-calibration",
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "options": self.options,
            "num_layers": self.num_layers,
            "layers": self.layers,
            "gradients": self.gradients,
        }
        write_json(self.folder / MANIFEST, manifest)

    def refresh(self) -> None:
        """Read what another process has written."""
        other = read_cache(self.folder)
        self.layers, self.gradients = other.layers, other.gradients

    def write_tokens(self, tokens: torch.Tensor, held_out: torch.Tensor) -> None:
        """Keep the calibration tokens (nsamples, seqlen) and windows of the text held out from them."""
        if not (self.folder / TOKENS).exists():
            write_tensors(self.folder / TOKENS, {"tokens": tokens.int(), "held_out": held_out.int()})

    def read_tokens(self) -> torch.Tensor:
        """The calibration tokens (nsamples, seqlen), int64, checked against the fingerprint of the data.

        Raises:
            HiSVDError: the file is missing, truncated or edited.
        """
        return self._read_tokens("tokens", "data")

    def read_held_out(self) -> torch.Tensor:
        """Windows (k, seqlen), int64, held out from the calibration text, checked like the tokens.

        Raises:
            HiSVDError: the text was too short to hold any out, or the file is missing, truncated or edited.
        """
        held_out = self._read_tokens("held_out", "held_out") if "held_out" in self.identity else torch.empty(0)
        if not len(held_out):
            raise HiSVDError(
                f"{self.folder} holds no held-out text to measure on, because its text was too short; calibrate again "
                "on a longer text, or use --quality_gate_delta none, --refine none, or a target in the place of "
                "--max_ppl_increase."
            )
        return held_out

    def _read_tokens(self, name: str, key: str) -> torch.Tensor:
        tokens = self._read(self.folder / TOKENS).get(name, torch.empty(0)).long()
        fits = name != "tokens" or tokens.shape == (self.identity["nsamples"], self.identity["seqlen"])
        if token_fingerprint(tokens) != self.identity.get(key) or not fits:
            raise _damaged(self.folder / TOKENS)
        return tokens

    def read_layer(self, index: int) -> dict[str, torch.Tensor]:
        """All tensors of one layer, of both passes, checked against the manifest's checksums.

        Raises:
            HiSVDError: a file is missing, truncated or edited.
        """
        return {k: t for entry in self._files_of(index) for k, t in self._read_checked(entry).items()}

    def read_backward(self, index: int) -> dict[str, torch.Tensor]:
        """The gradient pass's tensors of one layer, checked; empty if there was no such pass.

        Raises:
            HiSVDError: the file is missing, truncated or edited.
        """
        return {k: t for entry in self._files_of(index)[1:] for k, t in self._read_checked(entry).items()}

    def read_forward(self, index: int) -> dict[str, torch.Tensor]:
        """The forward pass's tensors of one layer, checked; what the gradient pass builds on.

        Raises:
            HiSVDError: the file is missing, truncated or edited.
        """
        return self._read_checked(self.layers[index])

    def _files_of(self, index: int) -> list[dict]:
        return [self.layers[index], *([self.gradients[self.num_layers - 1 - index]] if self.has_gradients else [])]

    def _read_checked(self, entry: dict) -> dict[str, torch.Tensor]:
        path = self.folder / entry["file"]
        if sha256_of_file(check_regular(path)) != entry["sha256"]:
            raise _damaged(path)
        return self._read(path)

    def read_small(self, index: int, *endings: str) -> dict[str, torch.Tensor]:
        """The tensors of one layer with these `endings`, each checked; only a small part of the files is read.

        Endings are of SPECTRA, LEADING_VECTORS, REMOVAL and ROUNDING.

        Raises:
            HiSVDError: a file is missing, truncated or these tensors were edited.
        """
        tensors: dict[str, torch.Tensor] = {}
        self._check_shapes(index)
        for entry in self._files_of(index):
            path = self.folder / entry["file"]
            found = self._read(path, endings)
            expected = {k: v for k, v in entry["small_tensors_sha256"].items() if k.endswith(endings)}
            if {name: sha256_of_tensor(t) for name, t in found.items()} != expected:
                raise _damaged(path)
            tensors |= found
        return tensors

    def _check_shapes(self, index: int) -> None:
        """Refuse a layer whose sublayers have other shapes in the manifest than in the headers of the files.

        Raises:
            HiSVDError: one has.
        """
        found: dict[str, list[int]] = {}
        for entry in self._files_of(index):
            with open_safetensors(self.folder / entry["file"]) as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        for s in self.sublayers_of(index):
            due: dict[str, tuple[int, ...]]
            due = {f"{s.path}.singular_values": (s.full_rank,), f"{s.input_group}.H": packed_shape(s.in_features)}
            if self.has_gradients:
                due |= {f"{s.path}.F": packed_shape(s.out_features), f"{s.path}.{ROUNDING}": (len(INTEGERS),)}
                due[f"{s.path}.two_sided_singular_values"] = (s.full_rank,)
            if self.has_gradients and any(s.path == mlp.output for mlp in self.mlps_of(index)):
                n = s.in_features
                due |= {f"{s.path}.removal_order": (n,), f"{s.path}.{REMOVAL}": (2, n + 1)}
            if any(found.get(name) != list(shape) for name, shape in due.items()):
                raise HiSVDError(
                    f"{s.name} has another shape in {self.folder / MANIFEST} than in the cache's files; {AGAIN}."
                )

    def _read(self, path: Path, endings: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
        try:
            with open_safetensors(path) as file:
                tensors = {k: file.get_tensor(k).clone() for k in file.keys() if k.endswith(endings)}  # noqa: SIM118
        except SafetensorError:
            raise _damaged(path) from None
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise HiSVDError(f"The tensor '{name}' in the cache file {path} holds NaN or infinite values; {AGAIN}.")
        return tensors


def _record(sublayer: Sublayer) -> dict:
    """A sublayer's entry in the manifest, where its path is called `type`."""
    return {"type" if key == "path" else key: value for key, value in asdict(sublayer).items()}


def _sublayer(record: dict) -> Sublayer:
    return Sublayer(**{f.name: record["type" if f.name == "path" else f.name] for f in fields(Sublayer)})


def _damaged(path: Path) -> HiSVDError:
    return HiSVDError(f"The cache file {path} does not match its checksum in {MANIFEST}; {AGAIN}.")


def cache_folder(output_dir: str, model_name: str, nsamples: int, seqlen: int) -> Path:
    """Where calibrate.py keeps the cache of these settings."""
    return Path(output_dir) / f"{model_name}_n{nsamples}_s{seqlen}_with_hessian"


def read_cache(folder: Path) -> CalibrationCache:
    """Open a cache folder, finished or not.

    Raises:
        HiSVDError: no manifest, a damaged one, or one of another program or version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise HiSVDError(f"{folder} holds no {MANIFEST} of a HiSVD calibration cache; make one with calibrate.py.")
    manifest = read_json(path, SCHEMA)
    cache = CalibrationCache(folder, *(manifest[key] for key in ("identity", "num_layers", "options")))
    cache.layers, cache.gradients = manifest["layers"], manifest["gradients"]
    for index in range(len(cache.layers)):
        sublayers, paths = cache.sublayers_of(index), {s.path for s in cache.sublayers_of(index)}
        named = {path for mlp in cache.mlps_of(index) for path in (*mlp.inputs, mlp.output)}
        if not sublayers or len(paths) < len(sublayers) or any(s.layer != index for s in sublayers) or named - paths:
            raise HiSVDError(f"The linears of layer {index} in {path} contradict each other; {AGAIN}.")
    if max(len(cache.layers), len(cache.gradients)) > cache.num_layers:
        raise HiSVDError(f"{path} lists more layers than its num_layers, {cache.num_layers}; {AGAIN}.")
    return cache


def open_finished_cache(name: str) -> CalibrationCache:
    """Open the cache that `--calib_cache` names: the folder X, or X.pkl as a second spelling of it.

    Raises:
        HiSVDError: it is missing, unfinished, or a pickle file, or holds another number of tokens than it says.
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
            f"The calibration in {folder} is not finished ({len(cache.layers)} of {cache.num_layers} layers forward, "
            f"{len(cache.gradients)} of {cache.num_layers * cache.has_gradients} backward); "
            "run the same calibrate.py command again to finish it."
        )
    if (folder / TOKENS).is_file():
        with open_safetensors(folder / TOKENS) as file:
            shape = file.get_slice("tokens").get_shape() if "tokens" in file.keys() else None  # noqa: SIM118
        if shape != [cache.identity["nsamples"], cache.identity["seqlen"]]:
            raise HiSVDError(f"{folder / TOKENS} holds other tokens than {MANIFEST} says; {AGAIN}.")
    return cache


def check_same_model(cache: CalibrationCache, checkpoint: Checkpoint) -> None:
    """Refuse a cache that was made from another model.

    Raises:
        HiSVDError: the fingerprints differ; both are named. Or the cache names other linears, or other shapes.
    """
    fingerprint, model_folder = checkpoint.fingerprint(), checkpoint.folder
    if cache.identity["model"] != fingerprint:
        raise HiSVDError(
            f"The cache {cache.folder} was made from another model (fingerprint {cache.identity['model'][:12]}, "
            f"{cache.options.get('model_path')}) than {model_folder} (fingerprint {fingerprint[:12]}); "
            "run calibrate.py on this model."
        )
    entries = checkpoint.entries()
    for s in cache.sublayers:
        stored = checkpoint.stored_name(f"{s.name}.weight")
        shape = entries[stored]["shape"] if stored in entries else None
        if shape != list(reversed(s.shape) if stored in checkpoint.transposed else s.shape):
            raise HiSVDError(
                f"{cache.folder / MANIFEST} says that {s.name} has the shape {s.shape}, but in {model_folder} it is "
                f"{shape}; {AGAIN}."
            )
