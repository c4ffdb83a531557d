"""The whole chain in Python: calibrate, plan, compress, evaluate, and write a few words.

    python examples/compress.py models/smollm2-135m train.txt compressed_models/example --target 0.8

The text calibrates the model; python-docs or another `--evaluate_on` says how much was lost. The cache is kept beside
the result, so a second run with another target is quick.
"""

import click
import torch
from transformers import AutoTokenizer

import hisvd


@click.command()
@click.argument("model")
@click.argument("text")
@click.argument("output")
@click.option("--target", default=0.8, help="Share of the linear weights to keep.")
@click.option("--max_ppl_increase", type=float, help="Instead: as small as possible with this rise, such as 0.05.")
@click.option("--nsamples", default=64, help="Windows of text to calibrate on.")
@click.option("--seqlen", default=512, help="Tokens per window.")
@click.option("--evaluate_on", default="python-docs", help="A data set or text file.")
def main(model: str, text: str, output: str, evaluate_on: str, **options: float) -> None:
    """Compress MODEL, calibrated on TEXT, to the folder OUTPUT."""
    nsamples, seqlen = int(options["nsamples"]), int(options["seqlen"])
    text_settings = hisvd.CalibrationSettings(nsamples=nsamples, seqlen=seqlen, dataset=text)
    cache = hisvd.calibrate(model, f"{output}_cache", text_settings)
    settings = hisvd.CompressionSettings(update="none")  # quick; leave it out for the best quality

    if options["max_ppl_increase"] is not None:
        (result,) = hisvd.compress_within(model, cache, output, options["max_ppl_increase"], settings)
    else:
        (plan,) = hisvd.plan(cache, options["target"], settings)  # what compress will do, from the cache alone
        print(f"{len(plan.shapes)} linears lose neurons, {sum(map(plan.changes, cache.sublayers))} change in all")
        (result,) = hisvd.compress(model, cache, output, options["target"], settings)
    print(f"{result.path}: {result.report['linear_kept']:.1%} of the linear weights")

    measured = hisvd.EvaluationSettings(seqlen=seqlen, nsamples=8)
    for name in (model, result.path):
        figures = hisvd.evaluate(name, [evaluate_on], measured)["perplexity"][evaluate_on]
        print(f"perplexity of {name}: {figures['perplexity']:.2f}")

    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = torch.tensor([tokenizer("The model")["input_ids"]])
    written = hisvd.load(output).generate(prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main()
