"""Calibration text from folders, chats and several sources."""

import json
from collections import Counter

import pytest
import torch
from conftest import calibrate_arguments, expect_sentence, run

from hisvd.calibration_cache import read_cache
from hisvd.utils.data_utils import load_text
from hisvd.utils.text_mixture import interleaved, shared_out, weighted_sources

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"


@pytest.fixture
def sources(tmp_path):
    """Two files whose texts share no word."""
    for name, word in (("a", "apples "), ("b", "bicycles ")):
        (tmp_path / f"{name}.txt").write_text(word * 3000)
    return tmp_path


def calibrated(model, folder, dataset, *options):
    arguments = calibrate_arguments(model, folder)
    arguments[arguments.index("--dataset") + 1] = dataset
    return run("calibrate", *arguments, "--no_gradients", *options)


def tokens_of(folder):
    return read_cache(folder / "tiny_n6_s32_with_hessian").read_tokens()


def test_a_folder_is_read_by_name_with_the_folders_inside_it(tmp_path):
    (tmp_path / "z").mkdir()
    for path, text in {"b.txt": "second", "a.md": "first", "z/c.jsonl": '{"text": "third"}', "d.pdf": "never"}.items():
        (tmp_path / path).write_text(text)
    assert load_text(str(tmp_path), {}) == "first\n\nsecond\n\nthird"


def test_sources_share_the_windows_by_weight_and_take_turns(model_folders, tokenizer, sources):
    dataset = f"{sources / 'a.txt'}=2,{sources / 'b.txt'}=1"
    assert calibrated(model_folders["llama"], sources / "out", dataset).code == 0
    windows = [tokenizer.decode(row) for row in tokens_of(sources / "out")]
    kinds = ["apples" in text for text in windows]
    assert all(("apples" in text) != ("bicycles" in text) for text in windows)
    assert kinds == [True, False, True, True, False, True]
    held_out = [tokenizer.decode(row) for row in read_cache(sources / "out/tiny_n6_s32_with_hessian").read_held_out()]
    assert Counter("apples" in text for text in held_out) == {True: 11, False: 5}


def test_chats_are_written_in_the_template_of_the_tokenizer(model_folders, tokenizer, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folders["llama"].iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = [{"role": "user", "content": "What is an apple?"}, {"role": "assistant", "content": "A fruit."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 200)
    result = calibrated(folder, tmp_path, tmp_path / "chats.jsonl", "--sampling", "first")
    assert result.code == 0, result
    text = tokenizer.decode(tokens_of(tmp_path).flatten())
    one = "<user>What is an apple?</user><assistant>A fruit.</assistant>"
    assert text == (one * 200)[: len(text)] and len(text) > len(one)
    result = calibrated(model_folders["llama"], tmp_path / "none", tmp_path / "chats.jsonl")
    expect_sentence(result, "no chat template")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("python-docs=0,FOLDER/a.txt", "no positive weight"),
        ("python-docs=x,FOLDER/a.txt", "no positive weight"),
        ("FOLDER/a.txt=inf", "no positive weight"),
        ("FOLDER/a.txt,FOLDER/a.txt", "twice"),
        ("FOLDER/a.txt=100,FOLDER/b.txt=1", "no window for"),
        ("FOLDER/empty", "holds no text"),
        ("FOLDER/nothing", "neither a file, a folder"),
        (",", "neither a file, a folder"),
        ("FOLDER/bad.jsonl", "'messages'"),
        ("FOLDER/silent.jsonl", "'messages'"),
    ],
)
def test_bad_sources(model_folders, sources, dataset, message):
    (sources / "empty").mkdir()
    (sources / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}')
    (sources / "silent.jsonl").write_text('{"messages": []}')
    expect_sentence(calibrated(model_folders["llama"], sources, dataset.replace("FOLDER", str(sources))), message)


def test_a_file_with_commas_and_weights_in_its_name_is_one_source(tmp_path):
    path = tmp_path / "a,b=2.txt"
    path.write_text("x")
    assert weighted_sources(str(path)) == {str(path): 1.0}
    assert weighted_sources("wikitext2=3, c4") == {"wikitext2": 0.75, "c4": 0.25}


def test_a_list_of_sources_may_be_longer_than_a_name_of_a_file():
    names = [f"chats_of_customer_{i}.jsonl" for i in range(20)]
    assert weighted_sources(",".join(names)) == dict.fromkeys(names, 1 / 20)


@pytest.mark.parametrize("counts", [[6], [4, 2], [1, 10, 3], [5, 5, 5]])
def test_every_stretch_holds_the_same_mix(counts):
    order = interleaved(counts)
    assert sorted(order) == list(range(sum(counts)))
    source = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[order]
    for i, count in enumerate(counts):
        expected = torch.arange(1, sum(counts) + 1) * count / sum(counts)
        assert ((source == i).cumsum(0) - expected).abs().max() <= len(counts) / 2
    shares = [count / sum(counts) for count in counts]
    assert shared_out(sum(counts), shares) == counts
    assert sum(shared_out(17, shares)) == 17
