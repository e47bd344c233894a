"""The executed notebooks of a profile as one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import nbformat
import yaml
from nbconvert import HTMLExporter

from ipmn_core.data import read_truth
from ipmn_core.disk import atomic
from ipmn_core.params import Params, project_root
from ipmn_core.report import chapter, facts
from ipmn_core.views import live

HOW = ("outputs", "threads", "jobs", "device", "checkpoint_seconds")  # settings that change no result


def write(p: Params, notebooks: Sequence[Path], target: Path) -> Path:
    """Write the page of the executed `notebooks`, tables and runs of a profile to `target`, and return it.

    The same files give the same bytes. Raises FileNotFoundError for a missing file, ValueError for notebooks
    that were executed with other settings.
    """
    text = page_of(p, notebooks)
    with atomic(target) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return target


def page_of(p: Params, notebooks: Sequence[Path]) -> str:
    """Return the text of the page."""
    _check_settings(p)
    hide = _folder_names(p)
    words = chapter.Words({path.name: f"#chapter-{i}" for i, path in enumerate(notebooks, 1)})
    read = [nbformat.read(path, 4) for path in notebooks]
    cells = [cell for notebook in read for cell in chapter.cells(notebook, words, hide)]
    for n, cell in enumerate(cells):
        cell.id = f"cell-{n}"  # notebooks may share ids
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=_resource("report.html.j2"),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    is_paper = facts.is_paper(p.folder)
    resources = {
        "policy": _policy(live.module()),
        "styles": [_resource("report.css"), live.css()],
        "module": live.module(),
        "profile": p.profile,
        "data": hide(p.data),
        "synthetic": p.data == "phantom" or not read_truth(p).empty,
        "is_paper": is_paper,
        "title": "Risk of pancreatic cysts (IPMN) from MRI" if is_paper else "Classification of scans",
        "contents": words.contents,
        "results": facts.results(p.folder),
        "facts": facts.about(p, read, hide),
    }
    text, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells), resources)
    return text


def _resource(name: str) -> str:
    return (files("ipmn_core.report") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """A content security policy that allows no request and only this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = "base-uri 'none'; form-action 'none'"  # `default-src` does not cover these two
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; {own}"
    )


def _folder_names(p: Params) -> Callable[[str], str]:
    """A function that replaces this machine's folders in a text by their last names, the home by "~".

    Pages are shared, and paths may name people or hospitals. A folder right below the root stays.
    """
    root = project_root()
    places = p.data, p.outputs, root / p.data, root / p.outputs, root, sys.prefix
    paths = [str(path) for path in (*places, *([p.cohort_root.parent] if p.cohort_root.is_file() else []))]
    names = {path: Path(path).name for path in paths} | {os.path.expanduser("~"): "~"}

    def hide(text: str) -> str:
        for path in sorted(names, key=len, reverse=True):
            if len(Path(path).parts) > 2:
                text = text.replace(path, names[path])
        return text

    return hide


def _check_settings(p: Params) -> None:
    """Raise ValueError unless the notebooks were executed with the settings `p`."""
    path = p.folder / "params.yaml"  # `ipmn run` writes it before executing them
    made, wanted = yaml.safe_load(path.read_text(encoding="utf-8")), p.model_dump(mode="json")
    for key in sorted({*wanted, *made} - {*HOW}):
        if made.get(key, "") != wanted.get(key, ""):
            raise ValueError(
                f"{path.parent / 'notebooks'} was executed with other settings ({key}: {made.get(key)!r} "
                f"there, {wanted.get(key)!r} now); `ipmn run` executes the notebooks again"
            )
