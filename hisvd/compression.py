"""Model + calibration cache + budget → compressed models: the targets of one run, layer by layer into shards."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hisvd.cache_defaults import resolved
from hisvd.calibration_cache import CalibrationCache, check_same_model
from hisvd.errors import HiSVDError
from hisvd.exports import EXPORTS
from hisvd.factoring import CompressionJob, factor_layer
from hisvd.int6_gate import export_within
from hisvd.layer_tensors import layer_tensor_names
from hisvd.planning import Plan, opened_cache, plan
from hisvd.report import finished_report, model_card, plan_report
from hisvd.settings import CompressionSettings, Resources
from hisvd.stage_estimates import stream_bytes
from hisvd.tuning import state_bytes, tune
from hisvd.tuning_text import TuningText
from hisvd.updates import UPDATES
from hisvd.utils import distributed
from hisvd.utils.files import check_disk, is_left_behind, locked, make_folder
from hisvd.utils.model_utils import open_checkpoint, resolve_device
from hisvd.utils.progress import progress_bar, progress_shown
from hisvd.utils.save_utils import ModelWriter, output_path, side_files


@dataclass(frozen=True)
class CompressedModel:
    """A finished output of `hisvd.compress`.

    Attributes:
        path: The model's folder, or its .pt file.
        plan: The ranks that it follows.
        report: What its hisvd.json says: "linear_kept" (share of the linear parameters that are stored), "model_kept"
            (share of all parameters), "weight_bytes_before" and "weight_bytes_after" (of a .pt, those of the shards
            that are packed into it), "settings", "calibration", one row per linear in "sublayers", and for INT6 "int6"
            and "quality_gate", and for `refine` "tuning".
    """

    path: Path
    plan: Plan
    report: dict


def compress(
    model: str | Path,
    cache: str | Path | CalibrationCache,
    output: str | Path,
    targets: float | Sequence[float],
    settings: CompressionSettings = CompressionSettings(),
    resources: Resources = Resources(),
) -> list[CompressedModel]:
    """Compress a model to one or several shares of its linear parameters.

    MLPs lose hidden neurons, and linear weights of the decoder layers become low-rank factors or integers; embeddings
    and head stay as they are. The result is a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads
    where hisvd is installed.

    Memory is that of one decoder layer for the original and for each target. A killed run resumes when it is started
    again with the same arguments; outputs that are finished are left as they are. Under torchrun the processes share
    the work.

    Args:
        model: The folder or Hub id that was calibrated.
        cache: Its calibration cache, as `hisvd.calibrate` returns it, or the cache's folder.
        output: A folder to create, or one file `X.pt`. With several targets each name gets the percentage: `OUT_80p`,
            or `OUT_40b` of bytes.
        targets: The shares of the decoder's linear parameters to keep, each in (0, 1]: one number or several. 0.8
            stores at most 80 % of them, and as close to it as whole ranks allow. With the budget "bytes" they are
            shares of the bytes that these parameters take in 16 bits.
        settings: Allocation, whitening, factors, update and export; `hisvd.CompressionSettings` lists them.
        resources: Device, memory for hidden states, progress bars.

    Returns:
        The finished models in the order of the targets, without repetitions; under torchrun in the first process, and
        an empty list in the others.

    Raises:
        HiSVDError: an input is missing, damaged, or of another model; the settings do not fit the cache; a target is
            out of range; the output exists and was made otherwise, or another run is at work on it; the disk is too
            small; weights, activations or factors are not finite.

    Example:
        >>> import hisvd
        >>> settings = hisvd.CompressionSettings(update="none")
        >>> results = hisvd.compress("models/llama-7b", "caches/llama-7b", "models/small", [0.8, 0.6], settings)
        >>> [result.path.name for result in results]
        ['small_80p', 'small_60p']
        >>> results[0].report["linear_kept"] <= 0.8
        True
    """
    cache = opened_cache(cache)
    plans = plan(cache, targets, settings)
    with progress_shown(resources.progress), outputs_locked([path for _, path in _outputs(output, plans, settings)]):
        job = prepared(model, cache, output, plans, settings, resources)
        open_job = _unfinished(job)
        if open_job.writers:
            factor_layers(open_job)
        found = _refined(job)
        if not distributed.is_first():
            return []  # the first process assembles the shards
        return [
            CompressedModel(w.output, job.plans[t], _finish(job, t, w, found.get(t, {})))
            for t, w in job.writers.items()
        ]


def _outputs(output: str | Path, plans: list[Plan], settings: CompressionSettings) -> list[tuple[Plan, Path]]:
    budget = settings.budget if len(plans) > 1 else None
    return [(p, output_path(str(output), p.target, budget)) for p in plans]


@contextmanager
def outputs_locked(paths: list[Path]) -> Iterator[None]:
    """Within the context, hold the lock on every output that is not finished; of several processes, the first does.

    Raises:
        HiSVDError: another run holds one, or their folder cannot be written.
    """
    with ExitStack() as locks:
        for path in paths if distributed.is_first() else ():
            lock = path.with_name(f".{path.name}.lock")
            if not path.exists() or is_left_behind(lock):
                locks.enter_context(locked(make_folder(path.parent) / lock.name, str(path)))
        yield


def prepared(
    model: str | Path,
    cache: CalibrationCache,
    output: str | Path,
    plans: list[Plan],
    settings: CompressionSettings,
    resources: Resources,
) -> CompressionJob:
    """The job, with everything checked that can be checked before the work starts.

    Raises:
        HiSVDError: see `compress`.
    """
    settings = resolved(settings, cache)
    device = resolve_device(resources.device)
    checkpoint = open_checkpoint(str(model))
    check_same_model(cache, checkpoint)
    side_files(checkpoint.folder)  # refuses now what it would refuse at the end
    if settings.refine != "none":
        cache.read_held_out()
    if cache.identity["nsamples"] < distributed.count():
        raise HiSVDError(
            f"{cache.folder} holds {cache.identity['nsamples']} sequences, fewer than the {distributed.count()} "
            "processes; start at most one per sequence."
        )
    writers = {}
    sizes = {"model_numbers_before": checkpoint.count_parameters(), "weight_bytes_before": checkpoint.count_bytes()}
    for p, path in _outputs(output, plans, settings):
        record = plan_report(cache, p, settings) | sizes
        with distributed.first_alone():
            writers[p.target] = ModelWriter(path, record, cache.num_layers + 1, checkpoint.transposed)
    budget = 1e9 * resources.activation_budget_gb
    job = CompressionJob(checkpoint, cache, settings, {p.target: p for p in plans}, writers, device, budget)
    if distributed.is_first():
        missing = [w for w in writers.values() if not w.is_finished]
        if missing:
            folders = [folder for w in missing for folder in (w.folder, w.work)]
            check_disk(folders, _needed_bytes(job, len(missing)), "This")
    distributed.wait()
    return job


def _needed_bytes(job: CompressionJob, targets: int) -> int:
    """Bytes on disk of so many targets: weights (results are made beside shards), hidden states, codes, tuning."""
    identity, models = job.cache.identity, targets + 1
    streams, tokens = 0, identity["nsamples"] * identity["seqlen"]
    hidden = job.checkpoint.config.get_text_config().hidden_size
    if job.settings.update == "sequential":
        streams = stream_bytes(hidden, tokens, job.cache.dtype, targets)
    if job.settings.refine != "none":
        held_out = distributed.count() * job.cache.read_held_out().numel()
        streams += 3 * (tokens + held_out) * hidden * job.cache.dtype.itemsize
    if job.settings.refine == "weights":
        missing = [job.plans[target] for target, writer in job.writers.items() if not writer.is_finished]
        streams += state_bytes(max(sum(map(plan.parameters_of, job.cache.sublayers)) for plan in missing))
    codes = EXPORTS[job.settings.export].encode is not None
    return int(job.checkpoint.count_bytes() * (models + 0.25 * codes * targets)) + streams


def _unfinished(job: CompressionJob) -> CompressionJob:
    """The job without the targets whose shards are all written."""
    writers = {target: writer for target, writer in job.writers.items() if not writer.has_all_shards()}
    distributed.wait()  # until all have checked
    return replace(job, plans={target: job.plans[target] for target in writers}, writers=writers)


def factor_layers(job: CompressionJob) -> None:
    """Write the shards of every target, layer by layer; those from an interrupted run are kept.

    Raises:
        HiSVDError: non-finite weights, activations or factors, or a damaged cache.
    """
    checkpoint, cache, writers = job.checkpoint, job.cache, list(job.writers.values())
    start = min(writer.shards_done() for writer in writers)
    distributed.wait()  # until all have checked
    changes = job.encodes or job.changes(cache.sublayers)
    layer_names = [layer_tensor_names(checkpoint, cache.sublayers_of(index)[0]) for index in range(cache.num_layers)]
    if start < cache.num_layers:
        # An unchanged model needs no tokens.
        update = UPDATES[job.settings.update if changes else "none"](job, start)
        layers = range(start, cache.num_layers)
        for index in progress_bar(layers, "compressing layers", total=cache.num_layers, initial=start):
            mine = index % distributed.count() == distributed.index()
            if update.shares_layers and (not mine or all(writer.has_shard(index) for writer in writers)):
                continue
            shards = factor_layer(job, update, index, checkpoint.read(layer_names[index]))
            update.advance(index)  # before the shards: a run that finds them finds the hidden states after them
            for target, shard in shards.items():
                if not job.writers[target].has_shard(index) and (distributed.is_first() or update.shares_layers):
                    job.writers[target].write_shard(index, shard)
    outside = set(checkpoint.files) - set().union(*layer_names)
    for writer in writers:
        if distributed.is_first() and not writer.has_shard(cache.num_layers):
            writer.write_shard(cache.num_layers, checkpoint.read(outside))
    distributed.wait()


def _refined(job: CompressionJob) -> dict[float, dict[str, dict]]:
    """Refine the models in the shards where that is asked for; what the reports say of it, by target."""
    writers = {
        target: writer
        for target, writer in job.writers.items()
        if not writer.is_complete and (job.encodes or any(map(job.plans[target].changes, job.cache.sublayers)))
    }
    if job.settings.refine == "none" or not writers:
        return {}
    text = TuningText(job, next(iter(writers.values())).work)
    return {target: {"tuning": tune(job, target, writer, text)} for target, writer in writers.items()}


def _finish(job: CompressionJob, target: float, writer: ModelWriter, found: dict[str, dict]) -> dict:
    """Encode what the quality gate allows, assemble the output, and return its report, with what was `found` so far."""
    if not writer.is_complete:
        if job.settings.gated:
            found = found | {"quality_gate": export_within(job, target, writer)}
        writer.pack()
        modules = job.plans[target].modules(job.cache.sublayers) if job.export.needs_hisvd else {}
        report, codes = finished_report(writer, job.checkpoint, found)
        for name, form in codes.items():
            modules[name] = modules.get(name, {}) | {"form": form}
        card = model_card(report, job.checkpoint.folder)
        writer.complete(job.checkpoint, job.config_changes(target, modules), report, card)
    return writer.finish()
