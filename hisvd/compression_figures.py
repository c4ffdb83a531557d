"""What the page about compressed models draws of one target, as plain values that compress.json holds too."""

from collections.abc import Sequence
from statistics import median

from hisvd.calibration_cache import SPECTRA, CalibrationCache
from hisvd.component.experts import kind_of
from hisvd.errors import HiSVDError
from hisvd.schema import COUNT, NUMBER, OBJECT, SIZE, TEXT
from hisvd.shape_utils import PLAIN_BYTES, Sublayer, matrix_bytes, stored_bytes
from hisvd.utils.save_utils import PREDICTED

SPECTRUM = {  # by the setting `whitening`: the singular values that factors are cut by, and what to call them
    "two_sided": ("two_sided_singular_values", "F^½ W H^½"),
    "input": ("whitened_singular_values", "W H^½"),
    "none": ("singular_values", "W"),
}
DRAWN_SCHEMA = {  # what is drawn of a hisvd.json
    "source_model": TEXT,
    "target_compression": NUMBER,
    "linear_numbers_before": SIZE,
    "linear_numbers_planned": SIZE,
    "linear_numbers_after": SIZE,
    "settings": {key: TEXT for key in ("allocation", "whitening", "moves", "budget", "export")},
    "calibration": OBJECT,
    "by_type": {"*": dict.fromkeys(("before", "removed_with_neurons", "saved_by_factors", "stored"), COUNT)},
    "sublayers": [{"name": TEXT, "shape": [SIZE], "form": TEXT, "rank": COUNT, "numbers": COUNT}],
}
MOST_SPECTRA, POINTS = 8, 256  # sublayers whose spectra are drawn, and points of each
STAGES = ("rank_method", "alpha", "modulation", "lwe_strength", "tail_redundancy_weight", "cluster_by")


def drawn_of(report: dict, cache: CalibrationCache) -> dict:
    """All that is drawn of one target, as plain values.

    Raises:
        HiSVDError: the cache is of another model, or damaged.
    """
    sublayers, rows = cache.sublayers, report["sublayers"]
    if [row["name"] for row in rows] != [s.name for s in sublayers]:
        raise HiSVDError(f"The cache {cache.folder} has other linears than {report['source_model']}; pass its own.")
    by_bytes = report["settings"]["budget"] == "bytes"
    left_out = ("sublayers", "by_type", "settings", "calibration", PREDICTED)
    return {
        "summary": {key: value for key, value in report.items() if key not in left_out},
        "linears": {form: [row["form"] for row in rows].count(form) for form in sorted({row["form"] for row in rows})},
        "settings": acting_settings(report["settings"]),
        "calibration": {key: report["calibration"].get(key) for key in ("dataset", "nsamples", "seqlen")},
        "by_type": report["by_type"],
        "map": rank_map(rows, sublayers, by_bytes),
        "widths": width_map(rows, sublayers),
        "spectra": spectra(report, cache),
        PREDICTED: report.get(PREDICTED),
    }


def acting_settings(settings: dict) -> dict:
    """Those of the resolved settings that had a say."""
    unused = {key for key, value in settings.items() if value is None and key != "quality_gate_delta"}
    stock, ranked = settings["export"] == "plain", settings["moves"] != "neurons"
    if settings["allocation"] != "hisvd" or not ranked:
        unused.update(STAGES)
    if settings["allocation"] != "loss" or stock:
        unused.update(("rank_multiple", "min_saving"))
    if not ranked:
        unused.update(("factors", "min_saving"))
    if settings.get("refine") == "none":
        unused.add("refine")
    if stock:
        unused.add("allocation")
    else:
        unused.add("width_multiple")
    if settings["export"] != "int6":
        unused.update(("int6_mode", "quality_gate_delta"))
    return {key: value for key, value in settings.items() if key not in unused}


