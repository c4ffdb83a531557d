"""The code blocks of docs/extending.md run in order, as a reader would run them."""

import re

from conftest import HEADS, ROOT, SHARED, build_model
from transformers import StableLmConfig

from hisvd.allocations import ALLOCATIONS
from hisvd.component.families import ADAPTERS
from hisvd.component.low_rank import MODULE_OF_FORM
from hisvd.factor_forms import FORMS


def test_the_examples_of_extending_run(model_folders, tokenizer, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    entries = [(ADAPTERS, "stablelm"), (FORMS, "scaled"), (MODULE_OF_FORM, "scaled"), (ALLOCATIONS, "deeper")]
    for registry, name in entries:
        assert name not in registry
        monkeypatch.setitem(registry, name, None)  # so that the entry is removed again, even after a failure
        del registry[name]
    stablelm = build_model(StableLmConfig(**SHARED, **HEADS), tmp_path / "stablelm", tokenizer)
    work = tmp_path / "work"
    work.mkdir()
    names = {"model_folder": stablelm, "other_folder": model_folders["llama"], "work": work}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/extending.md, block {number}", "exec"), names)
    assert all(name in registry for registry, name in entries)
