"""The pages of --report: well-formed, self-contained, escaped, and with the numbers of the JSON files."""

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from conftest import expect_sentence, run, short_text

import hisvd
from hisvd.cache_defaults import resolved
from hisvd.calibration_cache import SPECTRA, open_finished_cache
from hisvd.component.experts import kind_of
from hisvd.evaluation_page import read_results
from hisvd.rank_allocation import tails_of
from hisvd.report import plan_report
from hisvd.utils.html_report import printable

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "</title><script>alert('$\\frac{')</script>\x00\ud800&amp;\""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The tables of a page (rows of cells), the attributes of its tags, and whether every tag is closed in turn."""

    def __init__(self, path):
        super().__init__()
        self.text, self.open, self.tables, self.found = path.read_text("utf-8"), [], [], []
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, first):
        """The rows below the header line that starts with `first`, by their first cells, of each such table."""
        return [{row[0]: row[1:] for row in rows} for header, *rows in self.tables if header[0] == first]


def checked(path):
    """The page, of which all links stay inside it and every figure says what it shows."""
    page = Page(path)
    assert not re.search(r"<(script|link|iframe|img|object|embed)|@import|@font-face", page.text)
    for tag, attributes in page.found:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value.startswith(("#", "data:image/")), (tag, value)
    figures = [attributes for tag, attributes in page.found if tag == "svg"]
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 20 for attributes in figures)
    assert page.text.count("<figcaption>") == len(figures)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page, len(figures)


@pytest.fixture(scope="module")
def compressed(model_folders, caches, tmp_path_factory):
    """Two compressed models, and the folder of their page."""
    folder = tmp_path_factory.mktemp("compressed")
    where = ["--model_path", model_folders["llama"], "--calib_cache", caches["llama"], "--update", "none"]
    where += ["--target_compression", "0.8,0.5", "--save_model", folder / "out", "--report", folder / "report"]
    assert run("compress", *where).code == 0
    return folder


def test_the_page_of_compress_says_what_hisvd_json_says(compressed, caches):
    page, figures = checked(compressed / "report" / "compress.html")
    drawn = json.loads((compressed / "report" / "compress.json").read_text())
    sublayers = open_finished_cache(str(caches["llama"])).sublayers
    types = list(dict.fromkeys(kind_of(s.path) for s in sublayers))
    assert len(drawn) == 2 and figures == sum(4 + (one["widths"] is not None) for one in drawn)
    for one, rows, target in zip(drawn, page.table("sublayer type"), (80, 50), strict=True):
        report = json.loads((compressed / f"out_{target}p" / "hisvd.json").read_text())
        assert list(rows) == types == one["map"]["types"]
        for kind, row in report["by_type"].items():
            assert [int(cell.replace(",", "")) for cell in rows[kind][:-1]] == list(row.values())
        for row, s in zip(report["sublayers"], sublayers, strict=True):
            if row["form"] != "dense":
                assert one["map"]["texts"][types.index(kind_of(s.path))][s.layer] == str(row["rank"])
            assert one["map"]["kept"][types.index(kind_of(s.path))][s.layer] == row["numbers"] / s.size
        assert one["predicted_loss"] == report["predicted_loss"]
        assert f"{report['predicted_loss']['total']:.4f} nats" in page.text
        assert f"{report['linear_numbers_after']:,}" in page.text and "lwe_strength" not in page.text
        ranks = {row["name"]: row["rank"] for row in report["sublayers"] if row["form"] != "dense"}
        assert all(spectrum["rank"] == ranks.get(spectrum["name"]) for spectrum in one["spectra"])


def test_every_kind_of_plan_has_a_page(caches, tmp_path):
    """Bytes and integers, ranks by stages without neurons, and neurons alone."""
    cache = open_finished_cache(str(caches["llama"]))
    reports = []
    for settings in ({"budget": "bytes"}, {"allocation": "hisvd", "whitening": "input"}, {"moves": "neurons"}):
        settings = hisvd.CompressionSettings(**settings)
        (plan,) = hisvd.plan(cache, 0.45 if settings.budget == "bytes" else 0.7, settings)
        reports.append(plan_report(cache, plan, resolved(settings, cache)))
    reports[1]["source_model"] = reports[1]["settings"]["modulation"] = HOSTILE
    page, _ = checked(hisvd.compression_report(reports, cache, tmp_path))
    assert "alert" in page.text and "\x00" not in page.text
    by_bytes, stages, neurons = json.loads((tmp_path / "compress.json").read_text())
    kept = [share for line in by_bytes["map"]["kept"] for share in line]
    sizes = [s.size for kind in by_bytes["map"]["types"] for s in cache.sublayers if kind_of(s.path) == kind]
    stored = sum(share * 2 * size for share, size in zip(kept, sizes, strict=True))
    assert stored == pytest.approx(reports[0]["linear_bytes_after"])
    assert "alpha" in stages["settings"] and stages["predicted_loss"] is None and not stages["widths"]
    assert "factors" not in neurons["settings"] and neurons["widths"]


def test_predictions_are_half_of_what_is_cut_off(caches):
    cache = open_finished_cache(str(caches["llama"]))
    (plan,) = hisvd.plan(cache, 0.6, hisvd.CompressionSettings(moves="low_rank"))
    for index, layer in enumerate(plan.predicted_loss):
        small = cache.read_small(index, SPECTRA)
        tails = [tails_of(small[f"{s.path}.two_sided_singular_values"]) for s in cache.sublayers_of(index)]
        ranks = [plan.ranks[s.name] for s in cache.sublayers_of(index)]
        due = sum(float(tail[rank - 1]) / 2 for tail, rank in zip(tails, ranks, strict=True))
        assert layer == {"low_rank": pytest.approx(due, rel=1e-5), "neurons": 0, "rounding": 0}
    (both,) = hisvd.plan(cache, 0.6)
    added = [sum(sum(layer.values()) for layer in p.predicted_loss) for p in (both, plan)]
    assert any(layer["neurons"] for layer in both.predicted_loss) and 0 < added[0] < added[1]


def test_an_output_of_before_predictions_is_still_finished(compressed, model_folders, caches, tmp_path):
    shutil.copytree(compressed / "out_50p", tmp_path / "old")
    report = json.loads((tmp_path / "old" / "hisvd.json").read_text())
    del report["predicted_loss"]
    (tmp_path / "old" / "hisvd.json").write_text(json.dumps(report))
    settings = hisvd.CompressionSettings(update="none")
    (model,) = hisvd.compress(model_folders["llama"], caches["llama"], tmp_path / "old", 0.5, settings)
    assert model.report == report


def test_the_page_of_evaluate_says_what_was_measured(compressed, model_folders, caches, tmp_path):
    models = [model_folders["llama"], compressed / "out_80p", compressed / "out_50p"]
    where = [part for model in models for part in ("--model_path", model)]
    where += ["--datasets", short_text(), "--seqlen", 32, "--nsamples", 2, "--report", tmp_path]
    result = run("evaluate", *where, "--prompt", "def f(x):", "--prompt", "<b>")
    assert result.code == 0, result
    page, figures = checked(tmp_path / "evaluate.html")
    assert figures == 2
    results = json.loads((tmp_path / "evaluate.json").read_text())
    (by_model, compared, how), (written,) = page.table("model"), page.table("prompt")
    (first, *others) = results
    for one, (name, row) in zip(results, by_model.items(), strict=True):
        perplexity = one["perplexity"][short_text()]["perplexity"]
        assert name.split()[0] == one["model"].rpartition("/")[2] and row[-1] == f"{perplexity:.2f}"
        assert row[0] == f"{one['linear_kept']:.2%}" and how[name.split()[0]][0] == one["model"]
    for one, row in zip(others, compared.values(), strict=True):
        measured = one["perplexity"][short_text()]["nll"] - first["perplexity"][short_text()]["nll"]
        assert row == [f"{one['predicted_loss']:.4f}", f"{measured:.4f}"]
    assert list(written) == ["def f(x):", "<b>"]
    for i, cells in enumerate(written.values()):
        texts = [printable(one["samples"][i]["continuation"]) for one in results]
        assert [cell.split() for cell in cells] == [text.split() for text in texts]

    again = ["--figures", tmp_path / "evaluate.json", "--calib_cache", caches["llama"], "--report", tmp_path / "again"]
    result = run(
        "report", *again, *(part for target in (80, 50) for part in ("--model_path", compressed / f"out_{target}p"))
    )
    assert result.code == 0 and result.output.count("Page written to") == 2, result
    for drawn in (tmp_path / "evaluate.json", compressed / "report" / "compress.json"):  # ids in the pages are random
        again = tmp_path / "again" / drawn.name
        assert again.read_bytes() == drawn.read_bytes() and checked(again.with_suffix(".html"))[1] >= 2


def test_figures_and_folders_that_no_page_can_be_made_of(compressed, model_folders, caches, tmp_path):
    figures = {"perplexity": {"a": {"perplexity": 2.0, "nll": 0.7, "tokens_scored": 9}}, "documents": {"a": 1}}
    figures |= {"model": "m", "source_model": None, "linear_numbers_dense": 9, "linear_kept": 1, "seqlen": 9}
    figures |= {"weight_file_bytes": 9, "protocol": "default", "dtype": "float32", "device": "cpu"}
    contents = {"good": [figures], "other": [figures | {"perplexity": {}}], "part": [{"model": "m"}], "list": [1]}
    files = {name: tmp_path / f"{name}.json" for name in contents}
    for name, content in contents.items():
        files[name].write_text(json.dumps(content))
    page = ["--report", tmp_path / "page"]
    expect_sentence(run("report", *page), "--figures", "--model_path")
    expect_sentence(run("report", *page, "--model_path", compressed / "out_80p"), "--calib_cache")
    for name, culprit in (("part", "source_model"), ("list", "not an object"), ("other", "other texts")):
        expect_sentence(run("report", *page, "--figures", files["good"], "--figures", files[name]), name, culprit)
    files["more"] = tmp_path / "more.json"
    files["more"].write_text(json.dumps([figures | {"model": "small"}, figures]))
    assert [one["model"] for one in read_results([files["good"], files["more"]])] == ["m", "small"]
    models = [*page, "--calib_cache", caches["llama"], "--model_path"]
    expect_sentence(run("report", *models, model_folders["llama"]), str(model_folders["llama"]))
    old = shutil.copytree(compressed / "out_50p", tmp_path / "old")
    report = json.loads((old / "hisvd.json").read_text())
    del report["by_type"]
    (old / "hisvd.json").write_text(json.dumps(report))
    expect_sentence(run("report", *models, old), "by_type", str(old))
    assert not list((tmp_path / "page").iterdir())


def test_hostile_names_and_texts_are_escaped(tmp_path):
    figures = {"perplexity": 1e7, "nll": 16.1, "tokens_scored": 9}
    common = {"linear_numbers_stored": 8, "linear_numbers_dense": 9, "linear_kept": 8 / 9, "weight_file_bytes": 10}
    common |= {"seqlen": 9, "device": HOSTILE, "dtype": "float32", "protocol": "default", "documents": {HOSTILE: 1}}
    common |= {"perplexity": {HOSTILE: figures}, "samples": [{"prompt": HOSTILE, "continuation": HOSTILE}]}
    common["speed"] = {"prompt_tokens": 8, "decode_tokens_per_s": 2.0}
    small = common | {"model": f"b/{HOSTILE}", "source_model": f"a/{HOSTILE}", "predicted_loss": 0.1}
    small["speed"] = common["speed"] | {
        "reference": {"model": HOSTILE, **common["speed"]},
        "ratios": {"decode_tokens_per_s": 1.5},
    }
    original = common | {"model": f"a/{HOSTILE}", "source_model": None}
    page, drawn = checked(hisvd.evaluation_report([original, small], tmp_path))
    assert drawn == 2 and "alert" in page.text and "2.0 (1.50×)" in page.text


def test_what_cannot_be_reported_is_refused_at_once(compressed, monkeypatch, tmp_path):
    where = ["--model_path", compressed / "out_50p", "--datasets", short_text()]
    refused = run("evaluate", *where, "--prompt", "x", "--offload_folder", tmp_path / "o")
    expect_sentence(refused, "--prompt", "--offload_folder")
    expect_sentence(run("evaluate", *where, "--report", tmp_path, "--attention_residual"), "--report")
    (tmp_path / "file").write_text("")
    expect_sentence(run("evaluate", *where, "--report", tmp_path / "file"), str(tmp_path / "file"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expect_sentence(run("evaluate", *where, "--report", tmp_path), "matplotlib", "pip install 'hisvd[report]'")
    assert not (tmp_path / "evaluate.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page(compressed, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    page = (compressed / "report" / "compress.html").as_uri()
    shown = subprocess.run([CHROMIUM, *options, "--dump-dom", page], capture_output=True, text=True, timeout=240)
    assert shown.stdout.count("<figcaption>") >= 8 and "</body>" in shown.stdout
    assert "CONSOLE" not in shown.stderr  # where the browser writes what it cannot load or run
