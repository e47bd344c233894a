"""An executed notebook as a chapter of the report: HTML that needs no kernel, no network and no eyes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

import bs4
import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from ipmn_core import views
from ipmn_core.views import by_hand

VIEW = "application/vnd.jupyter.widget-view+json"
KINDS = ("text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain")  # best first
PROGRESS = re.compile(r"\d+%\||\d[\d.]* ?\w+ \[\d+:\d+")  # tqdm's, with and without a total
REMARKS = {"Try it.": "try-it", "Caveat": "caveat", "How to read it.": "how-to-read"}
NUMBER = re.compile(r"([-+−]?\d[\d.]*(e[-+]?\d+)?( ± [\d.]+)?|n/a|nan|)", re.IGNORECASE)  # or none
LONG = 25  # letters of a cell that make it a sentence


@dataclass(frozen=True)
class Chapter:
    """A notebook as HTML: its `id` and `title`, and those of its `sections`."""

    id: str
    title: str
    body: Markup
    sections: list[tuple[str, str]]


def chapter(stem: str, notebook: NotebookNode, ids: dict[str, str]) -> Chapter:
    """The notebook `stem` as HTML; `ids` are all chapters' by their notebooks' names, for the links."""
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=(files("ipmn_core.report") / "chapter.html.j2").read_text(encoding="utf-8"),
        filters={"markdown2html": _markdown},
    )
    text, _ = exporter.from_notebook_node(_to_show(stem, notebook))
    soup = bs4.BeautifulSoup(text, "html.parser")
    headings = _name_headings(soup, ids[stem])
    _mark_remarks(soup)
    _fix_tables(soup)
    _fix_links(soup, ids)
    for tag in soup.select("meta, base, link"):  # a refresh is a request that no policy forbids
        tag.decompose()
    for picture in soup.select("img:not([src^='data:'])"):  # it would be a request
        picture.replace_with(picture.get("alt", ""))
    title, *sections = [(h["id"], h.get_text()) for h in headings if h.name in ("h2", "h3")]
    return Chapter(*title, Markup(str(soup)), sections)


class MathML(IPythonRenderer):
    """nbconvert's renderer of Markdown, with equations as MathML, which a browser lays out by itself."""

    def inline_math(self, body: str) -> str:
        """HTML of `$body$`."""
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        """HTML of `$$body$$`."""
        return _mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        r"""HTML of `\begin{name}body\end{name}`."""
        return _mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def _markdown(source: str) -> str:
    return MarkdownWithMath(MathML(escape=False, exclude_anchor_links=True)).render(source)


def _mathml(latex: str, display: str) -> str:
    """An equation as MathML in a box, which scrolls; as its LaTeX where that cannot be converted."""
    from latex2mathml.converter import convert

    try:
        return f'<span class="{display}">{convert(latex, display=display)}</span>'
    except Exception:  # the package's errors have no base of their own
        return f"<code>{escape(latex)}</code>"


def _to_show(stem: str, notebook: NotebookNode) -> NotebookNode:
    """A copy whose outputs need no kernel and no eyes: each in one form, pictures with a text beside them.

    Of two cells of parameters the one that papermill injected stays: the chapter ran with it.
    """
    notebook, heading = nbformat.from_dict(json.loads(json.dumps(notebook))), stem
    given = any("injected-parameters" in _tags(cell) for cell in notebook.cells)
    notebook.cells = [cell for cell in notebook.cells if not (given and "parameters" in _tags(cell))]
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)][-1]
        if cell.cell_type == "code":
            shown = [_shown(output, cell.source, stem) for output in cell.outputs]
            cell.outputs = [output for output in shown if output]
            cell.metadata["alt"] = f"{_drawn(cell.source)} ({heading})"
    return notebook


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _shown(output: NotebookNode, source: str, stem: str) -> NotebookNode | None:
    """An output in the best form that needs no kernel, a sentence where it has none; None for nothing."""
    if output.output_type == "stream":
        output.text = _as_left(output.text, output.name)
        return output if output.text.strip() else None
    data = output.get("data", {})
    kinds = [kind for kind in KINDS if str(data.get(kind, "")).strip()]
    what = ""
    if VIEW in data and kinds in ([], ["text/plain"]):
        if PROGRESS.search(data.get("text/plain", "")):
            return None
        code = (source.strip().splitlines() or ["this cell"])[-1]
        what = f"A live view, <code>{escape(code)}</code>"
    elif data and not kinds:
        what = f"An output (<code>{escape(', '.join(sorted(data)))}</code>)"
    if what:
        kinds, data = ["text/html"], {"text/html": _elsewhere(what, stem)}
    output.data, output.metadata = {kind: data[kind] for kind in kinds[:1]}, {}
    return output if kinds else None


