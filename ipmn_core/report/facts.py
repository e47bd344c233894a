"""The report's parts around its chapters: tables beside the paper's, settings, effort, versions."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from nbformat import NotebookNode

from ipmn_core import runs
from ipmn_core.metrics import tables
from ipmn_core.names import TASKS, display_name
from ipmn_core.params import Params
from ipmn_core.runs import probes

CAPTIONS = {
    1: "Scans of each center and class.",
    2: "Three classes: ACC and macro AUC in percent, mean ± standard deviation over folds.",
    3: "High risk against the rest: ACC and AUC, mean ± standard deviation over folds.",
}
PICTURES = {2: "table2", 3: "forest_beside_paper"}  # figures of a profile that show a table
PACKAGES = ("ipmn", "numpy", "pandas", "scipy", "scikit-learn", "nibabel", "matplotlib", "nbconvert")


def parameters(notebook: NotebookNode) -> dict[str, Any]:
    """The settings that papermill executed a notebook with, those in the file of its `profile` included."""
    given = dict(notebook.metadata.get("papermill", {}).get("parameters", {}))
    path = Path(str(given.get("profile", "")))
    if path.suffix == ".yaml" and path.is_file():  # as `ipmn run` writes it
        given = {**given, **yaml.safe_load(path.read_text(encoding="utf-8"))}
    return json.loads(json.dumps(given))


def result(folder: Path, n: int) -> dict[str, Any]:
    """Table `n` beside the paper's, as printed: `columns`, and rows in `groups` of their first name."""
    path = folder / "tables" / f"table{n}_beside_paper.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `ipmn run` writes it")
    printed = tables.as_printed(pd.read_csv(path))
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


def settings(notebook: NotebookNode) -> list[tuple[str, str, str, str]]:
    """Name, value, default and meaning of each setting that `notebook` was executed with."""
    made, defaults, fields = parameters(notebook), Params().model_dump(mode="json"), Params.model_fields
    return [
        (key, _yaml(made.get(key, default)), _yaml(default), fields[key].description)
        for key, default in defaults.items()
    ]


def _yaml(value: Any) -> str:
    """A value as written in a profile."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def read_records(p: Params) -> list[dict[str, Any]]:
    """The records (`run.json`) of those runs and probes of the profile that are finished.

    Raises ValueError for a damaged one.
    """
    asked = [run for task in TASKS for run in (*runs.grid(p, task), *probes.grid(p, task))]
    found = []
    for path in sorted(runs.folder_of(p, run) / "run.json" for run in asked):
        if not path.is_file():
            continue
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is damaged; delete that folder, `ipmn run` repeats the run") from error
    return found


def effort(records: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """Task, arm, number of runs and their seconds together."""
    rows = pd.DataFrame([{**run["settings"], **run} for run in records], columns=["task", "arm", "seconds"])
    together = rows.groupby(["task", "arm"], sort=False)["seconds"].agg(["size", "sum"])
    return [
        (task.replace("_", "-"), display_name(arm), int(size), f"{seconds:.0f}")
        for (task, arm), (size, seconds) in together.iterrows()
    ]


def facts(notebooks: list[NotebookNode], records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Data, machine, time and versions of the results."""
    made = [notebook.metadata.get("papermill", {}) for notebook in notebooks]
    ended = max(str(one.get("end_time") or "") for one in made)
    trained = [run for run in records if "device" in run["settings"]]
    precision = {True: "bfloat16 (autocast)", False: "float32"}
    facts = {
        "data (SHA-256 of cubes, cases and labels)": {run["data"] for run in records},
        "cohort": {run["cohort"] for run in records if run.get("cohort")},
        "processor": {run["device"] for run in trained},
        "computed on, in": {
            f"{run['settings']['device']}, {precision[run['settings']['bfloat16']]}" for run in trained
        },
        "runs and probes": {f"{len(records)}, {sum(run['seconds'] for run in records):.0f} seconds together"},
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
