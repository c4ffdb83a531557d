"""Random bits, truncations and edits: all end in a HiSVDError, or with a model that works. The long tier."""

import copy
import json
import random
import shutil
import signal
import struct
from contextlib import contextmanager

import pytest
import torch
from conftest import build_model, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import hisvd
from hisvd.calibration_cache import read_cache
from hisvd.evaluation import streamed_model
from hisvd.utils import save_utils
from hisvd.utils.save_utils import saved_report

pytestmark = pytest.mark.long

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
TEXT = "The quick brown fox jumps over the lazy dog. " * 40
CACHE = "tiny_n2_s16_with_hessian"
SECONDS = 60  # after which a call hangs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A model, its cache, and three compressed forms of it."""
    root = tmp_path_factory.mktemp("whole")
    (root / "text.txt").write_text(TEXT)
    build_model(CONFIG, root / "model", tokenizer)
    where = ["--model_path", root / "model"]
    size = ["--nsamples", 2, "--seqlen", 16, "--dataset", root / "text.txt"]
    assert run("calibrate", *where, "--model_name", "tiny", "--output_dir", root, *size).code == 0
    where += ["--calib_cache", root / CACHE, "--update", "none", "--target_compression", "0.6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_utils, "MAX_SHARD_BYTES", 50_000)  # several files and an index
        for name, options in {"out": (), "out.pt": (), "int8": ("--linear_dtype", "int8")}.items():
            assert run("compress", *where, "--save_model", root / name, *options).code == 0
    return root


@pytest.fixture(scope="module")
def files(whole, tmp_path_factory):
    """A copy to be damaged; whoever damages a file restores it."""
    return shutil.copytree(whole, tmp_path_factory.mktemp("copy") / "files")


@contextmanager
def replaced(path, data):
    """Within the context, the file holds `data`."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def within_seconds(function, *arguments):
    """What the function returns, or the message of its HiSVDError; anything else fails the test."""

    def stop(*_):
        raise AssertionError(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return function(*arguments)
    except hisvd.HiSVDError as error:
        return str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_whole_cache(folder):
    cache = read_cache(folder)
    for index in range(cache.num_layers):
        cache.read_layer(index)
    cache.read_tokens()
    cache.read_held_out()


@pytest.mark.parametrize("place", ["cache", "folder", "file"])
def test_damaged_weights_are_detected(whole, files, place):
    draw, folder = random.Random(place), files / {"cache": CACHE, "folder": "out", "file": "."}[place]
    shards = sorted(folder.glob("out.pt" if place == "file" else "*.safetensors"))
    assert shards
    unread = 0
    for _ in range(70):
        path = draw.choice(shards)
        data = bytearray(path.read_bytes())
        if draw.random() < 0.7:
            position = draw.randrange(8 * len(data))
            data[position // 8] ^= 1 << position % 8
        else:
            del data[draw.randrange(len(data)) :]
        with replaced(path, data):
            if place == "cache":
                found = within_seconds(read_whole_cache, folder)
            else:
                found = within_seconds(lambda: hisvd.load(folder if place == "folder" else path, verify=True))  # noqa: B023
            if isinstance(found, str):
                assert path.name in found
            else:
                unread += 1  # padding between the parts of a .pt
                assert place == "file" and same_weights(found, hisvd.load(whole / "out.pt"))
    assert unread < 20


def same_weights(left, right):
    return all(torch.equal(t, right.state_dict()[name]) for name, t in left.state_dict().items())


NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 31, 33, 2**16, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308])
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers(-5, 70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["", "..", "/dev/zero", "../x", "a\0", "hisvd", "int8", "pivoted", "svd", "narrow", "default"])
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=5
)
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "set", "delete", "add", "swap"]), VALUES),
    min_size=1,
    max_size=3,
)


def places(value, path=()):
    """All paths into a JSON value, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in items:
        yield (*path, key)
        yield from places(member, (*path, key))


def edited(value, edits, below=()):
    """A copy of a JSON value after some edits at paths that start with `below`."""
    value = copy.deepcopy(value)
    for number, action, new in edits:
        known = [path for path in places(value) if path[: len(below)] == below and path != below]
        if not known:
            break
        *parents, last = known[number % len(known)]
        parent = value
        for key in parents:
            parent = parent[key]
        if action == "set":
            parent[last] = new
        elif action == "delete":
            del parent[last]
        elif action == "add":
            parent.append(new) if isinstance(parent, list) else parent.__setitem__(str(new)[:20], parent[last])
        else:
            source = value
            for key in known[number // 7 % len(known)]:
                source = source[key]
            parent[last] = copy.deepcopy(source)
    return value


def evaluate(files, name):
    how = hisvd.EvaluationSettings(seqlen=16, nsamples=1)
    return hisvd.evaluate(files / name, [str(files / "text.txt")], how, hisvd.Resources(progress=False))


def load_and_stream(files, name):
    hisvd.load(files / name)
    streamed_model(str(files / name), torch.device("cpu"), "float32", 16)


def compressed_again(files, name):
    hisvd.plan(files / CACHE, [0.7])
    shutil.rmtree(files / "new", ignore_errors=True)
    how = hisvd.CompressionSettings(update="none")
    hisvd.compress(files / "model", files / CACHE, files / "new", 0.7, how, hisvd.Resources(progress=False))


def verified(files, name):
    saved_report(files / name)
    hisvd.load(files / name, verify=True)


INDEX = "model.safetensors.index.json"
MODULES = ("quantization_config", "modules")
# What is edited: file → what reads it, and the path of the part that is edited.
TARGETS = {
    "config of an original": ("model/config.json", evaluate, ()),
    "config of a compressed model": ("out/config.json", evaluate, ()),
    "modules": ("out/config.json", evaluate, MODULES),
    "modules in integers": ("int8/config.json", evaluate, MODULES),
    "index": (f"out/{INDEX}", load_and_stream, ()),
    "hisvd.json": ("out/hisvd.json", verified, ()),
    "manifest": (f"{CACHE}/manifest.json", compressed_again, ()),
}
QUICKLY = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize(("name", "reads", "below"), TARGETS.values(), ids=TARGETS)
def test_edited_json(files, name, reads, below):
    path = files / name
    content = json.loads(path.read_text())

    @settings(max_examples=100, **QUICKLY)
    @given(EDITS)
    def check(edits):
        with replaced(path, json.dumps(edited(content, edits, below)).encode()):
            within_seconds(reads, files, name.partition("/")[0])

    check()


@pytest.mark.parametrize("name", ["model/config.json", f"out/{INDEX}", f"{CACHE}/manifest.json"])
def test_json_with_random_bytes(files, name):
    path = files / name
    data = path.read_bytes()
    reads = compressed_again if "manifest" in name else load_and_stream

    @settings(max_examples=50, **QUICKLY)
    @given(st.integers(0, len(data) - 1), st.integers(0, 30), st.binary(max_size=20))
    def check(start, length, inserted):
        with replaced(path, data[:start] + inserted + data[start + length :]):
            within_seconds(reads, files, name.partition("/")[0])

    check()


@pytest.mark.parametrize("name", ["model/model.safetensors", "out/model-00001-of-00003.safetensors"])
def test_edited_safetensors_headers(files, name):
    path = files / name
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])

    @settings(max_examples=100, **QUICKLY)
    @given(EDITS, st.sampled_from([0, 0, 0, 1, -1, 2**20, 2**63]))
    def check(edits, error):
        text = json.dumps(edited(header, edits)).encode()
        with replaced(path, struct.pack("<Q", max(0, len(text) + error)) + text + data[8 + length :]):
            within_seconds(evaluate, files, name.partition("/")[0])
            within_seconds(load_and_stream, files, name.partition("/")[0])

    check()
