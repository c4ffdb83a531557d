"""compress.py started again after a kill at an awkward moment: nothing finished is lost, nothing foreign is deleted."""

import json

import pytest
import torch
from conftest import expect_sentence, run, saved_tensors

from hisvd import compression, int6_gate
from hisvd.sequential_update import SequentialUpdate
from hisvd.utils import save_utils
from hisvd.utils.load_utils import read_pt
from hisvd.utils.save_utils import ModelWriter


@pytest.fixture
def command(model_folders, caches, tmp_path):
    """compress.py to OUT in the test's folder."""

    def call(targets, *options, output="out"):
        where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"]]
        goal = ["--target_compression", targets, "--save_model", tmp_path / output]
        return run("compress", *where, *goal, *options)

    return call


@pytest.fixture
def factored(monkeypatch):
    """The indices of the layers that are factored from now on."""
    layers, real = [], compression.factor_layer
    monkeypatch.setattr(
        compression,
        "factor_layer",
        lambda job, update, index, *rest: layers.append(index) or real(job, update, index, *rest),
    )
    return layers


def kill_once(monkeypatch, owner, name, when=lambda *args: True):
    """Interrupt the first call of owner.name for which `when` holds."""
    real, killed = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        if not killed and when(*args):
            killed.append(True)
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def assert_same(left, right):
    left, right = saved_tensors(left), saved_tensors(right)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("moment", ["complete", "save"])
def test_a_kill_while_the_file_is_put_together_keeps_all_shards(command, factored, tmp_path, monkeypatch, moment):
    if moment == "save":
        kill_once(monkeypatch, save_utils.torch, "save")
    else:
        kill_once(monkeypatch, ModelWriter, "complete")
    options = ("--update", "none")
    assert command("0.6", *options, output="out.pt").code == 130
    assert factored == [0, 1, 2, 3] and not (tmp_path / "out.pt").exists()
    assert command("0.6", *options, output="out.pt").code == 0
    assert factored == [0, 1, 2, 3] and not (tmp_path / "out.pt.partial").exists()
    assert command("0.6", *options, output="whole.pt").code == 0
    assert_same(tmp_path / "out.pt", tmp_path / "whole.pt")


@pytest.mark.parametrize("ending", ["", ".pt"])
def test_a_kill_after_the_first_of_two_outputs_resumes_with_the_second(
    command, factored, tmp_path, monkeypatch, ending
):
    kill_once(monkeypatch, ModelWriter, "finish", lambda writer: "50p" in writer.output.name)
    assert command("0.8,0.5", output=f"out{ending}").code == 130
    first = tmp_path / f"out_80p{ending}"
    stamp = first.stat().st_mtime_ns
    again = command("0.8,0.5", output=f"out{ending}")
    assert again.code == 0, again
    assert factored == [0, 1, 2, 3] and first.stat().st_mtime_ns == stamp and again.output.count("Saved to") == 2
    assert sorted(p.name for p in tmp_path.glob("out*")) == [f"out_50p{ending}", f"out_80p{ending}"]


