"""Pages that say what the code says: extending.md runs, options.md and the errors are the programs', links lead on."""

import ast
import importlib.util
import re
from pathlib import Path

from conftest import HEADS, PROGRAMS, ROOT, SHARED, build_model
from pages import DOCS, README, blocks_of, text_of
from test_readme import option_names
from transformers import StableLmConfig

from hisvd.allocations import ALLOCATIONS
from hisvd.component.families import ADAPTERS
from hisvd.component.low_rank import MODULE_OF_FORM
from hisvd.factor_forms import FORMS

OPTIONS, ERRORS = ROOT / "docs" / "options.md", ROOT / "docs" / "troubleshooting.md"
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/serve.md")]
GAP = "…"  # what differs in a message


def test_the_examples_of_extending_run(model_folders, tokenizer, tmp_path, monkeypatch):
    blocks = blocks_of(ROOT / "docs" / "extending.md")
    assert [block.kind for block in blocks] == 3 * ["python"]
    entries = [(ADAPTERS, "stablelm"), (FORMS, "scaled"), (MODULE_OF_FORM, "scaled"), (ALLOCATIONS, "deeper")]
    for registry, name in entries:
        assert name not in registry
        monkeypatch.setitem(registry, name, None)  # so that the entry is removed again, even after a failure
        del registry[name]
    stablelm = build_model(StableLmConfig(**SHARED, **HEADS), tmp_path / "stablelm", tokenizer)
    work = tmp_path / "work"
    work.mkdir()
    names = {"model_folder": stablelm, "other_folder": model_folders["llama"], "work": work}
    for number, block in enumerate(blocks, 1):
        exec(compile(block.text, f"docs/extending.md, block {number}", "exec"), names)
    assert all(name in registry for registry, name in entries)


def test_the_page_of_options_is_what_the_programs_say():
    spec = importlib.util.spec_from_file_location("option_tables", ROOT / "scripts" / "option_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert text_of(OPTIONS) == tables.page(), "run: python scripts/option_tables.py"
    for name, command in PROGRAMS.items():
        section = re.search(rf"^## {name}\n(.*?)(^## |\Z)", text_of(OPTIONS), re.S | re.M).group(1)
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        listed = set(re.findall(r"--\w+", "".join(row.split("|")[1] for row in rows)))
        assert listed == option_names(command) | {"--help"}


def messages_in_code() -> set[str]:
    """All texts of the packages, with GAP for what is filled in."""
    found = set()
    for path in (path for folder in ("hisvd", "component", "utils") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
    return found


def test_the_errors_that_are_explained_exist():
    quoted = re.findall(r"^\| `([^`]+)` \|", text_of(ERRORS), re.M)
    assert len(quoted) > 50 and len(set(quoted)) == len(quoted)
    messages = messages_in_code()
    for beginning in quoted:
        pattern = re.compile(".*?".join(map(re.escape, beginning.split(GAP))), re.S)
        assert any(pattern.match(message) for message in messages), beginning


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings_that_exist():
    for page in (README, *DOCS, *OTHERS):
        text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists() and ROOT in (target, *target.parents), f"{page.name}: {link}"
            assert not anchor or anchor in anchors_of(target), f"{page.name}: {link}"


def test_every_page_is_in_the_table_of_contents():
    index = ROOT / "docs" / "index.md"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of(index)))
    assert listed == {page.name for page in DOCS} - {index.name}
