"""The pages of documentation and the code blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT


class Block(NamedTuple):
    kind: str  # the language after the three backticks
    text: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> list[Block]:
    """All code blocks; a block of another shape would be checked by nothing."""
    text = text_of(page)
    found = [Block(*parts) for parts in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)]
    assert text.count("```") == 2 * len(found), page
    return found


def spans_of(page: Path) -> list[str]:
    """All inline code."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M))


README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
