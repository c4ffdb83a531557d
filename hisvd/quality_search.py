"""The smallest model whose perplexity stays within a bound: bisection over targets, checked by measurement."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hisvd.calibration_cache import CalibrationCache
from hisvd.compression import CompressedModel, compress, outputs_locked
from hisvd.errors import HiSVDError, TargetTooSmallError
from hisvd.planning import opened_cache
from hisvd.schema import NUMBER
from hisvd.settings import CompressionSettings, Resources, check_at_least
from hisvd.utils import distributed
from hisvd.utils.data_utils import default_batch_size
from hisvd.utils.eval_utils import streamed_perplexity
from hisvd.utils.files import make_folder, read_json, sync_file, write_json
from hisvd.utils.model_folders import local_folder
from hisvd.utils.model_utils import open_checkpoint, resolve_device
from hisvd.utils.progress import progress_shown
from hisvd.utils.save_utils import REPORT, is_pt
from hisvd.utils.streaming import StreamedModel

FIRST_TRY = 80  # percent kept
EXPONENT = 2.0  # of the share removed, with which the mean loss grows until two tries say more
STATES = "states_"  # beginning of the names of folders with hidden states
INTERPOLATIONS = 6  # tries after which the search bisects


def compress_within(
    model: str | Path,
    cache: str | Path | CalibrationCache,
    output: str | Path,
    max_ppl_increase: float,
    settings: CompressionSettings = CompressionSettings(),
    resources: Resources = Resources(),
) -> list[CompressedModel]:
    """Compress a model as far as its perplexity on held-out calibration text allows.

    Targets in whole percent are tried without an update, which takes a fraction of the time; the model is then made
    with `settings` to the smallest target found, and measured again. Every measurement is kept beside the output, in
    OUT.search, until the end, so that a killed run resumes.

    Args:
        model: The folder or Hub id that was calibrated.
        cache: Its calibration cache, or the cache's folder.
        output: A folder to create, or one file `X.pt`.
        max_ppl_increase: By which fraction the perplexity may rise; 0.05: from 20 to 21.
        settings: As for `hisvd.compress`; what targets are shares of is in `budget`.
        resources: Device, memory for hidden states, progress bars.

    Returns:
        The model alone in a list, as `hisvd.compress` returns it. Its report holds "quality_search": the bound, the
        perplexities of the original and of the model, and those of all tries by percent.

    Raises:
        HiSVDError: as `hisvd.compress`; the cache holds no held-out text; or the bound is negative, or so low that
            nothing can be removed.
    """
    check_at_least("max_ppl_increase", max_ppl_increase, 0)
    cache, output = opened_cache(cache), Path(output)
    if is_pt(output):
        raise HiSVDError(
            f"--max_ppl_increase makes a folder, not a file such as {output}; choose another --save_model."
        )
    if output.exists():
        raise HiSVDError(f"{output} already exists; delete it or choose another --save_model.")
    search = _Search(str(model), cache, output, settings, resources)
    with outputs_locked([output]):
        search.prepare()
        quick = replace(settings, update="none", refine="none")
        original = search.measured("original", lambda: local_folder(search.model))
        bound = (1 + max_ppl_increase) * original
        percent = smallest_within(lambda p: search.tried(p, quick, "tried") / original, 1 + max_ppl_increase)
        while percent < 100 and search.tried(percent, settings, "made") > bound:
            percent += 1
        if percent == 100:
            raise HiSVDError(
                f"No smaller model was found whose perplexity on held-out text rises by at most {max_ppl_increase:g} "
                f"(from {original:.2f}); allow more with --max_ppl_increase."
            )
        return search.finish(percent, max_ppl_increase)


def smallest_within(measure: Callable[[int], float], bound: float) -> int:
    """The smallest percent kept at which `measure`, which falls to 1 at 100 percent, is at most `bound`.

    The logarithm is taken to grow with a power of the share removed, so few measurements are needed.
    """
    fits, fails, tries = 100, 0, dict[int, float]()
    percent = FIRST_TRY
    while fits - fails > 1:
        tries[percent] = math.log(measure(percent))
        if tries[percent] <= math.log(bound):
            fits = percent
        else:
            fails = percent
        percent = min(max(_next_try(tries, math.log(bound)), fails + 1), fits - 1)
    return fits


def _next_try(tries: dict[int, float], goal: float) -> int:
    """The percent at which the power law through the last two useful tries reaches `goal`."""
    points = [(math.log(100 - p), math.log(x)) for p, x in tries.items() if 0 < x < math.inf]
    if not points or goal <= 0 or len(tries) > INTERPOLATIONS:
        fitting, others = ([p for p, x in tries.items() if (x <= goal) == small] for small in (True, False))
        return (min(fitting, default=100) + max(others, default=0)) // 2
    (removed, loss), exponent = points[-1], EXPONENT
    if len(points) > 1 and points[-2][0] != removed:
        exponent = min(max((loss - points[-2][1]) / (removed - points[-2][0]), 1.0), 4.0)
    return math.ceil(100 - math.exp(removed + (math.log(goal) - loss) / exponent))


@dataclass(frozen=True)
class _Search:
    """The models that are tried, one at a time in OUT.search, and what they measured there."""

    model: str
    cache: CalibrationCache
    output: Path
    settings: CompressionSettings
    resources: Resources

    @property
    def folder(self) -> Path:
        """Where the models lie that are tried."""
        return self.output.with_name(f"{self.output.name}.search")

    def prepare(self) -> None:
        """Begin the search, or go on with one of the same settings.

        Raises:
            HiSVDError: the folder holds another one, or something else.
        """
        due = json.loads(json.dumps({"settings": vars(self.settings), "calibration": self.cache.identity}))
        with distributed.first_alone():
            if not distributed.is_first():
                return
            found = read_json(self._figures) if self._figures.is_file() and not self.folder.is_symlink() else {}
            if not found and self.folder.exists() and (self.folder.is_symlink() or any(self.folder.iterdir())):
                raise HiSVDError(
                    f"{self.folder} exists and is not a search of HiSVD; move it away or choose another --save_model."
                )
            if found and any(found.get(key) != value for key, value in due.items()):
                raise HiSVDError(
                    f"{self.folder} holds an unfinished search with other settings or another cache; delete it or "
                    "choose another --save_model."
                )
            make_folder(self.folder)
            if not found:
                write_json(self._figures, due | {"perplexities": {}})

    def tried(self, percent: int, settings: CompressionSettings, kind: str) -> float:
        """The perplexity of the model that keeps so many percent; infinite where none can be as small."""
        path = self._path(percent, kind)

        def made() -> Path:
            compress(self.model, self.cache, path, percent / 100, settings, self.resources)
            distributed.wait()  # until the first process has put the model together
            return path

        try:
            perplexity = self.measured(path.name, made)
        except TargetTooSmallError:  # raised by the plan, before anything is made
            return math.inf
        if kind == "tried" and distributed.is_first():
            shutil.rmtree(path, ignore_errors=True)  # it was made for this alone
        return perplexity

    def measured(self, name: str, make: Callable[[], Path]) -> float:
        """The perplexity on the held-out text of the model that `make` gives, measured unless it was before."""
        found = read_json(self._figures, {"perplexities": {"*": NUMBER}})
        distributed.wait()  # until all have read
        if name not in found["perplexities"]:
            with progress_shown(self.resources.progress):
                found["perplexities"][name] = self._perplexity(make())
            with distributed.first_alone():
                if distributed.is_first():
                    write_json(self._figures, found)
        return found["perplexities"][name]

    def finish(self, percent: int, bound: float) -> list[CompressedModel]:
        """Move the model to the output, with what was measured in its report, and delete the rest."""
        made = self._path(percent, "made")
        found = compress(self.model, self.cache, made, percent / 100, self.settings, self.resources)
        if not distributed.is_first():
            return []
        search = {
            "max_ppl_increase": bound,
            "perplexities": read_json(self._figures)["perplexities"],
            "tokens": self.cache.read_held_out()[:, 1:].numel(),
        }
        report = found[0].report | {"quality_search": search}
        write_json(made / REPORT, report)
        made.rename(self.output)
        sync_file(self.output.parent)
        # Larger models that were not within the bound, and what a run left that was killed.
        for left in (*self.folder.glob("made_*p"), *self.folder.glob(f"{STATES}*")):
            shutil.rmtree(left)
        self._figures.unlink()
        with suppress(OSError):  # not empty: something else is there
            self.folder.rmdir()
        return [replace(found[0], path=self.output, report=report)]

    @property
    def _figures(self) -> Path:
        return self.folder / "search.json"

    def _path(self, percent: int, kind: str) -> Path:
        return self.folder / f"{kind}_{percent}p"

    def _perplexity(self, path: Path) -> float:
        tokens = self.cache.read_held_out()
        device, batch_size = resolve_device(self.resources.device), default_batch_size(tokens.shape[1])
        streamed = StreamedModel(open_checkpoint(str(path), compressed_too=True), batch_size, device, self.cache.dtype)
        with TemporaryDirectory(prefix=STATES, dir=self.folder) as folder:
            return streamed_perplexity(streamed, tokens, "held-out text", Path(folder))["perplexity"]
