"""Outputs where something else is: a sentence before the work starts, and nothing of the user's lost."""

import os

import pytest
from conftest import expect_sentence
from hostile_files import compress

from hisvd.utils.save_utils import ModelWriter


class Stopped(Exception):
    pass


@pytest.fixture
def unfinished(files, monkeypatch):
    """The files with `new.partial`, of a run that ended in its second shard."""
    write = ModelWriter.write_shard

    def stop(writer, index, tensors):
        if index:
            raise Stopped
        write(writer, index, tensors)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ModelWriter, "write_shard", stop)
        compress(files, "new")
    return files


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_users_files_where_shards_are_packed(unfinished, kind):
    packed, mine = unfinished / "new.partial" / "work" / "packed", unfinished / "mine"
    folder = mine if kind == "link" else packed
    folder.mkdir()
    (folder / "thesis.safetensors").write_text("years")
    if kind == "link":
        packed.symlink_to(mine)
    expect_sentence(compress(unfinished, "new"), "new.partial")
    assert (folder / "thesis.safetensors").read_text() == "years"
    (folder / "thesis.safetensors").unlink()
    if kind == "link":
        packed.unlink()
    assert compress(unfinished, "new").code == 0


def test_what_a_run_left_that_was_killed_while_it_packed(unfinished):
    packed = unfinished / "new.partial" / "work" / "packed"
    packed.mkdir()
    for name in ("model.safetensors", ".model.safetensors.tmp", ".hisvd_probe_12", "model-00001-of-00002.safetensors"):
        (packed / name).write_text("half")
    assert compress(unfinished, "new").code == 0
    new, old = (unfinished / name / "model.safetensors" for name in ("new", "out"))
    assert new.read_bytes() == old.read_bytes()


@pytest.mark.parametrize("name", ["new", "new.pt"])
def test_a_link_that_leads_nowhere(files, name):
    (files / name).symlink_to("nowhere")
    expect_sentence(compress(files, name), str(files / name), "link")
    assert os.readlink(files / name) == "nowhere"


@pytest.mark.parametrize("name", ["pipe", "pipe.pt"])
def test_a_pipe(files, name):
    os.mkfifo(files / name)
    expect_sentence(compress(files, name), str(files / name))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a\udcff/new", "new\udcff"])
def test_names_that_no_output_has(files, name):
    expect_sentence(compress(files, "new", "--save_model", name))
