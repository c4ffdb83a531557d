"""Text for calibration and evaluation: named data sets, local files, and the token windows cut from them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hisvd.component.families import ADAPTERS
from hisvd.errors import HiSVDError, first_line
from hisvd.schema import is_text
from hisvd.utils.progress import is_progress_shown

if TYPE_CHECKING:  # the settings take their choices from the protocols, so they import this module
    from hisvd.settings import CalibrationSettings

# The splits that evaluation and calibration read; C4 has no test split.
EVALUATION_SPLIT = {"wikitext2": "test", "ptb": "test", "c4": "validation", "python-docs": "test"}
CALIBRATION_SPLIT = dict.fromkeys(EVALUATION_SPLIT, "train")
MAX_DOCUMENTS = {"c4": {"train": 20_000, "validation": 2_000}}  # read from the start of a split
PYTHON_DOCS_TRAIN_SHARE = 0.8
HELD_OUT_WINDOWS = 16
TOKENS_PER_BATCH = 4096  # a compromise between speed and memory

# How the text of an evaluation is tokenized. Published tables (SVD-LLM's code and those built on it) let the tokenizer
# add its special tokens once, at the ends of the joined text: for Llama one BOS, which shifts every window by a token.
PROTOCOLS = {"default": {"add_special_tokens": False}, "svd-llm": {"add_special_tokens": True}}


def default_data_dir() -> str:
    """HISVD_DATA_DIR, or `data`."""
    return os.environ.get("HISVD_DATA_DIR", "data")


Document = str | list[dict]  # a text, or the messages of a chat


def load_documents(dataset: str, splits: dict[str, str], data_dir: str | None = None) -> list[Document]:
    """The documents of a named data set (its split taken from `splits`), of a local file or of a folder of files.

    A named data set is looked for in `data_dir` (None: `default_data_dir()`), then on the Hugging Face Hub; either way
    its documents are the Hub's rows: lines of WikiText-2, sentences of PTB, web pages of C4. A file is one document, or
    one per line if it is .json or .jsonl: a text, or the messages of a chat. Of a folder the files with the suffixes
    FOLDER_SUFFIXES are read, those in folders inside it too, by name.

    Raises:
        HiSVDError: an unknown name, a missing or unreadable file, a folder without text, or the Hub cannot be reached.
    """
    if dataset not in splits:
        return [document for path in _text_files(dataset, splits) for document in _read_text_file(path)]
    split = splits[dataset]
    if dataset in BUNDLED_READERS:
        return BUNDLED_READERS[dataset](split)
    limit = MAX_DOCUMENTS.get(dataset, {}).get(split)
    local = Path(data_dir or default_data_dir()) / f"{dataset}-{split}{LOCAL_SUFFIXES[dataset]}"
    if local.is_file():
        return _read_file(local, LOCAL_READERS[dataset], limit)
    try:
        return list(islice(HUB_READERS[dataset](split), limit))
    except Exception as error:  # datasets, its file systems and the hub client raise dozens of types
        raise HiSVDError(
            f"'{dataset}' was not found as {local} and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}); put that file there, or pass a text file (--dataset FILE, --datasets FILE) "
            "or python-docs."
        ) from None


def load_text(dataset: str, splits: dict[str, str], data_dir: str | None = None) -> str:
    """What `load_documents` returns, as one text."""
    return join_documents(load_documents(dataset, splits, data_dir))


def join_documents(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """One text: documents with blank lines between them, chats in the tokenizer's template, one after the other.

    Raises:
        HiSVDError: the template does not take a chat, or the tokenizer has none.
    """
    texts = [d if isinstance(d, str) else _rendered(d, tokenizer) for d in documents]
    chats = len(documents) > 0 and not any(isinstance(d, str) for d in documents)
    return ("" if chats else "\n\n").join(texts)


def _rendered(messages: list[dict], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise HiSVDError("The data set holds chats, but the model's tokenizer has no chat template; pass plain text.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # jinja2's, or whatever the template raises
        raise HiSVDError(
            f"The model's chat template does not take a chat that starts with {str(messages[0])[:80]} "
            f"({first_line(error)}); change the data set."
        ) from None


def _text_files(dataset: str, names: Iterable[str]) -> list[Path]:
    """The file of this name, or the text files in the folder of this name, in order.

    Raises:
        HiSVDError: there is none, or the name is not in UTF-8.
    """
    path = Path(dataset)
    if not path.is_file() and not (dataset and path.is_dir()):
        raise HiSVDError(
            f"'{dataset}' is neither a file, a folder, nor one of the data sets {', '.join(names)}; pass one of those."
        )
    if not is_text(dataset):
        raise HiSVDError(f"The name of the data set, {dataset!r}, is not in UTF-8; rename it.")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in FOLDER_SUFFIXES and file.is_file())
    if not files:
        raise HiSVDError(f"The folder {path} holds no text ({', '.join(FOLDER_SUFFIXES)}); pass another one.")
    return files


def _read_text_file(path: Path) -> list[Document]:
    return _read_file(path, FILE_READERS.get(path.suffix, _whole_text))


def _read_file(path: Path, reader: Callable[[TextIO], Iterable[Document]], limit: int | None = None) -> list[Document]:
    """The documents that `reader` finds in a file, at most the first `limit` of them.

    Raises:
        HiSVDError: the file is not UTF-8 text, or a line is not a JSON object with a text or a chat.
    """
    try:
        with open(path, encoding="utf-8") as file:
            documents = list(islice(reader(file), limit))
        for document in documents:
            _written(document).encode()  # JSON can spell half a surrogate pair, which is no character
    except UnicodeError:
        raise HiSVDError(f"{path} is not UTF-8 text; convert it first.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HiSVDError(
            f"{path} must hold one JSON object on every line, with a 'text' string, or 'messages': a list of at "
            "least one, with 'role' and 'content' strings."
        ) from None
    except OSError as error:
        raise HiSVDError(f"Cannot read {path}: {error.strerror}.") from None
    if any("\0" in _written(document) for document in documents):
        raise HiSVDError(f"{path} is not text: it holds NUL characters; pass a text file.")
    return documents


def _written(document: Document) -> str:
    """The words of a document.

    Raises:
        TypeError, KeyError: it is neither a text nor a chat.
    """
    return document if isinstance(document, str) else "".join(m["role"] + m["content"] for m in document)


def _whole_text(file: TextIO) -> Iterator[str]:
    yield file.read()


def _json_lines(file: TextIO) -> Iterator[Document]:
    for line in file:
        if line.strip():
            record = json.loads(line)
            document = record["messages"] if "messages" in record else record["text"]
            if not isinstance(document, str):
                _written(document)
                if not document:
                    raise ValueError("a chat without messages")
            yield document


def _wikitext2_lines(file: TextIO) -> Iterator[str]:
    """The Hub's rows: lines with their line break, blank ones as empty strings."""
    return (line if line.strip() else "" for line in file)