def test_finished_outputs_need_no_more_room(command, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(compression, "check_disk", lambda _, size, __: needed.append(size))
    assert command("0.5", output="alone").code == 0
    kill_once(monkeypatch, ModelWriter, "finish", lambda writer: "50p" in writer.output.name)
    assert command("0.8,0.5").code == 130
    assert command("0.8,0.5").code == 0
    alone, both, resumed = needed
    assert resumed == alone < both


def test_a_finished_output_is_left_as_it_is(command, factored, tmp_path):
    assert command("0.6", "--update", "none").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    factored.clear()
    assert command("0.6", "--update", "none").code == 0
    assert not factored and before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    expect_sentence(command("0.6", "--update", "none", "--factors", "svd"), str(tmp_path / "out"), "already exists")


def test_the_decision_of_the_quality_gate_outlives_a_kill(command, tmp_path, monkeypatch):
    options = ("--export", "int6", "--quality_gate_delta", "0.5", "--update", "none")
    kill_once(monkeypatch, ModelWriter, "complete")
    assert command("1", *options).code == 130
    monkeypatch.setattr(int6_gate, "longest_within", None)  # measured once, on the shards before their codes
    assert command("1", *options).code == 0
    monkeypatch.undo()
    assert command("1", *options, output="whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    gates = [json.loads((tmp_path / name / "hisvd.json").read_text())["quality_gate"] for name in ("out", "whole")]
    assert gates[0] == gates[1] and gates[0]["exported"]


@pytest.mark.parametrize("lost", ["streams", "processes"])
def test_without_its_hidden_states_an_update_redoes_only_what_is_missing(
    command, factored, tmp_path, monkeypatch, lost
):
    kill_once(monkeypatch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 3)
    assert command("0.6").code == 130
    assert factored == [0, 1, 2, 3]
    for file in (tmp_path / "out.partial" / "work").glob("*.bin"):
        if lost == "streams":
            file.unlink()
        else:  # two processes name theirs so
            file.rename(file.with_name(file.name.replace("_even", "_0_of_2_even").replace("_odd", "_0_of_2_odd")))
    factored.clear()
    assert command("0.6").code == 0
    assert factored == [3]
    assert command("0.6", output="whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.bin")) and not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_kill_while_finished_layers_are_passed_again_leaves_nothing_to_be_mistaken(
    command, tmp_path, monkeypatch, layer
):
    with monkeypatch.context() as patch:
        kill_once(patch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 3)
        assert command("0.6").code == 130
    for file in (tmp_path / "out.partial" / "work").glob("*.bin"):
        file.unlink()
    with monkeypatch.context() as patch:
        kill_once(patch, SequentialUpdate, "advance", lambda update, index: index == layer)
        assert command("0.6").code == 130
    assert command("0.6").code == 0
    assert command("0.6", output="whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(
    "options",
    [("--moves", "both"), ("--export", "plain", "--width_multiple", "8"), ("--moves", "neurons", "--export", "dense")],
    ids=["both", "plain", "dense"],
)
def test_a_kill_between_layers_that_lose_neurons(command, factored, tmp_path, monkeypatch, options, layer):
    with monkeypatch.context() as patch:
        kill_once(patch, ModelWriter, "write_shard", lambda writer, index, tensors: index == layer)
        assert command("0.6", *options).code == 130
    if layer == 3:  # the layers that are finished are passed again
        for file in (tmp_path / "out.partial" / "work").glob("*.bin"):
            file.unlink()
    factored.clear()
    assert command("0.6", *options).code == 0
    assert factored == list(range(layer, 4))
    assert command("0.6", *options, output="whole").code == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    rows = json.loads((tmp_path / "out" / "hisvd.json").read_text())["sublayers"]
    assert any("stored_shape" in row for row in rows)


def test_the_originals_states_of_a_run_alone_are_not_those_of_later_layers(command, tmp_path, monkeypatch):
    """With several targets they lie in the first one's folder, and what is left in another's is of a layer below."""
    for stop, targets, output in ((1, "0.5", "out_50p"), (3, "0.8,0.5", "out")):
        with monkeypatch.context() as patch:
            kill_once(patch, SequentialUpdate, "start", lambda update, index, stored, stop=stop: index == stop)
            assert command(targets, output=output).code == 130
    assert command("0.5", output="out_50p").code == 0
    assert command("0.5", output="whole").code == 0
    assert_same(tmp_path / "out_50p", tmp_path / "whole")


def test_hidden_states_of_another_number_of_processes_do_not_outlive_a_run(command, tmp_path, monkeypatch):
    """Otherwise a run of that number could later take them for those of the layer at which it resumes."""
    kill_once(monkeypatch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 2)
    assert command("0.6").code == 130
    work = tmp_path / "out.partial" / "work"
    for name in ("hidden_0_of_2_even.bin", "hidden_1_of_2_even.bin", "original_0_of_2_odd.bin"):
        (work / name).write_bytes(b"of two processes")
    kill_once(monkeypatch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 3)
    assert command("0.6").code == 130
    assert sorted(path.name for path in work.glob("*.bin")) == [
        "hidden_even.bin",
        "hidden_odd.bin",
        "original_even.bin",
        "original_odd.bin",
    ]


def test_folders_that_are_not_ours_are_never_deleted(command, tmp_path):
    mine = tmp_path / "out.partial" / "thesis.bin"
    mine.parent.mkdir()
    mine.write_text("years of work")
    expect_sentence(command("0.6", "--update", "none"), str(mine.parent), "not an unfinished run")
    assert mine.read_text() == "years of work"
    mine.rename(tmp_path / "out.pt.partial.bin")
    mine.parent.rmdir()
    assert command("0.6", "--update", "none").code == 0


@pytest.mark.parametrize("output", ["out", "out.pt"])
def test_what_someone_puts_beside_the_working_files_stays(command, tmp_path, monkeypatch, output):
    kill_once(monkeypatch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 2)
    assert command("0.6", output=output).code == 130
    partial = tmp_path / f"{output}.partial"
    others = ["thesis.txt", "tokenizer_thesis.txt", "model-of-mine.safetensors", "model-00001-of-00005.b.safetensors"]
    for place in ("work/thesis.bin", "work/thesis.safetensors", *others):
        (partial / place).write_text("years of work")
    assert command("0.6", output=output).code == 0
    kept = partial if output.endswith(".pt") else tmp_path / output
    assert sorted(path.name for path in (kept / "work").iterdir()) == ["thesis.bin", "thesis.safetensors"]
    assert all((kept / name).read_text() == "years of work" for name in others)
    if kept == partial:
        assert sorted(path.name for path in kept.iterdir()) == sorted(["work", *others])
        assert not any("thesis" in name for name in read_pt(tmp_path / output)[0])


@pytest.mark.parametrize("foreign", ["folder", "link"])
def test_beside_a_finished_file_a_folder_of_someone_else_stays(command, tmp_path, foreign):
    assert command("0.6", "--update", "none", output="out.pt").code == 0
    mine, partial = tmp_path / "mine", tmp_path / "out.pt.partial"
    mine.mkdir()
    names = ["config.json", "hisvd.json", "README.md", "tokenizer.json", "model-00001-of-00005.safetensors"]
    for name in names:
        (mine / name).write_text("{}")
    if foreign == "link":
        partial.symlink_to(mine)
    else:
        mine.rename(partial)
    assert command("0.6", "--update", "none", output="out.pt").code == 0
    assert sorted(path.name for path in partial.iterdir()) == sorted(names)


def test_a_folder_called_work_that_is_not_ours_is_refused(command, tmp_path):
    mine = tmp_path / "out.partial" / "work" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    expect_sentence(command("0.6", "--update", "none"), "out.partial", "not an unfinished run")
    assert [path.name for path in mine.parent.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("link", ["out.partial", "out.partial/work"])
def test_links_in_place_of_our_folders_are_refused(command, tmp_path, link):
    (tmp_path / "mine").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "mine")
    expect_sentence(command("0.6", "--update", "none"), "out.partial", "not an unfinished run")
    assert (tmp_path / link).is_symlink() and not list((tmp_path / "mine").iterdir())


def test_an_unfinished_run_of_other_settings_is_kept(command, tmp_path, monkeypatch):
    kill_once(monkeypatch, ModelWriter, "write_shard", lambda writer, index, tensors: index == 2)
    assert command("0.6", "--update", "none").code == 130
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    expect_sentence(command("0.7", "--update", "none"), "out.partial", "other settings", "--save_model")
    assert len(shards) == 2 and all(path.stat().st_mtime_ns == stamp for path, stamp in shards.items())
    assert command("0.6", "--update", "none").code == 0
