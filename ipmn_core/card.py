"""Export trained models: an arm's folds with a model card that is read from their runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ipmn_core import metrics, predict, runs
from ipmn_core.metrics import inference, tables
from ipmn_core.names import display_name
from ipmn_core.runs import store
from ipmn_core.runs.grid import MACHINE
from ipmn_core.runs.trained import PredictError, Trained, find, hashed, load

ROLES = ("train", "validation", "test")
LIMITS = (
    "No external validation: the test cases come from the hospitals that the models were trained on.",
    "The probabilities are not calibrated, and no threshold was chosen.",
    "The intervals cover other test cases of the same hospitals, given these models and epochs. They do not "
    "cover another training, the choice of the epoch, another hospital or another scanner; at an AUC of 0 or "
    "1 DeLong's interval is a point, which does not mean certainty.",
)
OPTIMISM = (
    "**Each fold's checkpoint is the epoch with the highest AUC on the very cases it is tested on (the "
    "paper's rule), so these figures are optimistic.** Intervals are 95 %; of three classes or more `auc` is "
    "the macro average, one against the rest, `positives` and `positive_auc` are those of the last class."
)
LICENSE = """\
The code is the package `ipmn`: its `LICENSE` and `CITATION.cff` hold terms and authors. Please cite the
paper, *IPMN Risk Assessment under Federated Learning Paradigm*, https://arxiv.org/abs/2411.05697. The terms
of the data set may bind the weights, too: read them before you share these files.