def _ptb_lines(file: TextIO) -> Iterator[str]:
    """The Hub's rows: sentences without the space and the line break around them."""
    return map(str.strip, file)


def _python_docs(split: str) -> list[Document]:
    """The language reference that ships with CPython; the first 80 % of its topics are the training split."""
    from pydoc_data.topics import topics

    texts: list[Document] = [topics[name] for name in sorted(topics)]
    cut = int(len(texts) * PYTHON_DOCS_TRAIN_SHARE)
    return {"train": texts[:cut], "test": texts[cut:]}[split]


def _from_hub(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`, with its progress bars only where ours are shown."""
    import datasets

    silenced = not is_progress_shown() and not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **options)
    finally:
        if silenced:
            datasets.enable_progress_bars()


def _hub_wikitext2(split: str) -> Iterable[str]:
    return _from_hub("Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)["text"]


def _hub_ptb(split: str) -> Iterable[str]:
    # The repository's loading script no longer runs; the Hub keeps its output as parquet on this branch.
    return _from_hub("ptb-text-only/ptb_text_only", split=split, revision="refs/convert/parquet")["sentence"]


def _hub_c4(split: str) -> Iterable[str]:
    file = f"en/c4-{split}.00000-of-{C4_SHARDS[split]:05d}.json.gz"
    stream = _from_hub("allenai/c4", data_files={split: file}, split=split, streaming=True)
    return (document["text"] for document in stream)


C4_SHARDS = {"train": 1024, "validation": 8}
FILE_READERS = {".json": _json_lines, ".jsonl": _json_lines}  # by suffix; every other file is one document
FOLDER_SUFFIXES = (".txt", ".md", *FILE_READERS)  # of the files that are read from a folder
BUNDLED_READERS: dict[str, Callable[[str], list[Document]]] = {"python-docs": _python_docs}
LOCAL_SUFFIXES = {"wikitext2": ".txt", "ptb": ".txt", "c4": ".json"}
LOCAL_READERS: dict[str, Callable[[TextIO], Iterable[Document]]] = {
    "wikitext2": _wikitext2_lines,
    "ptb": _ptb_lines,
    "c4": _json_lines,
}
HUB_READERS = {"wikitext2": _hub_wikitext2, "ptb": _hub_ptb, "c4": _hub_c4}


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, protocol: str = "default") -> torch.Tensor:
    """The whole text as one row of token ids (tokens,); PROTOCOLS says which special tokens are added."""
    return torch.tensor(tokenizer(text, verbose=False, **PROTOCOLS[protocol])["input_ids"], dtype=torch.long)


def check_vocabulary(ids: torch.Tensor, config: PreTrainedConfig, model: str) -> None:
    """Refuse token ids (tokens,) that the model, named `model` in messages, has no embedding for.

    Raises:
        HiSVDError: there is one.
    """
    vocabulary = config.get_text_config().vocab_size
    if len(ids) and int(ids.max()) >= vocabulary:
        raise HiSVDError(
            f"The tokenizer of {model} gives token {int(ids.max())}, but its config.json has vocab_size {vocabulary}; "
            "the tokenizer belongs to another model."
        )


def leading_bos(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that starts every window if the family breaks without it (Gemma); None: windows are all text.

    Text for such windows is tokenized without special tokens, so that BOS does not appear twice.

    Raises:
        HiSVDError: the model has no embedding for it.
    """
    adapter = ADAPTERS.get(config.get_text_config().model_type)
    if adapter is None or not adapter.needs_bos:
        return None
    text = config.get_text_config()
    bos = text.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is not None and not 0 <= bos < text.vocab_size:
        raise HiSVDError(
            f"The model {config.name_or_path} starts texts with token {bos} (bos_token_id), but its config.json has "
            f"vocab_size {text.vocab_size}; correct one of them."
        )
    return bos


def with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Windows (count, n) with the token `bos` in front of each, (count, n + 1); None leaves them as they are."""
    return windows if bos is None else torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def text_length(seqlen: int, bos: int | None) -> int:
    """Tokens of text in a window of `seqlen` tokens."""
    return seqlen if bos is None else seqlen - 1


def split_held_out(ids: torch.Tensor, nsamples: int, seqlen: int, sampling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids to calibrate on, held-out windows (k, seqlen) from the end of the text).

    k is at most 16 and at most a twentieth of the text; the first windows (`first`) take precedence. It can be 0.
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


def calibration_tokens(
    ids: torch.Tensor, settings: "CalibrationSettings", bos: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(windows to calibrate on (nsamples, seqlen), held-out windows (k, seqlen)) from the text's ids (tokens,).

    With `bos` each window is that token and seqlen - 1 tokens of text.

    Raises:
        HiSVDError: the text is too short.
    """
    nsamples, length, sampling = settings.nsamples, text_length(settings.seqlen, bos), settings.sampling
    ids, held_out = split_held_out(ids, nsamples, length, sampling)
    windows = calibration_windows(ids, nsamples, length, sampling, settings.seed, settings.dataset)
    return with_bos(windows, bos), with_bos(held_out, bos)


def evaluation_windows(
    ids: torch.Tensor, seqlen: int, nsamples: int | None, source: str, bos: int | None = None
) -> torch.Tensor:
    """(windows, seqlen) consecutive, non-overlapping windows from the start, at most `nsamples`.

    With `bos` each window is that token and seqlen - 1 tokens of text.

    Raises:
        HiSVDError: the text is shorter than one window.
    """
    length = text_length(seqlen, bos)
    count = len(ids) // length
    if count == 0:
        raise HiSVDError(
            f"The text of {source} has {len(ids)} tokens, fewer than one window of {seqlen}; lower --seqlen or use a "
            "longer text."
        )
    count = min(count, nsamples or count)
    return with_bos(ids[: count * length].view(count, length), bos)


def default_batch_size(seqlen: int) -> int:
    """Sequences per forward pass, so that it sees about TOKENS_PER_BATCH tokens."""
    return max(1, TOKENS_PER_BATCH // seqlen)


def token_fingerprint(tokens: torch.Tensor) -> str:
    """sha256 of token windows: their shape and ids."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def file_safe(name: str) -> str:
    """`name` with everything but letters, digits, dot, dash and underscore replaced by '_'."""
    return re.sub(r"[^\w.-]", "_", name)
