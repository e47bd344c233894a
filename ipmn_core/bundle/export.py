"""Export an arm's trained networks as a MONAI bundle, with a Hugging Face model card made from their runs.

https://docs.monai.io/en/stable/mb_specification.html. `inference.json` needs only MONAI, not this package.
Its transforms do the same as `data.read_scan` and `data.to_cube`, but in float32 throughout.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData

from ipmn_core import fetch, metrics, predict
from ipmn_core.disk import digest
from ipmn_core.metrics import inference, tables
from ipmn_core.names import CENTERS, display_name
from ipmn_core.params import Params
from ipmn_core.runs import store
from ipmn_core.runs.grid import MACHINE
from ipmn_core.runs.trained import METADATA, PredictError, Trained, find, hashed, load, seal_of

FILES = Path(__file__).parent
KEPT = ("settings", "cohort", "classes", "centers", "versions", "device")  # of a run's record
ROLES = ("train", "validation", "test")


def export(arm_folder: str | Path, target: str | Path, center: str | None = None) -> Path:
    """Write the networks of an arm's folds as a MONAI bundle to the new folder `target`; return it.

    For an arm with one model per center, `center` says whose networks. `models/fold<k>.pt` are plain state
    dicts; a network that MONAI lacks is also written as TorchScript, `.ts`. The folder is written completely
    or not at all. Raises FileExistsError if `target` exists, PredictError as `trained.load` and for folds of
    several arms, PredictionsError for invalid predictions.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} already exists; choose another name, or move it away")
    trained = find(arm_folder)
    record, splits, selected = _read_runs(trained, center)
    of, names = trained[0], dict.fromkeys((trained[0].network, trained[0].arm, trained[0].modality, center))
    title = ", ".join(display_name(name) for name in names if name)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for name in ("configs", "models", "docs"):
            (partial / name).mkdir(parents=True)
        config = inference_config(of, record["folds"])
        (partial / "configs" / "inference.json").write_text(json.dumps(config, indent=2))
        for one in trained:
            network, path = load(one, center), partial / "models" / f"fold{one.fold}.pt"
            torch.save(network.state_dict(), path)
            if not config["network_def"]:
                x = torch.zeros(1, 1, *[of.how.size] * 3)
                torch.jit.trace(network, x, check_trace=False).save(path.with_suffix(".ts"))
        # sorted by hash, because the order of the sheet would reveal the cases
        splits.sort_values(["fold", "case_sha256"]).to_csv(partial / "docs" / "splits.csv", index=False)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        record["sha256"] = {file.relative_to(partial).as_posix(): digest(file) for file in files}
        record["seal"] = seal_of(record)
        (partial / METADATA).write_text(json.dumps(_metadata(record, of, title), indent=2))
        card = _card(record, of, title, splits, selected)
        (partial / "docs" / "README.md").write_text(str(card), encoding="utf-8")
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def inference_config(of: Trained, folds: list[int]) -> dict[str, Any]:
    """The content of `inference.json`: from scan and mask to probabilities of each fold's network and mean.

    Raises PredictError for the name of a class or center that MONAI would run as code.
    """
    config = json.loads((FILES / "inference.json").read_text())
    for name in of.classes + of.centers:
        if name.startswith(("$", "@", "%")):
            raise PredictError(f"MONAI would run the name {name!r} as code: rename it and repeat the runs")
    names = repr(list(of.classes)).replace("@", r"\x40").replace("#", r"\x23")  # MONAI reads these as ids
    known = {"classes": f"${names}", "folds": folds, **asdict(of.how)}
    return config | known | {"network_def": config["network_def"].get(of.network)}


