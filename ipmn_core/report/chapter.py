"""The cells of an executed notebook as the report shows them, without kernel or network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html import escape, unescape

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from ipmn_core.views import live

SETTINGS = {"parameters", "injected-parameters"}  # tags of cells; the page has a table of settings
PROGRESS = re.compile(r"^.*\d+%\|.*\n?", re.MULTILINE)  # tqdm's


class Words(IPythonRenderer):
    """nbconvert's Markdown renderer with MathML, links within the page and a table of contents.

    `chapters` maps notebook names to addresses. `contents` collects chapters and sections: level (2 or 3),
    id, HTML of the title.
    """

    def __init__(self, chapters: Mapping[str, str]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.chapters = chapters
        self.contents: list[tuple[int, str, str]] = []

    def heading(self, text: str, level: int, **attrs) -> str:
        """A heading one level lower, because the page has its own title."""
        level += 1
        if level > 3:
            return super().heading(text, level)
        n = sum(level == one for one, *_ in self.contents) + 1
        name = f"{'chapter' if level == 2 else 'section'}-{n}"
        self.contents.append((level, name, text))
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A link to a chapter or the web; for other files text and path, because the page travels alone."""
        if url not in self.chapters and not url.startswith(("https://", "http://")):
            return f"{text} ({escape(url.replace('../', ''))})"
        return super().link(text, self.chapters.get(url, url), title)

    def inline_math(self, body: str) -> str:
        """HTML of `$body$`."""
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        """HTML of `$$body$$`."""
        return _mathml(body, "block")


def _mathml(latex: str, display: str) -> str:
    """An equation as MathML in a box that scrolls, or as LaTeX if it cannot be converted."""
    try:
        return f'<span class="{display}">{convert(latex, display=display)}</span>'
    except Exception:  # the package's errors have no common base
        return f"<code>{escape(latex)}</code>"


def cells(notebook: NotebookNode, words: Words, hide: Callable[[str], str]) -> list[NotebookNode]:
    """Return the cells to show: Markdown as HTML, live views as HTML, texts without folders (see `hide`)."""
    shown = [cell for cell in notebook.cells if not SETTINGS & set(cell.metadata.get("tags", []))]
    for cell in shown:
        if cell.cell_type == "markdown":
            cell.source = MarkdownWithMath(words).render(cell.source)
        if cell.cell_type == "code":
            for output in cell.outputs:
                _rewrite(output, hide)
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
            section = unescape(re.sub("<.+?>", "", words.contents[-1][2]))
            cell.metadata["alt"] = f"Figure ({section})"
    return shown


def _rewrite(output: NotebookNode, hide: Callable[[str], str]) -> None:
    if output.output_type == "stream":
        output.text = hide(PROGRESS.sub("", output.text) if output.name == "stderr" else output.text)
    data = output.get("data", {})
    for kind in data:
        if kind.startswith("text/"):
            data[kind] = hide(data[kind])
    if live.MIME in data:
        data["text/html"] = hide(live.as_html(data[live.MIME], data["image/png"]))
