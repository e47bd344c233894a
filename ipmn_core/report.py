"""The executed notebooks of a profile as one HTML file that asks the network for nothing."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import bs4
import jinja2
import nbformat
import pandas as pd
import yaml
from markupsafe import Markup
from markupsafe import escape as escape_all
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from ipmn_core import cohort, disk, figures, tables
from ipmn_core.params import Params, project_root

VIEW = "application/vnd.jupyter.widget-view+json"
KINDS = ("text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain")  # best first
PROGRESS = re.compile(r"\d+%\||\d[\d.]* ?\w+ \[\d+:\d+")  # tqdm's, with and without a total
NO_TEXT = r"<(?:script|style)\b.*?</|data:[\w.+-]+/[\w.+-]+[;,][^\"<]*"  # of a page: "/data" may be base64
BEGINS = r"(?:(?<![\w.~</])|(?<=file://)|(?<=\\n))"  # not within a path, an address or a closing tag
REMARKS = {"Try it.": "try-it", "Caveat": "caveat", "How to read it.": "how-to-read"}
HOW = (
    "outputs",
    "threads",
    "jobs",
    "backend",
    "device",
    "checkpoint_seconds",
)  # of the machine, not the result
CAPTIONS = {
    1: "Scans of each center and class.",
    2: "Three classes: ACC and macro AUC in percent, mean ± standard deviation over folds.",
    3: "High risk against the rest: ACC and AUC, mean ± standard deviation over folds.",
}
NUMBER = re.compile(r"([-+−]?\d[\d.]*(e[-+]?\d+)?( ± [\d.]+)?|n/a|nan|)", re.IGNORECASE)  # or none
LONG = 25  # letters of a cell that make it a sentence
PICTURES = {2: "table2", 3: "forest_beside_paper"}  # figures of a profile that show a table
PACKAGES = ("ipmn", "numpy", "pandas", "scipy", "scikit-learn", "nibabel", "matplotlib", "nbconvert")
MEANINGS = {  # of the settings whose comment, where they are set, does not say it, or that have none
    "modalities": "which scans: t1, t2",
    "three_class_folds": "folds of the three-class task",
    "binary_folds": "folds of the binary task",
    "three_class_models": "networks of the three-class task",
    "binary_model": "network of the binary task",
    "arms": "methods of the binary task",
    "batch_size": "cases in a step of training",
    "lr": "learning rate of AdamW",
    "weight_decay": "weight decay of AdamW",
    "lr_gamma": "what the rate is multiplied by every lr_step epochs",
    "seed": "of everything that is drawn by chance",
}


@dataclass(frozen=True)
class Chapter:
    """A notebook as HTML: its `id` and `title`, and those of its `sections`."""

    id: str
    title: str
    body: Markup
    sections: list[tuple[str, str]]


def write(p: Params, notebooks: Sequence[Path], target: Path) -> Path:
    """`target`, now the page of the executed `notebooks` and of the tables and runs of the profile.

    The same files give the same bytes. Raises FileNotFoundError for a missing table, ValueError for notebooks
    that were executed with other settings and for a run's record that is not whole.
    """
    text = page(p, notebooks).encode("utf-8", "replace")  # a name may hold half a character
    return disk.write(target, lambda tmp: tmp.write_bytes(text))


def page(p: Params, notebooks: Sequence[Path]) -> str:
    """The text of that file."""
    read = {path.stem: nbformat.read(path, 4) for path in notebooks}
    for stem, notebook in read.items():
        _check_settings(p, stem, notebook)
    folders = _folders(p, read.values())
    for cell in (cell for notebook in read.values() for cell in notebook.cells):
        cell.source = _without(folders, cell.source)  # before colors cut an escaped name into pieces
    ids = {stem: f"chapter-{i}" for i, stem in enumerate(read, 1)}
    scripts = [text for text in map(_resource, ("report.js", "views.js")) if text]
    runs = _runs(p.folder)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_resource("report.html.j2")).render(
        p=p,
        accents=figures.PALETTE,
        styles=[text for text in map(_resource, ("report.css", "views.css")) if text],
        scripts=scripts,
        policy=_policy(scripts),
        results=[_result(p.folder, n) for n in tables.KEYS],
        chapters=[_chapter(stem, notebook, ids) for stem, notebook in read.items()],
        settings=_settings(next(iter(read.values()))),
        facts=_facts(list(read.values()), runs),
        effort=_effort(runs),
    )
    return _without(folders, text)


def _folders(p: Params, notebooks: Iterable[NotebookNode]) -> dict[str, str]:
    """Last names of the folders of this machine, by each form in which a page or a cell may hold their paths.

    A page is handed on, and a path tells of people and hospitals: /home/alice/clinic/ipmn. The home becomes
    "~", for its last name is a person's. Other folders right below "/" stay: only their name is there.
    """
    given = [p.data, p.outputs, *(str(_parameters(notebook).get("outputs", "")) for notebook in notebooks)]
    paths = [*given, *map(str, map(Path, given)), str(project_root()), sys.prefix]
    names = {path.rstrip("/"): Path(path).name for path in paths if len(Path(path).parts) > 2}
    names[os.path.expanduser("~").rstrip("/")] = "~"  # Path.home() raises where there is none
    forms = (str, lambda text: escape(text, quote=False), lambda text: str(escape_all(text)), _in_python)
    return {f(path): f(name) for f in forms for path, name in names.items() if Path(path).is_absolute()}


def _in_python(text: str) -> str:
    """Text as papermill writes it between quotes."""
    return text.encode("unicode_escape").decode().replace('"', r"\"")


def _without(folders: Mapping[str, str], text: str) -> str:
    """`text` with the last names of `folders` in place of their paths; pictures and scripts as they were."""
    longest_first = sorted(folders, key=len, reverse=True)
    found = rf"{NO_TEXT}|{BEGINS}(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return re.sub(found, lambda match: folders.get(match[0], match[0]), text, flags=re.DOTALL)


def _resource(name: str) -> Markup:
    """A text file of `page/`, empty if there is none."""
    file = files("ipmn_core") / "page" / name
    return Markup(file.read_text(encoding="utf-8") if file.is_file() else "")


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy: no request, and no script but these, whatever an output holds."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def _check_settings(p: Params, stem: str, notebook: NotebookNode) -> None:
    made, wanted = _parameters(notebook), p.model_dump(mode="json")
    for key in sorted({*wanted, *made} - {*HOW}):
        if made.get(key, "") != wanted.get(key, ""):
            raise ValueError(
                f"{p.folder / 'notebooks' / stem}.ipynb was executed with other settings ({key}: "
                f"{made.get(key)!r} there, {wanted.get(key)!r} now); `ipmn run` executes it again"
            )


def _parameters(notebook: NotebookNode) -> dict[str, Any]:
    """What papermill executed a notebook with."""
    return json.loads(json.dumps(notebook.metadata.get("papermill", {}).get("parameters", {})))


# ---- from notebook to HTML


def _chapter(stem: str, notebook: NotebookNode, ids: dict[str, str]) -> Chapter:
    """The notebook `stem` as HTML; `ids` are all chapters' by their notebooks' names, for the links."""
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=_resource("chapter.html.j2"),
        filters={"markdown2html": _markdown},
    )
    text, _ = exporter.from_notebook_node(_to_show(stem, notebook))
    soup = bs4.BeautifulSoup(text, "html.parser")
    headings = _name_headings(soup, ids[stem])
    _mark_remarks(soup)
    _mend_tables(soup)
    _mend_links(soup, ids)
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

    Of two cells of parameters the one that papermill put in stays: the chapter ran with it.
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
    if VIEW in data and kinds in ([], ["text/plain"]):
        if PROGRESS.search(data.get("text/plain", "")):
            return None
        code = (source.strip().splitlines() or ["this cell"])[-1]
        kinds, data = (
            ["text/html"],
            {"text/html": _elsewhere(f"A live view, <code>{escape(code)}</code>", stem)},
        )
    elif data and not kinds:
        named = ", ".join(sorted(data))
        kinds, data = (
            ["text/html"],
            {"text/html": _elsewhere(f"An output (<code>{escape(named)}</code>)", stem)},
        )
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
    """What a cell draws: the first line of the docstring of the function of `figures*` that it calls."""
    for module, name in re.findall(r"\b(figures\w*)\.(\w+)\(", source):
        try:
            called = getattr(importlib.import_module(f"ipmn_core.{module}"), name, None)
        except ImportError:
            continue
        if name not in ("save", "use_style") and getattr(called, "__doc__", None):
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
    """Gives the paragraphs that begin with one of `REMARKS` a class."""
    for paragraph in soup.select(".text p"):
        first = paragraph.find(["em", "strong"])
        if first and paragraph.get_text().startswith(first.get_text()):
            for words, name in REMARKS.items():
                if first.get_text().startswith(words):
                    paragraph["class"] = name


def _mend_tables(soup: bs4.BeautifulSoup) -> None:
    """Puts each table into a box that scrolls, without pandas' styles; says so where it has no rows."""
    for style in soup.select("style"):
        if style.has_attr("scoped") or not style.get_text().strip():
            style.decompose()
    for table in soup.select("table:not(.ipmn-view table)"):
        _mend_cells(table)
        if table.tbody and not table.tbody.find("tr"):
            row = bs4.BeautifulSoup('<tr><td class="words" colspan="99">no rows</td></tr>', "html.parser")
            table.tbody.append(row)
        heading = table.find_previous(["h2", "h3", "h4"])
        label = f"Table ({heading.get_text()})" if heading else "Table"
        box = {"class": "wide", "tabindex": "0", "role": "region", "aria-label": label}
        table.wrap(soup.new_tag("div", attrs=box))