def _read_runs(
    trained: list[Trained], center: str | None
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """The shared record of the runs, the role of each case in each fold, predictions by the kept weights.

    Raises PredictError unless the runs are the folds of one arm.
    """
    records, splits, tested = [], [], []
    for folder, fold in ((one.weights.parent, one.fold) for one in trained):
        if not (folder / "run.json").exists():
            raise PredictError(f"{folder} holds no run; an export needs the folder of an arm's runs")
        record = json.loads((folder / "run.json").read_text())
        protocol = {key: value for key, value in record["settings"].items() if key not in MACHINE}
        tested.append(store.read_predictions(folder, protocol))
        cases = pd.read_csv(folder / "splits.csv", dtype=str, keep_default_na=False)
        splits.append(cases.assign(fold=fold, case_sha256=cases["case_id"].map(hashed)))
        protocol |= {"fold": None, "seed": protocol["seed"][0], "data": record["data"]}  # seed: then the fold
        records.append(record | {"settings": protocol})
        differ = [key for key, value in records[0]["settings"].items() if protocol.get(key) != value]
        if differ:
            pair = f"{trained[0].weights.parent} and {folder}"
            raise PredictError(f"{pair} differ in {differ[0]}: not folds of one arm; repeat one of them")
    shared = {key: records[0].get(key) for key in KEPT} | {"center": center, "ipmn": version("ipmn")}
    shared["folds"] = [one.fold for one in trained]
    selected = metrics.select(metrics.check(pd.concat(tested, ignore_index=True)))
    splits = pd.concat(splits, ignore_index=True)[["fold", "case_sha256", "center", "role"]]
    return shared, *(table[table["center"].eq(center) | (not center)] for table in (splits, selected))


def _metadata(record: dict[str, Any], of: Trained, title: str) -> dict[str, Any]:
    """MONAI's metadata, and under `ipmn` the record that `trained.find` reads."""
    metadata, classes = json.loads((FILES / "metadata.json").read_text()), dict(enumerate(of.classes))
    between = [0, 1] if of.how.intensity == "minmax" else []
    formats = metadata["network_data_format"]
    formats["inputs"]["image"] |= {"modality": of.modality, "spatial_shape": [of.how.size] * 3}
    formats["inputs"]["image"]["value_range"] = between
    for key in ("outputs", "post_processed_outputs"):
        formats[key]["pred"] |= {"num_channels": len(classes), "channel_def": classes}
    return metadata | {
        "version": record["ipmn"],
        "changelog": {record["ipmn"]: "exported from its runs"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel")},
        "name": title,
        "task": f"Classification of a region of interest: {', '.join(of.classes)}",
        "description": f"{title}: one network per fold, their probabilities and the mean.",
        "copyright": _terms(record)[1],
        "intended_use": predict.NOTICE,
        "ipmn": record,
    }


def _card(
    record: dict[str, Any], of: Trained, title: str, splits: pd.DataFrame, selected: pd.DataFrame
) -> ModelCard:
    """The model card, from `model_card.md`."""
    head, terms = _terms(record)
    settings, paper = record["settings"], Params().model_dump(exclude={"threads", "data"})
    paper["folds"] = Params().folds(of.task)
    high = (selected["y_true"] == len(of.classes) - 1).groupby(selected["center"])
    fewest = high.sum().idxmin()
    return ModelCard.from_template(
        ModelCardData(library_name="monai", tags=["monai", "medical", "federated-learning"], **head),
        template_path=str(FILES / "model_card.md"),
        **record | {"title": title, "notice": predict.NOTICE, "terms": terms},
        phantom=record["cohort"] == "phantom",
        cases=_cases(splits),
        departures=[f"`{k}` {settings[k]} (paper: {v})" for k, v in paper.items() if settings.get(k, v) != v],
        results=_results(selected),
        n_folds=len(record["folds"]),
        **{"fewest": fewest, "n_positive": high.sum()[fewest], "n_tested": high.size()[fewest]},
        files=_markdown(pd.DataFrame(record["sha256"].items(), columns=["file", "SHA-256"])),
    )


def _terms(record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The license of the weights, which follows from their data: for the head of the card, and in words."""
    if record["cohort"] == "phantom":
        return {"license": "mit"}, "trained on synthetic data alone, MIT"
    if set(record["centers"]) <= set(CENTERS):
        head = {"license": fetch.LICENSE.lower(), "datasets": [fetch.REPO]}
        return head, f"the centers are those of {fetch.REPO}, whose terms are {fetch.LICENSE}"
    return {"license": "other", "license_name": "owner-terms"}, "the terms of the owner of the data"


def _cases(splits: pd.DataFrame) -> str:
    """The number of cases of each center and fold by role."""
    of_all = pd.concat([splits, splits.assign(center=metrics.GLOBAL)])
    counts = of_all.groupby(["center", "fold"], sort=False)["role"]
    counts = counts.agg(lambda roles: " / ".join(str((roles == role).sum()) for role in ROLES))
    table = counts.unstack(fill_value="0 / 0 / 0").loc[of_all["center"].unique()]
    return _markdown(table.add_prefix("fold ").reset_index())


def _results(selected: pd.DataFrame) -> str:
    """AUC and accuracy with their intervals, by fold and by center."""
    rows = [
        inference.intervals(part).iloc[-1:].assign(center=f"fold {k} (epoch {part['epoch'].iloc[0]})")
        for k, part in selected.groupby("fold")
    ]
    table = pd.concat([*rows, inference.intervals(selected)], ignore_index=True)
    shown = table[["center", "n", "positives"]].rename(columns={"center": "where"})
    for name in ("auc", "acc"):
        numbers = table[[name, f"{name}_low", f"{name}_high"]]
        text = numbers.map(lambda v: tables.UNDEFINED if pd.isna(v) else f"{v:.3f}")
        shown[name] = text[name] + " (" + text[f"{name}_low"] + " to " + text[f"{name}_high"] + ")"
    reasons = table["undefined"].str.replace(r"(; )?DeLong.*", "", regex=True)  # none is shown
    return _markdown(shown.assign(undefined=reasons))


def _markdown(table: pd.DataFrame) -> str:
    return table.astype(str).to_markdown(index=False, disable_numparse=True)  # a center may be called 042
