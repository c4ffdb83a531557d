"""Text for calibration and evaluation: named data sets, local files, and the token windows cut from them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hisvd.errors import HiSVDError

C4_DOCUMENTS = {"train": 20_000, "validation": 2_000}
# The splits that calibrate and evaluate read; C4 has no test split.
EVALUATION_SPLIT = {"wikitext2": "test", "ptb": "test", "c4": "validation", "python-docs": "test"}
CALIBRATION_SPLIT = dict.fromkeys(EVALUATION_SPLIT, "train")
PYTHON_DOCS_TRAIN_SHARE = 0.8
HELD_OUT_WINDOWS = 16
TOKENS_A_BATCH = 4096  # a compromise of speed and memory


def default_data_dir() -> str:
    """HISVD_DATA_DIR, or `data`."""
    return os.environ.get("HISVD_DATA_DIR", "data")


def load_text(dataset: str, splits: dict[str, str], data_dir: str) -> str:
    """The text of a named data set (its split taken from `splits`) or of a local .txt, .json or .jsonl file.

    A named data set is looked for in `data_dir`, then on the Hugging Face Hub.

    Raises:
        HiSVDError: an unknown name, a missing or unreadable file, or the Hub is out of reach.
    """
    if dataset not in splits:
        path = Path(dataset)
        if not path.is_file():
            raise HiSVDError(
                f"'{dataset}' is neither a file nor one of the data sets {', '.join(splits)}; pass one of those."
            )
        return read_text_file(path)
    split = splits[dataset]
    if dataset == "python-docs":
        return _python_docs(split)
    local = Path(data_dir) / f"{dataset}-{split}.{'json' if dataset == 'c4' else 'txt'}"
    if local.is_file():
        return read_text_file(local, C4_DOCUMENTS[split] if dataset == "c4" else None)
    try:
        return HUB_READERS[dataset](split)
    except Exception as error:  # datasets, its file systems and the hub client raise dozens of types
        raise HiSVDError(
            f"'{dataset}' was not found as {local} and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}); put that file there, or pass a text file (--dataset FILE, --datasets FILE) "
            "or python-docs."
        ) from None


def read_text_file(path: Path, max_documents: int | None = None) -> str:
    """A .txt file as it is, or the `text` fields of a .json / .jsonl file's lines joined with blank lines.

    Raises:
        HiSVDError: not UTF-8, or a line that is no JSON object with a `text` string.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix not in (".json", ".jsonl"):
                return file.read()
            return _join(json.loads(line)["text"] for line in islice(file, max_documents) if line.strip())
    except UnicodeDecodeError:
        raise HiSVDError(f"{path} is not UTF-8 text; convert it first.") from None
    except (ValueError, KeyError, TypeError):
        raise HiSVDError(f"{path} must hold one JSON object with a 'text' string on every line.") from None
    except OSError as error:
        raise HiSVDError(f"Cannot read {path}: {error.strerror}.") from None


def _join(documents: Iterable[str]) -> str:
    return "\n\n".join(documents)


def _python_docs(split: str) -> str:
    """The language reference that CPython carries; its first 80 % of topics is the training split."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    cut = int(len(texts) * PYTHON_DOCS_TRAIN_SHARE)
    return _join(texts[:cut] if split == "train" else texts[cut:])


def _hub_wikitext2(split: str) -> str:
    from datasets import load_dataset

    return _join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])


def _hub_ptb(split: str) -> str:
    from datasets import load_dataset

    # The repository's loading script no longer runs; the Hub keeps its output as parquet on this branch.
    data = load_dataset("ptb-text-only/ptb_text_only", split=split, revision="refs/convert/parquet")
    return _join(data["sentence"])


def _hub_c4(split: str) -> str:
    from datasets import load_dataset

    shards = 1024 if split == "train" else 8
    file = f"en/c4-{split}.00000-of-{shards:05d}.json.gz"
    stream = load_dataset("allenai/c4", data_files={split: file}, split=split, streaming=True)
    return _join(document["text"] for document in islice(stream, C4_DOCUMENTS[split]))


HUB_READERS: dict[str, Callable[[str], str]] = {
    "wikitext2": _hub_wikitext2,
    "ptb": _hub_ptb,
    "c4": _hub_c4,
}


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The whole text as one row of token ids (tokens,), without added special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def split_held_out(ids: torch.Tensor, nsamples: int, seqlen: int, sampling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids to calibrate on, held-out windows (k, seqlen) from the end of the text).

    k is at most 16 and at most a twentieth of the text; the first windows (`first`) go before. It can be 0.
    """
    spare = len(ids) - nsamples * seqlen if sampling == "first" else len(ids)
    count = max(0, min(HELD_OUT_WINDOWS, len(ids) // (20 * seqlen), spare // seqlen))
    cut = len(ids) - count * seqlen
    return ids[:cut], ids[cut:].view(count, seqlen)


def calibration_windows(
    ids: torch.Tensor, nsamples: int, seqlen: int, sampling: str, seed: int, source: str
) -> torch.Tensor:
    """(nsamples, seqlen) token windows: drawn at random with `seed`, or the first ones (`first`).

    Raises:
        HiSVDError: the text is too short.
    """
    needed = nsamples * seqlen if sampling == "first" else seqlen
    if len(ids) < needed:
        raise HiSVDError(
            f"The text of {source} has {len(ids)} tokens, but {needed} are needed; lower --nsamples or --seqlen, "
            "or use a longer text."
        )
    if sampling == "first":
        return ids[:needed].view(nsamples, seqlen)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=generator)
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def evaluation_windows(ids: torch.Tensor, seqlen: int, nsamples: int | None, source: str) -> torch.Tensor:
    """(windows, seqlen) consecutive, non-overlapping windows from the start, at most `nsamples`.

    Raises:
        HiSVDError: the text is shorter than one window.
    """
    count = len(ids) // seqlen
    if count == 0:
        raise HiSVDError(
            f"The text of {source} has {len(ids)} tokens, less than one window of {seqlen}; lower --seqlen or use a "
            "longer text."
        )
    count = min(count, nsamples or count)
    return ids[: count * seqlen].view(count, seqlen)


def default_batch_size(seqlen: int) -> int:
    """Sequences of one forward, so that it sees about TOKENS_A_BATCH tokens."""
    return max(1, TOKENS_A_BATCH // seqlen)


def token_fingerprint(tokens: torch.Tensor) -> str:
    """sha256 of token windows: their shape and ids."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def file_safe(name: str) -> str:
    """`name` with everything but letters, digits, dot, dash and underscore replaced by '_'."""
    return re.sub(r"[^\w.-]", "_", name)
