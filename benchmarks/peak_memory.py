"""Peak resident memory of calibrate.py and compress.py on random-weight Llamas of 4 and of 24 layers, side by side.

    python benchmarks/peak_memory.py --tokenizer models/smollm2-135m

The ratio shows whether memory grows with the number of layers (it must stay below 1.15).
"""

import tempfile
from pathlib import Path

import click
from common import measured, random_llama

from hisvd.tables import table
from hisvd.utils.files import write_json

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}


@click.command()
@click.option("--tokenizer", required=True, help="A model folder whose tokenizer is used.")
@click.option("--nsamples", default=16, show_default=True)
@click.option("--seqlen", default=512, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default="results/peak_memory.json")
def main(tokenizer: str, nsamples: int, seqlen: int, json_path: Path) -> None:
    """Build both checkpoints, run both programs on each, print peaks and ratios."""
    records = {"calibrate": {}, "compress": {}}
    for layers in (4, 24):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            random_llama(model, tokenizer, **SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)
            size = ["--nsamples", nsamples, "--seqlen", seqlen, "--dataset", "python-docs"]
            where = ["--model_path", model, "--model_name", "m", "--output_dir", folder]
            records["calibrate"][layers] = measured("calibrate.py", *where, *size).resident
            cache = f"{folder}/m_n{nsamples}_s{seqlen}_with_hessian"
            goal = ["--calib_cache", cache, "--target_compression", "0.8,0.6", "--save_model", f"{folder}/out"]
            records["compress"][layers] = measured("compress.py", "--model_path", model, *goal).resident
    rows = [[p, *(f"{r[n] / 2**20:.0f}" for n in (4, 24)), f"{r[24] / r[4]:.3f}"] for p, r in records.items()]
    click.echo(table(["program", "4 layers, MiB", "24 layers, MiB", "ratio"], rows))
    json_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(json_path, records)


if __name__ == "__main__":
    main()
