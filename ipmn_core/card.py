"""Trained models to hand on: an arm's folds, exported with a model card that is read from their runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from ipmn_core import data, metrics, predict, runs
from ipmn_core.metrics import inference, tables
from ipmn_core.names import display_name
from ipmn_core.predict import PredictError, Trained
from ipmn_core.runs import store

ROLES = ("train", "validation", "test")
LIMITS = (
    "No external validation: the test cases come from the hospitals that the models were trained on.",
    "The probabilities are not calibrated, and no threshold was chosen.",
    "The intervals say how much other test cases of the same hospitals would move a number, given these "
    "models and epochs. What another training, the choice of the epoch, another hospital or another scanner "
    "adds is not in them; at an AUC of 0 or 1 DeLong's interval is a point, which is no certainty.",
)
OPTIMISM = (
    "**Each fold's checkpoint is the epoch with the highest AUC on the very cases it is tested on (the "
    "paper's rule), so these figures flatter.** Intervals are 95 %; of three classes `auc` is the macro "
    "average, each against the rest, `positives` and `high_risk_auc` are those of high risk."
)
HANDING_ON = """\
The code is the package `ipmn`: its `LICENSE` and `CITATION.cff` hold terms and authors. Please cite the
paper, *IPMN Risk Assessment under Federated Learning Paradigm*, https://arxiv.org/abs/2411.05697. The terms
of the data set may bind the weights, too: read them before you pass these on.