def rank_map(rows: Sequence[dict], sublayers: Sequence[Sublayer], by_bytes: bool) -> dict:
    """By sublayer type and decoder layer, the kept share and, as text, rank and integers; None where there is none."""
    types = list(dict.fromkeys(kind_of(s.path) for s in sublayers))
    layers = 1 + max(s.layer for s in sublayers)
    members: dict[tuple[str, int], list[tuple[dict, Sublayer]]] = {}
    for row, s in zip(rows, sublayers, strict=True):
        members.setdefault((kind_of(s.path), s.layer), []).append((row, s))

    def share(found: list[tuple[dict, Sublayer]]) -> float:
        kept = sum(bytes_of(row) if by_bytes else row["numbers"] for row, _ in found)
        return kept / sum(s.size * (PLAIN_BYTES if by_bytes else 1) for _, s in found)

    def text(found: list[tuple[dict, Sublayer]]) -> str:
        ranks = [row["rank"] for row, _ in found if row["form"] != "dense"]
        dtypes = sorted({row["dtype"] for row, _ in found if "dtype" in row})
        return "\n".join([*([f"{median(ranks):.0f}"] if ranks else [] if dtypes else ["·"]), *dtypes[:1]])

    grid = [[members.get((kind, layer), []) for layer in range(layers)] for kind in types]
    return {
        "types": types,
        "unit": "bytes" if by_bytes else "parameters",
        "kept": [[share(found) if found else None for found in line] for line in grid],
        "texts": [[text(found) for found in line] for line in grid],
    }


def bytes_of(row: dict) -> int:
    """Bytes of one linear of the report, where what is not in integers is in 16 bits."""
    (m, n), dtype = row.get("stored_shape", row["shape"]), row.get("dtype")
    return (
        matrix_bytes(m, n, dtype) if row["form"] == "dense" else stored_bytes(row["rank"], (m, n), row["form"], dtype)
    )


def width_map(rows: Sequence[dict], sublayers: Sequence[Sublayer]) -> dict | None:
    """By type of output linear and decoder layer, the share of the hidden neurons that stays, and how many.

    None where all do.
    """
    narrow = {s.path for row, s in zip(rows, sublayers, strict=True) if inputs_of(row) != s.in_features}
    if not narrow:
        return None
    types = sorted({kind_of(path) for path in narrow})
    layers = 1 + max(s.layer for s in sublayers)
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row, s in zip(rows, sublayers, strict=True):
        if kind_of(s.path) in types:
            found.setdefault((kind_of(s.path), s.layer), []).append((inputs_of(row), s.in_features))
    grid = [[found.get((kind, layer), []) for layer in range(layers)] for kind in types]
    return {
        "types": types,
        "kept": [[sum(k for k, _ in c) / sum(n for _, n in c) if c else None for c in line] for line in grid],
        "texts": [[f"{median(k for k, _ in c):.0f}" if c else "" for c in line] for line in grid],
    }


def inputs_of(row: dict) -> int:
    """How many inputs the stored weight of one linear of the report has."""
    return row.get("stored_shape", row["shape"])[1]


def spectra(report: dict, cache: CalibrationCache) -> list[dict]:
    """Singular values, relative to the largest, of one sublayer of each type: the factored one nearest to the middle.

    "rank" is where it was cut, None where it stays whole; "places" count from 1.
    """
    kind, _ = SPECTRUM[report["settings"]["whitening"]]
    rows = {row["name"]: row for row in report["sublayers"]}
    middle = (cache.num_layers - 1) / 2
    found: dict[str, Sublayer] = {}
    for s in sorted(cache.sublayers, key=lambda s: (rows[s.name]["form"] == "dense", abs(s.layer - middle))):
        found.setdefault(kind_of(s.path), s)
    order = dict.fromkeys(kind_of(s.path) for s in cache.sublayers)
    chosen = [found[name] for name in order][:MOST_SPECTRA]
    small = {layer: cache.read_small(layer, SPECTRA) for layer in {s.layer for s in chosen}}
    drawn = []
    for s in chosen:
        values = small[s.layer][f"{s.path}.{kind}"].double()
        step = -(-len(values) // POINTS)
        places = sorted({*range(0, len(values), step), len(values) - 1})
        relative = (values / values[0].clamp_min(1e-300))[places]
        whole = rows[s.name]["form"] == "dense"
        drawn.append(
            {
                "name": s.name,
                "type": kind_of(s.path),
                "layer": s.layer,
                "rank": None if whole else rows[s.name]["rank"],
                "places": [place + 1 for place in places],
                "values": [float(f"{value:.6g}") for value in relative.tolist()],
            }
        )
    return drawn