Beside each `model.pt` are its `run.json` and, in `splits.csv`, the role of each case, so that a prediction
can tell that a case was trained on. Cases are SHA-256 hashes of their names; anyone who guesses a name can
test it. Delete `splits.csv` if that is too much. No image is in these files."""


def export(arm_folder: str | Path, target: str | Path) -> Path:
    """Write the models of an arm's folds and their card, `README.md`, to the new folder `target`; return it.

    Each `fold<k>/` has `model.pt`, which loads without unpickling code, `run.json`, and `splits.csv` with
    hashed case ids. The folder is complete or absent. Raises FileExistsError if there is a target, else as
    `model_card` and `trained.load`.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} already exists; choose another name, or move it away")
    text = model_card(arm_folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for one in find(arm_folder):
            folder = partial / f"fold{one.fold}"
            folder.mkdir(parents=True)
            for name in ("model.pt", "run.json"):
                shutil.copyfile(one.weights.with_name(name), folder / name)
            splits = _splits(one).assign(case_sha256=lambda s: s["case_id"].map(hashed))
            # sorted by hash, because the order of the sheet would tell which case is which
            rows = splits[["case_sha256", "center", "role"]].sort_values("case_sha256")
            rows.to_csv(folder / "splits.csv", index=False)
            (copied,) = find(folder)
            of_centers = one.arm == runs.LOCAL_ONLY
            for center in copied.centers if of_centers else [None]:
                load(copied, center)
        (partial / "README.md").write_text(text)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def model_card(arm_folder: str | Path) -> str:
    """The model card of an arm, Markdown: data, protocol, results with intervals, limits, versions.

    A pure function of the files in the folds' run folders. Raises PredictError for folds that do not belong
    together or lack a file, PredictionsError for predictions that cannot be right.
    """
    trained = find(arm_folder)
    found = _records(trained)
    settings = found[0]["settings"]
    selected = metrics.select(metrics.check(_predictions(trained), source=str(arm_folder)))
    shown = settings | {"fold": ", ".join(str(one.fold) for one in trained)}
    protocol = pd.DataFrame([(key, str(value)) for key, value in shown.items()], columns=["setting", "value"])
    sections = {
        "Data": _data(found[0], trained),
        "Protocol": _markdown(protocol),
        "Results": f"{OPTIMISM}\n\n{_by_fold(selected)}\n\n{_by_center(selected)}",
        "Limits": "\n".join(f"- {text}" for text in (*_limits(found, selected), *LIMITS)),
        "Files and versions": _markdown(_files(trained, found, selected)),
        "License and citation": LICENSE,
    }
    names = dict.fromkeys(display_name(settings[key]) for key in ("model", "arm", "modality"))
    classes = ", ".join(f"{k} {name}" for k, name in enumerate(found[0]["classes"]))
    head = f"# {', '.join(names)}\n\n**{predict.NOTICE}**\n\n"
    head += f"Classes: {classes}."
    return "\n\n".join([head, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def _records(trained: list[Trained]) -> list[dict[str, Any]]:
    """The content of each fold's `run.json`. Raises PredictError unless they are folds of one arm."""
    found, shared = [], []
    for one in trained:
        if one.arm is None:
            raise PredictError(f"{one.weights} is not of a run; a card needs the folder of an arm")
        record = json.loads(one.weights.with_name("run.json").read_text())
        missing = {"data", "versions", "device", "seconds"} - set(record)
        if missing:
            lacks = f"{one.weights.with_name('run.json')} lacks {', '.join(sorted(missing))}"
            raise PredictError(f"{lacks}; restore it, or repeat the run")
        own = ("fold", "seed", *MACHINE)  # the seed is that of the profile, then the fold
        found.append(record)
        settings = {key: value for key, value in record["settings"].items() if key not in own}
        shared.append(settings | {"seed": record["settings"]["seed"][0], "data": record["data"]})
        differ = [key for key in {**shared[0], **shared[-1]} if shared[0].get(key) != shared[-1].get(key)]
        if differ:
            pair = f"{trained[0].weights.parent} and {one.weights.parent}"
            raise PredictError(f"{pair} differ in {differ[0]}: not folds of one arm; repeat one of them")
    return found


def _predictions(trained: list[Trained]) -> pd.DataFrame:
    """Predictions of all folds for their test cases."""
    frames = []
    for folder in (one.weights.parent for one in trained):
        if not (folder / "predictions.parquet").exists():
            lacks = f"{folder} lacks predictions.parquet"
            raise PredictError(f"{lacks}: give the runs, not an export of them, or repeat them")
        settings = json.loads((folder / "run.json").read_text())["settings"]
        protocol = {key: value for key, value in settings.items() if key not in MACHINE}
        frames.append(store.read_predictions(folder, protocol))
    return pd.concat(frames, ignore_index=True)


def _splits(one: Trained) -> pd.DataFrame:
    return pd.read_csv(one.weights.with_name("splits.csv"), dtype=str, keep_default_na=False)


def _data(record: dict[str, Any], trained: list[Trained]) -> str:
    """The cohort, and the cases of each center in each fold by role."""
    columns, cohort = {}, record.get("cohort")
    for one in trained:
        splits = _splits(one)
        counts = pd.crosstab(splits["center"], splits["role"]).reindex(columns=ROLES, fill_value=0)
        counts.loc[metrics.GLOBAL] = counts.sum()
        columns[f"fold {one.fold}"] = counts.astype(str).agg(" / ".join, axis=1)
    table = _markdown(pd.DataFrame(columns).rename_axis("center").reset_index())
    said = {None: "Not named by the run.", "phantom": "The phantom cohort: synthetic images and labels."}
    said = f"{said.get(cohort, f'`{cohort}`.')} SHA-256 of cubes, cases and labels: `{record['data']}`."
    return f"{said}\n\nCases trained on / held out for validation / tested:\n\n{table}"


def _by_fold(selected: pd.DataFrame) -> str:
    table = metrics.by_fold(selected.assign(center=metrics.GLOBAL)).drop_duplicates("fold")
    limits, reasons = [], []
    for fold, undefined in zip(table["fold"], table["undefined"], strict=True):
        y, prob = metrics.y_and_prob(selected[selected["fold"] == fold])
        high = y == prob.shape[1] - 1
        limits.append(_between(*inference.auc_interval(high, prob[:, -1])))
        reasons.append("; ".join(filter(None, (undefined, inference.no_delong(high, 2)))))
    epochs = table["fold"].map(selected.groupby("fold")["epoch"].first())
    shown = table[["fold", "n", "positives", "acc", "auc"]]
    shown = _markdown(shown.assign(epoch=epochs, positive_auc=limits, undefined=reasons))
    return f"By fold, with DeLong's interval of the last class against the rest:\n\n{shown}"


def _by_center(selected: pd.DataFrame) -> str:
    table = inference.intervals(selected)
    shown = table[["center", "n", "positives"]].copy()
    for name in ("auc", "acc"):
        shown[name] = [_between(*row) for row in table[[name, f"{name}_low", f"{name}_high"]].to_numpy()]
    shown = _markdown(shown.assign(undefined=table["undefined"]))
    return f"By center: mean AUC over folds (bootstrap), accuracy of all test cases (Wilson):\n\n{shown}"


def _limits(found: list[dict[str, Any]], selected: pd.DataFrame) -> list[str]:
    """Limits of these runs, beside those of all."""
    settings, cohort, said = found[0]["settings"], found[0].get("cohort"), []
    if cohort == "phantom":
        said.append("Trained and tested on synthetic images: nothing here says anything about patients.")
    if cohort is None:
        said.append("The run does not say whether its images are patients' or synthetic.")
    if len(found) < settings["folds"]:
        said.append(f"{len(found)} of {settings['folds']} folds are here: not every case was tested.")
    if settings["arm"] == runs.LOCAL_ONLY:
        said.append("One model per center, each tested on the cases of its own center only.")
    high = (selected["y_true"] == len(found[0]["classes"]) - 1).groupby(selected["center"])
    fewest, cases = high.sum().idxmin(), high.size()
    count = f"{high.sum()[fewest]} positive case(s) among {cases[fewest]} tested"
    return [*said, f"Small centers: {fewest} has {count}; one case more or less moves its figures."]


def _files(trained: list[Trained], found: list[dict[str, Any]], selected: pd.DataFrame) -> pd.DataFrame:
    """Each fold's epoch, hash and what it was trained with; the version of this package."""
    epochs, rows = selected.groupby("fold")["epoch"].first(), []
    for one, record in zip(trained, found, strict=True):
        row = {"file": f"fold{one.fold}/model.pt", "epoch": epochs[one.fold]}
        row["SHA-256"] = hashlib.sha256(one.weights.read_bytes()).hexdigest()
        machine = {key: record["settings"].get(key) for key in MACHINE}
        machine |= {"processor": record["device"], "seconds": str(record["seconds"])}
        rows.append({**row, **record["versions"], **machine, "card by ipmn": version("ipmn")})
    return pd.DataFrame(rows)


def _markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, fractions with three decimals."""
    shown = table.astype(object).map(lambda v: _text(v) if isinstance(v, float) else str(v))
    return shown.to_markdown(index=False, disable_numparse=True)


def _between(value: float, low: float, high: float) -> str:
    return f"{_text(value)} ({_text(low)} to {_text(high)})"


def _text(value: float) -> str:
    return tables.UNDEFINED if pd.isna(value) else f"{value:.3f}"