Beside each `model.pt` lie its `run.json` and, in `splits.csv`, what each case was used for: so a prediction
can tell that a case was trained on. Cases stand there as SHA-256 of their names; whoever guesses a name can
test it. Delete `splits.csv` if that is too much. No image is in these files."""


def export(arm_folder: str | Path, target: str | Path) -> Path:
    """`target`, a new folder: the models of an arm's folds and their card, `README.md`; whole or absent.

    Each `fold<k>/` has `model.pt`, which loads without unpickling code, `run.json`, and `splits.csv` with
    hashed case ids. Raises FileExistsError if there is a target, else as `model_card` and `predict.load`.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already; choose another name, or move it away")
    text = model_card(arm_folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for one in predict.find(arm_folder):
            folder = partial / f"fold{one.fold}"
            folder.mkdir(parents=True)
            for name in ("model.pt", "run.json"):
                shutil.copyfile(one.weights.with_name(name), folder / name)
            splits = _splits(one).assign(case_sha256=lambda s: s["case_id"].map(predict.hashed))
            # sorted by hash, for the order of the sheet would tell which case is which
            splits[["case_sha256", "center", "role"]].sort_values("case_sha256").to_csv(
                folder / "splits.csv", index=False
            )
            _check_weights(predict.find(folder)[0])
        (partial / "README.md").write_text(text)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_weights(one: Trained) -> None:
    """Raises PredictError unless every network in `one` loads."""
    of_centers = one.arm == runs.LOCAL_ONLY
    for center in predict.centers(predict.weights(one.weights)) if of_centers else [None]:
        predict.load(one, center)


def model_card(arm_folder: str | Path) -> str:
    """The model card of an arm, Markdown: data, protocol, results with intervals, limits, versions.

    A pure function of the files in the folds' run folders. Raises PredictError for folds that do not belong
    together or lack a file, PredictionsError for predictions that cannot be right.
    """
    trained = predict.find(arm_folder)
    found = _records(trained)
    settings, tested = found[0]["settings"], _predictions(trained, "test")
    selected = metrics.select(metrics.check(tested, source=str(arm_folder)))
    shown = settings | {"fold": ", ".join(str(one.fold) for one in trained)}
    protocol = [(key, str(value)) for key, value in shown.items()]
    sections = {
        "Data": f"{_data(found[0])}\n\n{_roles(trained)}",
        "Protocol": _markdown(pd.DataFrame(protocol, columns=["setting", "value"])),
        "Results": _results(tested, selected, _predictions(trained, "validation")),
        "Limits": "\n".join(f"- {text}" for text in (*_limits(found, selected), *LIMITS)),
        "Files and versions": f"{_markdown(_files(trained, selected))}\n\n{_markdown(_versions(found))}",
        "Licence and citation": HANDING_ON,
    }
    names = dict.fromkeys(display_name(settings[key]) for key in ("model", "arm", "modality"))
    classes = ", ".join(f"{k} {name}" for k, name in enumerate(predict.CLASSES[settings["task"]]))
    head = (
        f"# {', '.join(names)}\n\n**{predict.NOTICE}**\n\nRisk of pancreatic cysts (IPMN) in MRI: {classes}."
    )
    return "\n\n".join([head, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def _records(trained: list[Trained]) -> list[dict[str, Any]]:
    """What stands in each fold's `run.json`. Raises PredictError unless they are folds of one arm."""
    found, shared = [], []
    for one in trained:
        if one.arm is None:
            raise PredictError(
                f"{one.weights} is of no run; a card needs the folder of an arm, with its folds"
            )
        record = json.loads(one.weights.with_name("run.json").read_text())
        missing = {"data", "versions", "device", "seconds"} - set(record)
        if missing:
            lacks = f"{one.weights.with_name('run.json')} lacks {', '.join(sorted(missing))}"
            raise PredictError(f"{lacks}; restore it, or repeat the run")
        own = ("fold", *store.MACHINE)
        found.append(record)
        shared.append(
            {k: v for k, v in record["settings"].items() if k not in own} | {"data": record["data"]}
        )
        differ = [key for key in {**shared[0], **shared[-1]} if shared[0].get(key) != shared[-1].get(key)]
        if differ:
            pair = f"{trained[0].weights.parent} and {one.weights.parent}"
            raise PredictError(f"{pair} differ in {differ[0]}: no folds of one arm; repeat one of them")
    return found


def _predictions(trained: list[Trained], role: str) -> pd.DataFrame:
    """Predictions of all folds for the cases of a role; empty without an inner validation split."""
    name, frames = {"test": "predictions.parquet", "validation": "validation.parquet"}[role], []
    for folder in (one.weights.parent for one in trained):
        settings = json.loads((folder / "run.json").read_text())["settings"]
        if role == "validation" and not settings["inner_validation"]:
            continue
        if not (folder / name).exists():
            raise PredictError(f"{folder} lacks {name}: give the runs, not an export of them, or repeat them")
        frames.append(store.read_predictions(folder, settings, role))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=metrics.COLUMNS)


def _splits(one: Trained) -> pd.DataFrame:
    return data.from_spreadsheet(pd.read_csv(one.weights.with_name("splits.csv"), dtype=str))


def _data(record: dict[str, Any]) -> str:
    cohort = record.get("cohort")
    said = {None: "Not named by the run.", "phantom": "The phantom cohort: synthetic images and labels."}
    return f"{said.get(cohort, f'`{cohort}`.')} SHA-256 of cubes, cases and labels: `{record['data']}`."


def _roles(trained: list[Trained]) -> str:
    """Cases of each center in each fold by role, as a table."""
    columns = {}
    for one in trained:
        splits = _splits(one)
        counts = pd.crosstab(splits["center"], splits["role"]).reindex(columns=ROLES, fill_value=0)
        counts.loc[metrics.GLOBAL] = counts.sum()
        columns[f"fold {one.fold}"] = counts.astype(str).agg(" / ".join, axis=1)
    table = _markdown(pd.DataFrame(columns).rename_axis("center").reset_index())
    return f"Cases trained on / held out for validation / tested:\n\n{table}"


def _results(tested: pd.DataFrame, selected: pd.DataFrame, validation: pd.DataFrame) -> str:
    """Metrics by fold and center at the exported epoch, then at epochs that the test cases did not choose."""
    parts = [
        OPTIMISM,
        f"By fold, with DeLong's interval of high risk against the rest:\n\n{_by_fold(selected)}",
        "By center, the AUC's mean over folds with bootstrap limits, the accuracy of all test cases with "
        f"Wilson's:\n\n{_by_center(selected)}",
    ]
    split = validation if set(validation["fold"]) == set(tested["fold"]) else None
    if split is not None:
        honest = _by_fold(metrics.select(tested, "best_inner", split))
        parts.append(
            "At the epoch that cases held out of the training choose, which knows nothing of the test cases "
            f"(its weights are not among these files):\n\n{honest}"
        )
    rules = metrics.optimism(tested, split)[["epochs", *metrics.RULES, "undefined"]]
    parts.append(f"AUC, mean over folds, by the rule that chooses the epoch:\n\n{_markdown(rules)}")
    return "\n\n".join(parts)


def _by_fold(selected: pd.DataFrame) -> str:
    table = metrics.by_fold(selected.assign(center=metrics.GLOBAL)).drop_duplicates("fold")
    limits, reasons = [], []
    for fold, undefined in zip(table["fold"], table["undefined"], strict=True):
        y, prob = metrics.y_and_prob(selected[selected["fold"] == fold])
        high = y == prob.shape[1] - 1
        limits.append(_between(*inference.auc_interval(high, prob[:, -1])))
        reasons.append("; ".join(filter(None, (undefined, inference.no_delong(high, 2, "interval")))))
    epochs = table["fold"].map(selected.groupby("fold")["epoch"].first())
    shown = table[["fold", "n", "positives", "acc", "auc"]]
    return _markdown(shown.assign(epoch=epochs, high_risk_auc=limits, undefined=reasons))


def _by_center(selected: pd.DataFrame) -> str:
    table = inference.intervals(selected)
    shown = table[["center", "n", "positives"]].copy()
    for name in ("auc", "acc"):
        shown[name] = [_between(*row) for row in table[[name, f"{name}_low", f"{name}_high"]].to_numpy()]
    return _markdown(shown.assign(undefined=table["undefined"]))


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
        said.append("One model a center, each tested on the cases of its own center alone.")
    high = (selected["y_true"] == len(predict.CLASSES[settings["task"]]) - 1).groupby(selected["center"])
    fewest, cases = high.sum().idxmin(), high.size()
    count = f"{high.sum()[fewest]} high-risk case(s) among {cases[fewest]} tested"
    return [*said, f"Small centers: {fewest} has {count}; one case more or less moves its figures."]


def _files(trained: list[Trained], selected: pd.DataFrame) -> pd.DataFrame:
    epochs, rows = selected.groupby("fold")["epoch"].first(), []
    for one in trained:
        digest = hashlib.sha256(one.weights.read_bytes()).hexdigest()
        rows.append({"file": f"fold{one.fold}/model.pt", "epoch": epochs[one.fold], "SHA-256": digest})
    return pd.DataFrame(rows)


def _versions(found: list[dict[str, Any]]) -> pd.DataFrame:
    """What each fold was trained with, and the version of this package that wrote the card."""
    try:
        own = version("ipmn")
    except PackageNotFoundError:  # run from its source folder
        own = "not installed"
    rows = []
    for record in found:
        machine = {key: record["settings"].get(key) for key in store.MACHINE}
        machine |= {"processor": record["device"], "seconds": str(record["seconds"]), "card by ipmn": own}
        rows.append({"fold": record["settings"]["fold"], **record["versions"], **machine})
    return pd.DataFrame(rows)


def _markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, fractions with three decimals."""
    shown = table.astype(object).map(lambda v: _text(v) if isinstance(v, float) else str(v))
    return shown.to_markdown(index=False, disable_numparse=True)


def _between(value: float, low: float, high: float) -> str:
    return f"{_text(value)} ({_text(low)} to {_text(high)})"


def _text(value: float) -> str:
    return tables.UNDEFINED if pd.isna(value) else f"{value:.3f}"
