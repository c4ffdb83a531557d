"""Tiny models with real tokenizers, built once per session; the programs run in this process or as a user would."""

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, _TemporaryFileWrapper

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: fail at once instead of trying to reach the Hub

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from hisvd.cli import calibrate, compress, evaluate, report
from hisvd.rank_allocation import budget_of
from hisvd.shape_utils import is_dense, next_rank, stored_parameters
from hisvd.utils.data_utils import CALIBRATION_SPLIT, load_text
from hisvd.utils.load_utils import read_pt

ROOT = Path(__file__).parents[1]
PROGRAMS = {"calibrate": calibrate.main, "compress": compress.main, "evaluate": evaluate.main, "report": report.main}
SHARED = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGS = {
    "llama": LlamaConfig(**SHARED, **HEADS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHARED, **HEADS, sliding_window=8, head_dim=24),
    "qwen2": Qwen2Config(**SHARED, **HEADS),  # biases on q, k, v
}

IDS = torch.arange(40).view(2, 20)


SLOWEST = [f"test_{name}.py" for name in ("real", "families", "distributed", "scripts", "placement")]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long tier only where -m names it; the slowest files first, so that xdist's processes end together."""
    if "long" not in config.option.markexpr:  # a default in addopts would not survive -m "not real"
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOWEST)))


@dataclass
class Result:
    code: int
    output: str
    error: str


def run(program: str, *arguments: object) -> Result:
    """Run one of the programs in this process."""
    result = CliRunner().invoke(PROGRAMS[program], [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def expect_sentence(result: Result, *fragments: str) -> None:
    """Bad input: exit code 2, one line with the culprit in it, no traceback."""
    assert result.code == 2, result
    lines = [line for line in result.error.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, result.error
    assert "Traceback" not in result.error
    for fragment in fragments:
        assert fragment in lines[0], (fragment, lines[0])


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def saved_tensors(path):
    if path.is_file():
        return read_pt(path)[1]
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def linear_parameters(tensors):
    """Stored parameters of the decoder's linear weights, from the tensors alone."""
    return sum(
        t.numel()
        for name, t in tensors.items()
        if "proj" in name and not name.endswith(("bias", "permutation")) and t.dim() == 2
    )


def assert_budget_spent(ranks, sublayers, target, form):
    """At most the budget, and no room left for one more rank anywhere."""
    stored = [stored_parameters(r, s.shape, form) for r, s in zip(ranks, sublayers, strict=True)]
    left = budget_of(sublayers, target) - sum(stored)
    assert left >= 0
    for r, s, spent in zip(ranks, sublayers, stored, strict=True):
        if not is_dense(r, s.shape, form):
            larger = stored_parameters(next_rank(r, s.shape, form), s.shape, form)
            assert larger - spent > left, "room for one more rank was left"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens trained on python-docs."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([load_text("python-docs", CALIBRATION_SPLIT, "data")[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def build_model(config: AutoConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, dtype=torch.float32) -> Path:
    """A random-weight model folder; biases are random too, so that a lost one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """One tiny float32 model folder per family."""
    root = tmp_path_factory.mktemp("models")
    return {name: build_model(config, root / name, tokenizer) for name, config in CONFIGS.items()}


@functools.cache
def _short_text_file() -> _TemporaryFileWrapper:
    file = NamedTemporaryFile("w", suffix=".txt", encoding="utf-8")  # noqa: SIM115 (deleted at exit)
    file.write(load_text("python-docs", CALIBRATION_SPLIT, "data")[:40_000])
    file.flush()
    return file


def short_text() -> str:
    """A file with the start of python-docs: to tokenize the whole takes longer than to evaluate a tiny model on it."""
    return _short_text_file().name


def calibrate_arguments(model: Path, output_dir: Path, name: str = "tiny") -> list[object]:
    """calibrate.py on 6 windows of 32 tokens."""
    where = ["--model_path", model, "--model_name", name, "--output_dir", output_dir, "--dataset", short_text()]
    return [*where, "--nsamples", 6, "--seqlen", 32, "--batch_size", 4]


@pytest.fixture(scope="session")
def caches(tmp_path_factory, model_folders) -> dict[str, Path]:
    """The calibration cache of every tiny model."""
    root = tmp_path_factory.mktemp("caches")
    for name, folder in model_folders.items():
        assert run("calibrate", *calibrate_arguments(folder, root, name)).code == 0
    return {name: root / f"{name}_n6_s32_with_hessian" for name in model_folders}


@pytest.fixture
def chain(model_folders, caches, tmp_path):
    """compress.py on a tiny model: chain("llama", "0.8", "out.pt", *options) → the output's path."""

    def call(family: str, targets: str, output: str, *options: object) -> Path:
        where = ["--model_path", model_folders[family], "--calib_cache", caches[family]]
        goal = ["--target_compression", targets, "--save_model", tmp_path / output]
        result = run("compress", *where, *goal, *options)
        assert result.code == 0, result
        return tmp_path / output

    return call


@pytest.fixture(scope="session")
def _whole_files(tmp_path_factory, tokenizer) -> Path:
    from hostile_files import make_all  # which imports this module

    folder = tmp_path_factory.mktemp("whole")
    make_all(folder, tokenizer)
    return folder


@pytest.fixture
def files(_whole_files, tmp_path) -> Path:
    """A folder with a tiny model, its cache, and the compressed model as a folder and a file, to be damaged."""
    return shutil.copytree(_whole_files, tmp_path / "files")