def _mend_cells(table: bs4.Tag) -> None:
    """Says what header cells head and which columns hold words; an empty header is none."""
    for tag in (table, *table.find_all(True)):
        tag.attrs = {key: tag[key] for key in ("rowspan", "colspan", "href") if key in tag.attrs}
    for cell in table.select("th"):
        if cell.get_text().strip():
            cell["scope"] = "col" if cell.find_parent("thead") else "row"
        else:
            cell.name = "td"
    # counted from the right, for a cell that spans rows stands left of the others
    rows = [row.find_all(["th", "td"])[::-1] for row in table.select("tr")]
    for column in zip_longest(*rows):
        cells = [cell for cell in column if cell is not None]
        body = [cell.get_text().strip() for cell in cells if not cell.find_parent("thead")]
        if not all(map(NUMBER.fullmatch, body)):
            for cell in cells:
                cell["class"] = "words long" if max(map(len, body)) > LONG else "words"


def _mend_links(soup: bs4.BeautifulSoup, ids: dict[str, str]) -> None:
    """Links between chapters lead within the page, those to the web stay, others become text."""
    for link in soup.select("a[href]"):
        path = Path(link["href"].partition("#")[0])
        if path.stem in ids and path.suffix == ".ipynb":
            link["href"] = f"#{ids[path.stem]}"
        elif not re.match("https?://", link["href"]):
            link.replace_with(f"{link.get_text()} ({link['href'].replace('../', '')})")


