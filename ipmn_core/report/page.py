"""The executed notebooks of a profile as one HTML file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import jinja2
import nbformat
from markupsafe import Markup
from markupsafe import escape as escape_all
from nbformat import NotebookNode

from ipmn_core.disk import atomic
from ipmn_core.metrics import tables
from ipmn_core.params import Params, project_root
from ipmn_core.report import chapter, facts
from ipmn_core.views.style import PALETTE

NO_TEXT = r"<(?:script|style)\b.*?</|data:[\w.+-]+/[\w.+-]+[;,][^\"<]*"  # of a page: "/data" may be base64
BEGINS = r"(?:(?<![\w.~</])|(?<=file://)|(?<=\\n))"  # not within a path, an address or a closing tag
HOW = ("outputs", "threads", "jobs", "device", "checkpoint_seconds")  # not of the result


def write(p: Params, notebooks: Sequence[Path], target: Path) -> Path:
    """Write the page of the executed `notebooks`, tables and runs of a profile to `target`, and return it.

    The same files give the same bytes. Raises FileNotFoundError for a missing table, ValueError for notebooks
    that were executed with other settings and for a damaged record of a run.
    """
    text = page_of(p, notebooks).encode("utf-8", "replace")  # a name may hold half a character
    with atomic(target) as tmp:
        tmp.write_bytes(text)
    return target


def page_of(p: Params, notebooks: Sequence[Path]) -> str:
    """The text of the page."""
    read = {path.stem: nbformat.read(path, 4) for path in notebooks}
    for stem, notebook in read.items():
        _check_settings(p, stem, notebook)
    folders = _folders(p, read.values())
    for cell in (cell for notebook in read.values() for cell in notebook.cells):
        cell.source = _without(folders, cell.source)  # before colors cut an escaped name into pieces
    ids = {stem: f"chapter-{i}" for i, stem in enumerate(read, 1)}
    scripts = [_resource("report", "report.js"), _resource("views", "views.js")]
    records = facts.read_records(p)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_resource("report", "report.html.j2")).render(
        p=p,
        accents=PALETTE,
        styles=[_resource("report", "report.css"), _resource("views", "views.css")],
        scripts=scripts,
        policy=_policy(scripts),
        results=[facts.result(p.folder, n) for n in tables.KEYS],
        chapters=[chapter.chapter(stem, notebook, ids) for stem, notebook in read.items()],
        settings=facts.settings(next(iter(read.values()))),
        facts=facts.facts(list(read.values()), records),
        effort=facts.effort(records),
    )
    return _without(folders, text)


def _folders(p: Params, notebooks: Iterable[NotebookNode]) -> dict[str, str]:
    """Last names of this machine's folders, by each form in which a page or a cell may hold their paths.

    A page is passed on, and a path tells of people and hospitals: /home/alice/clinic/ipmn. The home becomes
    "~", for its last name is a person's. Other folders right below "/" stay: only their name is there.
    """
    given = [p.data, p.outputs, *(str(facts.parameters(one).get("outputs", "")) for one in notebooks)]
    beside = [str(project_root() / one) for one in given if ".." in one]
    paths = [*given, *map(str, map(Path, given)), *beside, str(project_root()), sys.prefix]
    names = {path.rstrip("/"): Path(path).name for path in paths if len(Path(path).parts) > 2}
    names[os.path.expanduser("~").rstrip("/")] = "~"  # Path.home() raises where there is none
    forms = (str, lambda text: escape(text, quote=False), lambda text: str(escape_all(text)), _in_python)
    telling = {path: name for path, name in names.items() if Path(path).is_absolute() or ".." in path}
    return {f(path): f(name) for f in forms for path, name in telling.items()}


def _in_python(text: str) -> str:
    """Text as papermill writes it between quotes."""
    return text.encode("unicode_escape").decode().replace('"', r"\"")


def _without(folders: Mapping[str, str], text: str) -> str:
    """`text` with the last names of `folders` in place of their paths; pictures and scripts as they were."""
    longest_first = sorted(folders, key=len, reverse=True)
    found = rf"{NO_TEXT}|{BEGINS}(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return re.sub(found, lambda match: folders.get(match[0], match[0]), text, flags=re.DOTALL)


def _resource(room: str, name: str) -> Markup:
    """A text file of a room of the package."""
    return Markup((files(f"ipmn_core.{room}") / name).read_text(encoding="utf-8"))


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy: no request, and no script but these, whatever an output holds."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    own = "base-uri 'none'; form-action 'none'"  # these two do not fall back on `default-src`
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; {own}"


def _check_settings(p: Params, stem: str, notebook: NotebookNode) -> None:
    made, wanted = facts.parameters(notebook), p.model_dump(mode="json")
    for key in sorted({*wanted, *made} - {*HOW}):
        if made.get(key, "") != wanted.get(key, ""):
            raise ValueError(
                f"{p.folder / 'notebooks' / stem}.ipynb was executed with other settings ({key}: "
                f"{made.get(key)!r} there, {wanted.get(key)!r} now); `ipmn run` executes it again"
            )