def _elsewhere(what: str, stem: str) -> str:
    return (
        f'<p class="elsewhere">{what}, which this page cannot show: open '
        f"<code>notebooks/{escape(stem)}.ipynb</code> in JupyterLab (<code>make lab</code>) and run it.</p>"
    )


def _as_left(text: str, stream: str) -> str:
    """Text without what was overwritten in its lines; of stderr no line of progress at all."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(line for line in lines if stream == "stdout" or not PROGRESS.search(line))


def _drawn(source: str) -> str:
    """What a cell draws: the first docstring line of the function of `views` that it calls."""
    for module, name in re.findall(r"\b(views|by_hand)\.(\w+)\(", source):
        called = getattr(by_hand if module == "by_hand" else views, name, None)
        if name not in ("save", "use_style", "draw_centers", "compare") and getattr(called, "__doc__", None):
            return called.__doc__.splitlines()[0].rstrip(".").replace("`", "")
    return "Figure"


# ---- from HTML to a page of chapters


def _name_headings(soup: bs4.BeautifulSoup, chapter: str) -> list[bs4.Tag]:
    """The headings of the text, one level lower, with ids of this chapter; the first is `chapter`."""
    headings, taken = soup.select(", ".join(f".text h{n}" for n in range(1, 6))), set()
    for heading in headings:
        slug = f"{chapter}-{_slug(heading.get_text())}" if taken else chapter
        names = [slug, *(f"{slug}-{n}" for n in range(2, len(headings) + 2))]
        heading["id"] = next(name for name in names if name not in taken)
        heading.name = f"h{int(heading.name[1]) + 1}"
        taken.add(heading["id"])
    return headings


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-") or "section"


def _mark_remarks(soup: bs4.BeautifulSoup) -> None:
    """Give the paragraphs that begin with one of `REMARKS` a class."""
    for paragraph in soup.select(".text p"):
        first = paragraph.find(["em", "strong"])
        if first and paragraph.get_text().startswith(first.get_text()):
            for words, name in REMARKS.items():
                if first.get_text().startswith(words):
                    paragraph["class"] = name


def _fix_tables(soup: bs4.BeautifulSoup) -> None:
    """Put each table into a box that scrolls, without pandas' styles; say so where it has no rows."""
    for style in soup.select("style"):
        if style.has_attr("scoped") or not style.get_text().strip():
            style.decompose()
    for table in soup.select("table:not(.ipmn-view table)"):
        _fix_cells(table)
        if table.tbody and not table.tbody.find("tr"):
            row = bs4.BeautifulSoup('<tr><td class="words" colspan="99">no rows</td></tr>', "html.parser")
            table.tbody.append(row)
        heading = table.find_previous(["h2", "h3", "h4"])
        label = f"Table ({heading.get_text()})" if heading else "Table"
        box = {"class": "wide", "tabindex": "0", "role": "region", "aria-label": label}
        table.wrap(soup.new_tag("div", attrs=box))


def _fix_cells(table: bs4.Tag) -> None:
    """Mark what header cells head and which columns hold words; an empty header is none."""
    for tag in (table, *table.find_all(True)):
        tag.attrs = {key: tag[key] for key in ("rowspan", "colspan", "href") if key in tag.attrs}
    for cell in table.select("th"):
        if cell.get_text().strip():
            cell["scope"] = "col" if cell.find_parent("thead") else "row"
        else:
            cell.name = "td"
    # counted from the right, for a cell that spans rows is left of the others
    rows = [row.find_all(["th", "td"])[::-1] for row in table.select("tr")]
    for column in zip_longest(*rows):
        cells = [cell for cell in column if cell is not None]
        body = [cell.get_text().strip() for cell in cells if not cell.find_parent("thead")]
        if not all(map(NUMBER.fullmatch, body)):
            for cell in cells:
                cell["class"] = "words long" if max(map(len, body)) > LONG else "words"


def _fix_links(soup: bs4.BeautifulSoup, ids: dict[str, str]) -> None:
    """Lead links between chapters within the page, keep those to the web, turn others into text."""
    for link in soup.select("a[href]"):
        path = Path(link["href"].partition("#")[0])
        if path.stem in ids and path.suffix == ".ipynb":
            link["href"] = f"#{ids[path.stem]}"
        elif not re.match("https?://", link["href"]):
            link.replace_with(f"{link.get_text()} ({link['href'].replace('../', '')})")
