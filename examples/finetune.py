"""Recover quality after compression: train LoRA adapters on the factors with a text file, and merge them.

    pip install peft
    python examples/finetune.py compressed_models/llama7b_60p train.txt compressed_models/llama7b_60p_tuned

The result is a compressed folder of the same size. The last tenth of the text is held out to measure the gain.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

try:
    from peft import LoraConfig, get_peft_model
except ModuleNotFoundError:
    raise SystemExit("This example needs peft; install it: pip install peft") from None


def main() -> None:
    """Train, print perplexities before and after, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder written by compress.py")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("output", help="folder for the result")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"])
    windows = [{"input_ids": w, "labels": w} for w in ids.split(options.seqlen) if len(w) == options.seqlen]
    held_out = max(1, len(windows) // 10)
    if len(windows) <= held_out:
        parser.error(f"{options.text} has {len(ids)} tokens; give a longer text or a smaller --seqlen.")

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    # "all-linear" includes the factors of factored linears, into which adapters can be merged. Targets like q_proj and
    # v_proj work too, but adapters beside a whole factored linear stay beside it: save them with model.save_pretrained.
    adapters = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    model = get_peft_model(model, adapters)
    arguments = TrainingArguments(
        output_dir=options.output,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=windows[:-held_out], eval_dataset=windows[-held_out:])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"perplexity on the held-out text: {math.exp(before):.2f} before, {math.exp(after):.2f} after")
    model.merge_and_unload().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
