"""evaluate.py: perplexity, speed and memory of original and compressed models, and the attention-residual study."""

from pathlib import Path

import click
import torch
from transformers import PreTrainedModel

from hisvd.cli.attention_study import STUDY_SEQLEN, check_plot, draw_studies, numbers, study_model, study_tables
from hisvd.cli.common import data_dir_option, device_option, dtype_option, program, say, table
from hisvd.errors import HiSVDError
from hisvd.utils import distributed
from hisvd.utils.data_utils import EVALUATION_SPLIT, evaluation_windows, load_text, tokenize
from hisvd.utils.eval_utils import (
    linear_numbers,
    peak_memory,
    perplexity,
    reset_peak_memory,
    speed,
    weight_file_bytes,
)
from hisvd.utils.files import check_writable_file, write_json
from hisvd.utils.model_utils import load, local_folder, resolve_device, resolve_dtype, tokenizer_of

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
    other = (
        ("nsamples", "with_speed") if attention_residual else ("layers", "ranks", "n_blocks", "calib_blocks", "plot")
    )
    for option in context.command.params:
        if option.name in other and context.get_parameter_source(option.name).name == "COMMANDLINE":
            rule = "does not go with" if attention_residual else "needs"
            raise HiSVDError(f"{option.opts[0]} {rule} --attention_residual.")
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
            if json_path and distributed.rank() == 0:
                write_json(json_path, results)
        if plot and distributed.rank() == 0:
            draw_studies(results, plot)
        return
    for model_path in model_paths:
        results.append(evaluate_model(model_path, texts, seqlen, nsamples, with_speed, device, dtype))
        if json_path and distributed.rank() == 0:
            write_json(json_path, results)
    say(result_table(results))


def opened(
    model_path: str, texts: dict[str, str], seqlen: int | None, default: int, device: str, dtype: str
) -> tuple[PreTrainedModel, dict[str, torch.Tensor], int]:
    """The model, the token ids of every text, and the tokens a window.

    Raises:
        HiSVDError: the model cannot be loaded, or `seqlen` exceeds its positions.
    """
    torch_device = resolve_device(device)
    reset_peak_memory(torch_device)
    tokenizer = tokenizer_of(model_path)
    ids = {name: tokenize(text, tokenizer) for name, text in texts.items()}
    # Not load().to(dtype): that would round the rotary frequencies, which from_pretrained keeps in float32.
    model = load(model_path, resolve_dtype(dtype, torch_device, None), torch_device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_SEQLEN
    length = seqlen or min(default, limit)
    if length > limit:
        raise HiSVDError(f"--seqlen {length} exceeds the {limit} positions of {model_path}; choose at most {limit}.")
    return model, ids, length


def evaluate_model(
    model_path: str,
    texts: dict[str, str],
    seqlen: int | None,
    nsamples: int | None,
    with_speed: bool,
    device: str,
    dtype: str,
) -> dict:
    """All figures of one model."""
    model, ids, length = opened(model_path, texts, seqlen, DEFAULT_SEQLEN, device, dtype)
    windows = {name: evaluation_windows(t, length, nsamples, name) for name, t in ids.items()}
    stored, dense = linear_numbers(model)
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
        "perplexity": {name: perplexity(model, w, name) for name, w in windows.items()},
    }
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