# ---- results, settings, versions


def _result(folder: Path, n: int) -> dict[str, Any]:
    """Table `n` beside the paper's, as printed: `columns`, and rows in `groups` of their first name."""
    path = folder / "tables" / f"table{n}_beside_paper.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `ipmn run` writes it")
    printed = tables.as_printed(cohort.from_spreadsheet(pd.read_csv(path)))
    columns, first, n_names = list(printed), printed.columns[0], len(tables.KEYS[n]) - 1
    groups = printed.groupby(first, sort=False)
    return {
        "n": n,
        "caption": CAPTIONS[n],
        "names": n_names,
        "columns": columns[:n_names] + columns[n_names::2],
        "groups": [(name, [_row(row, n_names) for row in rows.to_numpy()]) for name, rows in groups],
        "picture": _picture(folder / "figures" / f"{PICTURES.get(n)}.png"),
    }


def _row(row: Sequence[str], n_names: int) -> tuple[list[str], list[str], list[str]]:
    """Names after the first, our numbers, and the paper's."""
    return list(row[1:n_names]), list(row[n_names::2]), list(row[n_names + 1 :: 2])


def _picture(path: Path) -> str:
    """The PNG at `path` as an address that needs no request, empty if there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else ""


def _settings(notebook: NotebookNode) -> list[tuple[str, str, str, str]]:
    """Name, value, default and meaning of each setting that `notebook` was executed with."""
    cells = [cell.source for cell in notebook.cells if "parameters" in _tags(cell)]
    said = {**(_comments(cells[0]) if cells else {}), **MEANINGS}
    made, defaults = _parameters(notebook), Params().model_dump(mode="json")
    return [
        (key, _yaml(made.get(key, default)), _yaml(default), said.get(key, "").replace("None", "null"))
        for key, default in defaults.items()
    ]


def _comments(source: str) -> dict[str, str]:
    """The comment at the end of each assignment."""
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: lines[node.end_lineno] for node in assigned if node.end_lineno in lines}


def _yaml(value: Any) -> str:
    """A value as it stands in a profile."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _runs(folder: Path) -> list[dict[str, Any]]:
    """The records (`run.json`) of a profile's runs and probes."""
    found = []
    for path in sorted(folder.glob("runs/*/*/*/fold*/run.json")):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(
                f"{path} is not whole; delete that folder, `ipmn run` repeats the run"
            ) from error
    return found


def _effort(runs: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """Task, arm, number of runs and their seconds together."""
    rows = pd.DataFrame([{**run["settings"], **run} for run in runs], columns=["task", "arm", "seconds"])
    together = rows.groupby(["task", "arm"], sort=False)["seconds"].agg(["size", "sum"])
    return [
        (task.replace("_", "-"), tables.display_name(arm), int(size), f"{seconds:.0f}")
        for (task, arm), (size, seconds) in together.iterrows()
    ]


def _facts(notebooks: list[NotebookNode], runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the results were made of, where, when and with which versions."""
    made = [notebook.metadata.get("papermill", {}) for notebook in notebooks]
    ended = max(str(one.get("end_time") or "") for one in made)
    trained = [run for run in runs if "device" in run["settings"]]
    precision = {True: "bfloat16 (autocast)", False: "float32"}
    facts = {
        "data (SHA-256 of cubes, cases and labels)": {run["data"] for run in runs},
        "cohort": {run["cohort"] for run in runs if run.get("cohort")},
        "processor": {run["device"] for run in trained},
        "computed on, in": {
            f"{run['settings']['device']}, {precision[run['settings']['bfloat16']]}" for run in trained
        },
        "runs and probes": {f"{len(runs)}, {sum(run['seconds'] for run in runs):.0f} seconds together"},
        "notebooks executed": {f"{ended[:16].replace('T', ' ')} UTC"},
        **{
            f"{name} (training)": {run["versions"][name] for run in trained}
            for name in ("python", "torch", "monai")
        },
        **{f"{name} (this page)": {_version(name)} for name in PACKAGES},
    }
    return [(name, "; ".join(sorted(map(str, values))) or "unknown") for name, values in facts.items()]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source folder
        return "not installed"
