"""The examples in examples/ on a tiny model; test_finetuning.py runs finetune.py."""

import importlib.util
import json

from click.testing import CliRunner
from conftest import ROOT, short_text
from pages import blocks_of


def test_the_chain_in_python(model_folders, tmp_path):
    spec = importlib.util.spec_from_file_location("compress_example", ROOT / "examples" / "compress.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    where = [str(model_folders["llama"]), short_text()]
    sizes = ["--nsamples", "6", "--seqlen", "32", "--evaluate_on", short_text()]
    for output, goal in (("small", ["--target", "0.6"]), ("found", ["--max_ppl_increase", "0.02"])):
        arguments = [*where, str(tmp_path / output), *sizes, *goal]
        result = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "of the linear weights" in result.output and result.output.count("perplexity of") == 2
        assert "The model" in result.output.rpartition("perplexity of")[2]
        report = json.loads((tmp_path / output / "hisvd.json").read_text())
        assert 0 < report["linear_kept"] < 1 and ("quality_search" in report) == (output == "found")


def test_the_client_is_python():
    (block,) = (block for block in blocks_of(ROOT / "examples" / "serve.md") if block.kind == "python")
    compile(block.text, "serve.md", "exec")  # it needs a server
