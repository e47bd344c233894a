"""The report's own tables: results with the paper's, settings, data and versions, effort."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from nbformat import NotebookNode

from ipmn_core import runs
from ipmn_core.metrics import tables
from ipmn_core.names import TASKS, display_name
from ipmn_core.params import Params
from ipmn_core.runs import probes

CAPTIONS = {
    1: "Scans of each center and class",
    2: "All classes: ACC and AUC (macro average) in percent, mean ± standard deviation over folds",
    3: "Positive against the rest: ACC and AUC, mean ± standard deviation over folds",
}
RECORDED = {  # {label: column of `_records`}
    "data (SHA-256 of cubes, cases and labels)": "data",
    "cohort": "cohort",
    "processor": "device",
    "computed on": "settings.device",
    "bfloat16 (autocast)": "settings.bfloat16",
    "python (training)": "versions.python",
    "torch (training)": "versions.torch",
    "monai (training)": "versions.monai",
}
EFFORT = ["settings.task", "settings.arm", "seconds"]
PACKAGES = ("ipmn", "numpy", "pandas", "scipy", "scikit-learn", "nibabel", "matplotlib", "nbconvert")


def results(folder: Path) -> list[tuple[str, str]]:
    """Return caption and HTML of each of tables 1-3 in a profile's folder."""
    written = [n for n in CAPTIONS if (folder / "tables" / f"table{n}.csv").exists()]
    return [(f"Table {n}. {CAPTIONS[n]}", _html(beside(folder, n))) for n in written]


def is_paper(folder: Path) -> bool:
    """Return whether a profile has tables with the paper's numbers."""
    return (folder / "tables" / "table1_beside_paper.csv").exists()


def beside(folder: Path, n: int) -> pd.DataFrame:
    """Return table `n` as text; for the paper's cohort each row of this run is above the paper's."""
    stem = f"table{n}_beside_paper" if is_paper(folder) else f"table{n}"
    exact = {"dtype": dict.fromkeys(tables.KEYS[n], str), "keep_default_na": False, "na_values": "n/a"}
    printed = tables.as_printed(pd.read_csv(folder / "tables" / f"{stem}.csv", **exact))
    printed = printed.set_index(list(printed.columns[: len(tables.KEYS[n]) - 1]))
    if not is_paper(folder):
        return printed
    printed.columns = pd.MultiIndex.from_product([printed.columns[::2], ["this run", "paper"]])
    return printed.stack(future_stack=True)


def about(p: Params, notebooks: Sequence[NotebookNode], hide: Callable[[str], str]) -> list[tuple[str, str]]:
    """Return caption and HTML of the tables of settings, versions and effort."""
    records = _records(p)
    return [
        ("Settings that differ from the default", _html(settings(p).map(hide), index=False)),
        ("Data, machine and versions", _html(versions(notebooks, records), header=False)),
        ("Runs and probes, folds and modalities together", _html(effort(records), index=False)),
    ]


def settings(p: Params) -> pd.DataFrame:
    """Return the settings that differ from the default, with their meaning, as text."""
    default, fields = Params().model_dump(mode="json"), Params.model_fields
    rows = [
        (key, *("null" if v is None else str(v) for v in (value, default[key])), fields[key].description)
        for key, value in p.model_dump(mode="json").items()
        if value != default[key]
    ]
    return pd.DataFrame(rows, columns=["Setting", "Here", "Default", "Meaning"])


def versions(notebooks: Sequence[NotebookNode], records: pd.DataFrame) -> pd.DataFrame:
    """Return data, machine, time and versions of the results, several joined by ";"."""
    facts = {name: records[column].dropna().astype(str).unique() for name, column in RECORDED.items()}
    ended = max(str(notebook.metadata["papermill"]["end_time"]) for notebook in notebooks)
    facts["notebooks executed"] = [f"{ended[:16].replace('T', ' ')} UTC"]
    facts |= {f"{name} (this page)": [version(name)] for name in PACKAGES}
    return pd.Series({name: "; ".join(sorted(values)) for name, values in facts.items()}).to_frame()


def effort(records: pd.DataFrame) -> pd.DataFrame:
    """Return number and seconds of the runs of each task and arm."""
    together = records.groupby(EFFORT[:2], sort=False)["seconds"].agg(["size", "sum"]).reset_index()
    together.columns = ["Task", "Arm", "Runs", "Seconds"]
    return together.assign(Arm=together["Arm"].map(display_name), Seconds=together["Seconds"].astype(int))


def _records(p: Params) -> pd.DataFrame:
    """One row per finished run and probe of the profile, with the fields of its `run.json`."""
    asked = [r for t in TASKS for r in (*runs.grid(p, t), *runs.scored(p, t), *probes.grid(p, t))]
    files = [runs.folder_of(p, run) / "run.json" for run in asked]
    found = pd.json_normalize([json.loads(file.read_text()) for file in files if file.is_file()])
    return found.reindex(columns=[*RECORDED.values(), *EFFORT])


def _html(table: pd.DataFrame, **kwargs) -> str:
    """The table as HTML, names as text; the option keeps pandas from cutting long words."""
    with pd.option_context("display.max_colwidth", None):
        return table.to_html(border=0, index_names=False, **kwargs)
