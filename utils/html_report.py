"""Self-contained HTML pages: escaped text, tables that scroll, and figures of matplotlib as inline SVG.

Names of files, generated text and settings may be hostile: what is not markup made here goes through `escaped`.
"""

import html
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hisvd.errors import HiSVDError
from hisvd.utils.files import atomic_path, make_folder

if TYPE_CHECKING:  # matplotlib is an optional extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#010203", "#010204"  # drawn in these, then replaced by the page's colours, light or dark
COLORS = ("#2b83c6", "#d9641e", "#2a9d62", "#b565a7", "#b8860b", "#3f9fd0", "#8c8c8c", "#7a6ad8", "#c0504d", "#5d9e2f")
MARKERS = "osD^vP<>Xh"
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #8a929b; --line: #d5dae0; --back: #ffffff; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --faint: #8b949e; --line: #3a414a; --back: #15181c; --band: #1e2329; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--ink); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
a { color: inherit; }
p, figcaption { max-width: 46rem; }
figcaption { font-size: .875rem; margin-top: .4rem; }
figure { margin: .75rem 0 1.5rem; }
.scroll { overflow-x: auto; }
div.scroll:has(table) { margin: 0 0 1.25rem; }
.scroll > svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--faint); vertical-align: bottom; }
tbody tr:nth-child(odd) { background: var(--band); }
.text th, .text td { text-align: left; overflow-wrap: anywhere; max-width: 24rem; }
.text td { white-space: pre-wrap; min-width: 11rem; }
.text th { min-width: 8rem; }
"""


def check_report(folder: Path | None) -> None:
    """Refuse, before the work starts, a page that could not be written at its end; None: there is none.

    Raises:
        HiSVDError: matplotlib is missing, or the folder cannot be written.
    """
    if folder is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise HiSVDError("--report needs matplotlib, which is not installed; run pip install 'hisvd[report]'.")
    make_folder(folder)


def printable(value: Any) -> str:
    """`value` as text that every browser and font takes: no control characters, no half of a surrogate pair."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def escaped(value: Any) -> str:
    """`value` as text inside HTML, or inside a quoted attribute."""
    return html.escape(printable(value))


def shortened(value: Any, length: int = 28) -> str:
    """`value` in one line of a figure, its middle left out where it is long."""
    text = " ".join(printable(value).split())
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths of models, or the whole paths where two of these are the same."""
    names = [Path(path).name or path for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escaped(text)}</p>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, kind: str = "numbers") -> str:
    """A table with its caption; columns are flush right but for the first, with the kind "text" all flush left.

    It has no header line where `header` is empty.
    """
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
    head = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    body = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in others)}</tr>\n'
        for first, *others in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><caption>{escaped(caption)}</caption>\n'
        f"{head}<tbody>\n{body}</tbody></table></div>\n"
    )


@contextmanager
def drawing(rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure of `size` inches and its axes, row by row, for `figure`; to be drawn on within the context."""
    import matplotlib
    from cycler import cycler

    look: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLORS),
        "font.size": 9,
        "axes.titlesize": 9,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has more fonts
        from matplotlib.figure import Figure

        canvas = Figure(figsize=size, layout="constrained")
        yield canvas, list(canvas.subplots(rows, columns, squeeze=False).flatten())


def figure(drawn: "Figure", name: str, caption: str, alt: str) -> str:
    """A figure with its caption, and `alt` for those who do not see it; `name` is its own on the page."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)  # of several figures in one page, ids would be the same
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    least, most = (round(per_inch * drawn.get_figwidth()) for per_inch in (58, 104))  # below `least`, it scrolls
    label = f'role="img" aria-label="{escaped(alt)}" style="min-width: {least}px; max-width: {most}px"'
    svg = svg.replace("<svg ", f"<svg {label} ", 1)
    return (
        f'<figure id="{name}"><div class="scroll" tabindex="0">{svg}</div>'
        f"<figcaption>{escaped(caption)}</figcaption></figure>\n"
    )


def draw_map(
    axes: "Axes", shares: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]], top: float
) -> None:
    """Cells coloured by shares from 0 to `top` (None: no cell), a row below the other, with their texts.

    Texts have at most two lines, and a reader can tell them from every colour.
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    colors = matplotlib.colormaps["viridis"]
    for y, (row, labels) in enumerate(zip(shares, texts, strict=True)):
        for x, (share, label) in enumerate(zip(row, labels, strict=True)):
            if share is None:
                continue
            color = colors(min(share / top, 1.0))
            axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, color=color, linewidth=0))
            bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 0.5
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "linespacing": 1.0}
            text = axes.text(x, y, label, color="black" if bright else "white", **look)
            text.set_in_layout(False)  # it is inside its cell: laying out hundreds would take seconds
    axes.set(xlim=(-0.5, len(shares[0]) - 0.5), ylim=(len(shares) - 0.5, -0.5), xlabel="decoder layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def add_scale(drawn: "Figure", axes: "Axes", label: str, top: float) -> None:
    """The scale of `draw_map`'s colours, beside the axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    colors = ScalarMappable(Normalize(0, top), "viridis")
    bar = drawn.colorbar(colors, ax=axes, fraction=0.02, pad=0.01, label=label)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a page of these parts of HTML, atomically.

    Raises:
        HiSVDError: its folder cannot be written.
    """
    make_folder(path.parent)
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escaped(title)}</h1>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(head + "".join(parts) + "</body>\n</html>\n", encoding="utf-8")
    return path
