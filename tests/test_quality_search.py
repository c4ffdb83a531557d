"""compress_within: the smallest model whose perplexity stays within a bound."""

import json
import math

import pytest
from conftest import expect_sentence, run, saved_tensors

import hisvd
from hisvd import CompressionSettings, Resources, quality_search
from hisvd.quality_search import smallest_within
from hisvd.utils.files import locked

QUIET = Resources(progress=False)


@pytest.mark.parametrize("exponent", [0.7, 1.3, 2, 3.5, 6])
@pytest.mark.parametrize("bound", [1.001, 1.05, 1.5, 8])
def test_the_search_finds_what_trying_all_would(exponent, bound):
    tries = []

    def ratio(percent):
        tries.append(percent)
        return math.exp(3 * ((100 - percent) / 100) ** exponent)

    found = smallest_within(ratio, bound)
    assert found == next(p for p in range(1, 101) if p == 100 or ratio(p) <= bound)
    searched = tries[: tries.index(1)] if 1 in tries else tries
    assert len(searched) <= 13 and len(set(searched)) == len(searched)


@pytest.mark.parametrize("smallest", [1, 37, 80, 99, 100])
def test_the_search_copes_with_steps_and_with_models_that_cannot_be(smallest):
    assert smallest_within(lambda p: 1.0 if p >= smallest else math.inf, 1.05) == smallest
    assert smallest_within(lambda p: 0.9 if p >= smallest else 2.0, 1.0) == smallest


def test_the_model_is_measured_and_stays_within_the_bound(model_folders, caches, tmp_path, monkeypatch):
    """An interruption in the middle costs no measurement; what the search made is deleted."""
    settings = CompressionSettings(allocation="uniform")
    where = (model_folders["llama"], caches["llama"], tmp_path / "out", 0.01, settings, QUIET)
    measure, names = quality_search.streamed_perplexity, []

    def interrupted(*arguments):
        names.append(arguments[0].checkpoint.folder.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(quality_search, "streamed_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hisvd.compress_within(*where)
    (model,) = hisvd.compress_within(*where)
    assert len(set(names)) == len(names) - 1, "only the measurement that was interrupted is repeated"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "hisvd.json").read_text())
    assert report == model.report and report["target_compression"] == model.plan.target
    figures = report["quality_search"]["perplexities"]
    percent = round(100 * model.plan.target)
    assert figures[f"made_{percent}p"] <= 1.01 * figures["original"]
    assert figures.get(f"tried_{percent - 1}p", math.inf) > 1.01 * figures["original"]
    again = hisvd.compress(*where[:2], tmp_path / "again", percent / 100, settings, QUIET)[0]
    assert saved_tensors(again.path).keys() == saved_tensors(model.path).keys()


def test_two_searches_for_one_output_do_not_mix(model_folders, caches, tmp_path):
    where = (model_folders["llama"], caches["llama"], tmp_path / "out", 0.1)
    with locked(tmp_path / ".out.lock", "out"), pytest.raises(hisvd.HiSVDError, match="Another run"):
        hisvd.compress_within(*where, CompressionSettings(update="none"), QUIET)
    assert not list(tmp_path.iterdir())


def test_a_search_with_other_settings_and_a_foreign_folder_are_left_alone(model_folders, caches, tmp_path, monkeypatch):
    where = (model_folders["llama"], caches["llama"], tmp_path / "out", 0.1)
    folder = tmp_path / "out.search"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(hisvd.HiSVDError, match="is not a search of HiSVD"):
        hisvd.compress_within(*where)
    (folder / "thesis.txt").unlink()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quality_search, "streamed_perplexity", interrupted)
        hisvd.compress_within(*where, CompressionSettings(update="none"), QUIET)
    with pytest.raises(hisvd.HiSVDError, match="with other settings"):
        hisvd.compress_within(*where, CompressionSettings(factors="svd"), QUIET)
    (folder / "thesis.txt").write_text("mine")
    hisvd.compress_within(*where, CompressionSettings(update="none"), QUIET)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("output", "increase", "message"),
    [("out.pt", 0.1, "makes a folder"), ("out", -1.0, "--max_ppl_increase -1"), ("", 0.1, "already exists")],
)
def test_bad_input(model_folders, caches, tmp_path, output, increase, message):
    with pytest.raises(hisvd.HiSVDError, match=message):
        hisvd.compress_within(model_folders["llama"], caches["llama"], tmp_path / output, increase)


def test_the_program_takes_a_bound_in_the_place_of_a_target(model_folders, caches, tmp_path):
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--update", "none"]
    output = ["--save_model", tmp_path / "out", "--json", tmp_path / "out.json"]
    result = run("compress", *where, *output, "--max_ppl_increase", 0.02)
    assert result.code == 0, result
    (figures,) = json.loads((tmp_path / "out.json").read_text())
    percent = round(100 * figures["target_compression"])
    before, after = (figures["quality_search"]["perplexities"][n] for n in ("original", f"made_{percent}p"))
    assert after <= 1.02 * before and f"{before:.2f} → {after:.2f}" in result.output
    hisvd.load(tmp_path / "out", verify=True)
    expect_sentence(run("compress", *where, *output), "Pass one of --target_compression")
    both = ("--max_ppl_increase", 0.1, "--target_bytes", 0.5)
    expect_sentence(run("compress", *where, *output, *both), "Pass one of --target_compression")
    expect_sentence(run("compress", *where, "--plan_only", "--max_ppl_increase", 0.1), "does not go with --plan_only")
