"""evaluate.py: perplexity, speed and memory of original and compressed models, and the attention-residual study."""

import tempfile
from pathlib import Path

import click
import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hisvd.cli.attention_study import STUDY_SEQLEN, check_plot, draw_studies, numbers, study_model, study_tables
from hisvd.cli.common import data_dir_option, device_option, dtype_option, program, say, table
from hisvd.errors import HiSVDError
from hisvd.utils import distributed
from hisvd.utils.data_utils import EVALUATION_SPLIT, default_batch_size, evaluation_windows, load_text, tokenize
from hisvd.utils.eval_utils import (
    linear_numbers,
    peak_memory,
    perplexity,
    reset_peak_memory,
    speed,
    streamed_perplexity,
    weight_file_bytes,
)
from hisvd.utils.files import check_writable_file, make_folder, write_json
from hisvd.utils.load_utils import load, tokenizer_of
from hisvd.utils.model_utils import (
    local_folder,
    open_checkpoint,
    read_config,
    resolve_device,
    resolve_dtype,
)
from hisvd.utils.streaming import StreamedModel

DEFAULT_SEQLEN = 2048


@click.command()
@click.option(
    "--model_path",
    "model_paths",
    multiple=True,
    required=True,
    help="Model folder, .pt of compress.py or Hub id; give it several times for one table.",
)
@click.option("--datasets", default="wikitext2", show_default=True, help="Comma-separated names or text files.")
@data_dir_option
@click.option("--seqlen", type=click.IntRange(2), help="Tokens a window  [default: 2048, or the model's limit]")
@click.option("--nsamples", type=click.IntRange(1), help="Only the first N windows of each data set.")
@click.option(
    "--offload_folder",
    type=click.Path(path_type=Path),
    help="Perplexity with one decoder layer in memory at a time; hidden states lie in this folder meanwhile.",
)
@click.option("--speed", "with_speed", is_flag=True, help="Also measure prefill and decode tokens/s and peak memory.")
@click.option(
    "--attention_residual",
    is_flag=True,
    help="Study instead whether attention is one value vector plus a small correction, on --layers.",
)
@click.option("--layers", help="Study: comma-separated decoder layers, from 0  [default: the last quarter]")
@click.option("--d_r", "ranks", help="Study: dimensions of the residual that are kept  [default: 1,2,4,8,16,32]")
@click.option("--n_blocks", type=click.IntRange(1), default=30, show_default=True, help="Study: windows evaluated on.")
@click.option(
    "--calib_blocks", type=click.IntRange(1), default=4, show_default=True, help="Study: windows before them for bases."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Study: draw spectra and ΔPPL into this image.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
@device_option
@dtype_option
@click.pass_context
@program
def main(
    context: click.Context,
    model_paths: tuple[str, ...],
    datasets: str,
    data_dir: str,
    seqlen: int | None,
    nsamples: int | None,
    offload_folder: Path | None,
    with_speed: bool,
    attention_residual: bool,
    layers: str | None,
    ranks: str | None,
    n_blocks: int,
    calib_blocks: int,
    plot: Path | None,
    json_path: Path | None,
    device: str,
    dtype: str,
) -> None:
    """Print one table of perplexities (and speeds) of one or more models, or study their attention."""
    study_only, not_for_study = ("layers", "ranks", "n_blocks", "calib_blocks", "plot"), ("nsamples", "with_speed")
    other = (*not_for_study, "offload_folder") if attention_residual else study_only
    for option in context.command.params:
        if option.name in other and context.get_parameter_source(option.name).name == "COMMANDLINE":
            rule = "does not go with" if attention_residual else "needs"
            raise HiSVDError(f"{option.opts[0]} {rule} --attention_residual.")
    if offload_folder and with_speed:
        raise HiSVDError("--speed needs the whole model in memory, so it does not go with --offload_folder.")
    if offload_folder:
        make_folder(offload_folder)
    if json_path:
        check_writable_file(json_path)
    if plot:
        check_plot(plot)
    names = [name.strip() for name in datasets.split(",") if name.strip()]
    texts = {name: load_text(name, EVALUATION_SPLIT, data_dir) for name in names}
    results = []
    if attention_residual:
        chosen, kept = (numbers(text, option) for text, option in ((layers, "--layers"), (ranks, "--d_r")))
        for model_path in model_paths:
            model, ids, length = opened(model_path, texts, seqlen, STUDY_SEQLEN, device, dtype)
            studies = study_model(model, ids, length, chosen, kept, calib_blocks, n_blocks)
            where = {"model": model_path, "device": str(model.device), "dtype": str(model.dtype)}
            results.append({**where, "attention_residual": studies})
            for name, study in studies.items():
                say(study_tables(model_path, name, study) + "\n")
            if json_path and distributed.is_first():
                write_json(json_path, results)
        if plot and distributed.is_first():
            draw_studies(results, plot)
        return
    for model_path in model_paths:
        figures = evaluate_model(model_path, texts, seqlen, nsamples, offload_folder, with_speed, device, dtype)
        results.append(figures)
        if json_path and distributed.is_first():
            write_json(json_path, results)
    say(result_table(results))


def opened(
    model_path: str,
    texts: dict[str, str],
    seqlen: int | None,
    default: int,
    device: str,
    dtype: str,
    layer_by_layer: bool = False,
) -> tuple[PreTrainedModel | StreamedModel, dict[str, torch.Tensor], int]:
    """The model, the token ids of every text, and the tokens a window.

    Raises:
        HiSVDError: the model cannot be loaded or is too large for the memory, or `seqlen` exceeds its positions.
    """
    torch_device = resolve_device(device)
    reset_peak_memory(torch_device)
    tokenizer = tokenizer_of(model_path)
    ids = {name: tokenize(text, tokenizer) for name, text in texts.items()}
    if layer_by_layer:
        checkpoint = open_checkpoint(model_path, compressed_too=True)
        length = window_length(checkpoint.config, model_path, seqlen, default)
        compute = resolve_dtype(dtype, torch_device, checkpoint.config.dtype or torch.bfloat16)
        return StreamedModel(checkpoint, default_batch_size(length), torch_device, compute), ids, length
    check_memory(model_path, resolve_dtype(dtype, torch_device, None))
    # Not load().to(dtype): that would round the rotary frequencies, which from_pretrained keeps in float32.
    model = load(model_path, resolve_dtype(dtype, torch_device, None), torch_device)
    return model, ids, window_length(model.config, model_path, seqlen, default)


def check_memory(model_path: str, dtype: torch.dtype | None) -> None:
    """Refuse a model folder whose weights, in `dtype` (None: as stored), exceed the memory that is free.

    Raises:
        HiSVDError: they do.
    """
    if Path(model_path).is_file():
        return
    folder = local_folder(model_path)
    stored = read_config(folder).dtype or torch.float32
    needed = weight_file_bytes(folder) * (dtype or stored).itemsize / stored.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        raise HiSVDError(
            f"{model_path} takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; use "
            "--offload_folder DIR (perplexity alone, one layer in memory), or --dtype bfloat16."
        )


def window_length(config: PreTrainedConfig, model_path: str, seqlen: int | None, default: int) -> int:
    """Tokens a window: `seqlen` or the default, as far as the model has positions.

    Raises:
        HiSVDError: `seqlen` exceeds them.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_SEQLEN
    length = seqlen or min(default, limit)
    if length > limit:
        raise HiSVDError(f"--seqlen {length} exceeds the {limit} positions of {model_path}; choose at most {limit}.")
    return length


def evaluate_model(
    model_path: str,
    texts: dict[str, str],
    seqlen: int | None,
    nsamples: int | None,
    offload_folder: Path | None,
    with_speed: bool,
    device: str,
    dtype: str,
) -> dict:
    """All figures of one model."""
    model, ids, length = opened(model_path, texts, seqlen, DEFAULT_SEQLEN, device, dtype, bool(offload_folder))
    windows = {name: evaluation_windows(t, length, nsamples, name) for name, t in ids.items()}
    stored, dense = linear_numbers(model.skeleton if offload_folder else model)
    path = Path(model_path)
    result = {
        "model": model_path,
        "linear_numbers_stored": stored,
        "linear_numbers_dense": dense,
        "linear_kept": stored / dense,
        "weight_file_bytes": weight_file_bytes(path if path.exists() else local_folder(model_path)),
        "seqlen": length,
        "device": str(model.device),
        "dtype": str(model.dtype),
    }
    if offload_folder:
        with tempfile.TemporaryDirectory(dir=offload_folder) as folder:
            result["perplexity"] = {n: streamed_perplexity(model, w, n, Path(folder)) for n, w in windows.items()}
    else:
        result["perplexity"] = {name: perplexity(model, w, name) for name, w in windows.items()}
    if with_speed:
        result["speed"] = speed(model, next(iter(windows.values()))[0])
        result["speed"]["peak_memory_bytes"] = peak_memory(model.device)
    return result


def result_table(results: list[dict]) -> str:
    """The figures as a table, a row a model."""
    names = list(results[0]["perplexity"])
    header = [
        "model",
        "linear kept",
        "file MB",
        *(f"ppl {Path(name).stem}" for name in names),
        "tokens scored",
    ]
    rows = []
    for result in results:
        figures = [result["perplexity"][name] for name in names]
        row = [
            Path(result["model"]).name,
            f"{result['linear_kept']:.2%}",
            f"{result['weight_file_bytes'] / 1e6:.1f}",
            *(f"{f['perplexity']:.2f}" if f["perplexity"] < 1e5 else f"{f['perplexity']:.2e}" for f in figures),
            "/".join(str(f["tokens_scored"]) for f in figures),
        ]
        if "speed" in result:
            s = result["speed"]
            row += [
                f"{s['prefill_tokens_per_s']:.0f}",
                f"{s['decode_tokens_per_s']:.1f}",
                f"{s['peak_memory_bytes'] / 1e6:.0f}",
            ]
        rows.append(row)
    if "speed" in results[0]:
        header += ["prefill tok/s", "decode tok/s", "peak MB"]
    return table(header, rows)


if __name__ == "__main__":
    main()
