"""What a hospital does on its own machine: its cases, its local updates, its own files. Knows no network.

`<outputs>/<token of the run>/` holds, each file whole or absent: `learner_<round>.pt`, its AdamW and
schedule after a round, `predictions.parquet`, by case, and `sent.csv`, what left it and when.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ipmn_core import data, disk, federated, metrics, runs
from ipmn_core.federated import State, Update, machine, privacy, training
from ipmn_core.names import CENTERS
from ipmn_core.params import Params
from ipmn_core.runs import records

SHARES = ("scores", "metrics")  # of its test cases: labels and probabilities without ids, or ACC and AUC only


class SiteError(RuntimeError):
    """A site cannot take part; the message is for its own people, with remedy."""


@dataclass(frozen=True)
class Site:
    """One hospital in one run. Its folders of data and of work are its own setting, not the server's.

    `center` is its name among `cohort.CENTERS`, `p` the profile with the site's own folders in place.
    """

    center: str
    p: Params
    run: runs.Run
    token: str
    share: str

    @cached_property
    def folder(self) -> Path:
        """The site's own work folder of this run."""
        folder = Path(self.p.outputs) / self.token
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run's settings, the machine's part as this machine decides."""
        return runs.settings_of(self.p, self.run)

    @cached_property
    def _loaded(self) -> tuple[pd.DataFrame, np.ndarray, str]:
        scans = data.subset(data.open_cohort(self.p), self.p.max_per_cell)
        others = sorted(set(scans["center"]) - {self.center})
        if others:
            raise SiteError(
                f"{self.p.data} holds scans of {', '.join(others)}, this is {self.center}: name its folder"
            )
        cubes = data.load_cubes(scans, self.p.size, Path(self.p.outputs) / "cache", self.p.jobs)
        folds = data.assign_folds(
            scans, self.p.folds(self.run.task), self.p.fold_rule, self.run.task == "binary"
        )
        mine = (scans["modality"] == self.run.modality).to_numpy()
        rows = runs.with_roles(scans[mine], folds[mine] == self.run.fold, self.p, self.run)
        return rows, cubes.array[mine], records.data_key(scans, cubes)

    @property
    def rows(self) -> pd.DataFrame:
        """The cases of the run's modality, each with its `role`, train or test."""
        return self._loaded[0]

    @cached_property
    def cases(self) -> training.Cases:
        """Cubes and targets of `rows`."""
        return runs.cases_of(self.rows, self._loaded[1], self.run.task, machine.device_of(self.p))

    @cached_property
    def secret(self) -> bytes:
        """A number no one else knows, kept for the run: it orders the test cases, and draws the noise."""
        path = self.folder / "secret"
        if not path.exists():
            disk.write(path, lambda tmp: tmp.write_bytes(secrets.token_bytes(16)))
        return path.read_bytes()

    @cached_property
    def tested(self) -> pd.DataFrame:
        """The test cases in the order in which anything of them leaves: one that only this site knows."""
        rows = self.rows[self.rows["role"] == "test"]
        rng = np.random.default_rng(list(self.secret))
        return rows.iloc[rng.permutation(len(rows))]

    def _model(self) -> torch.nn.Module:
        device, steps = machine.device_of(self.p), runs.steps_of(self.settings)
        return runs.placed(runs.build_of(self.settings), device, steps)


def open_site(node: dict[str, Any], order: dict[str, Any]) -> Site:
    """The site of a node's own configuration (`site, data, outputs, share`) in the run that `order` names.

    Raises SiteError for a configuration that cannot be, or for folders that are not the site's own.
    """
    missing = [key for key in ("site", "data", "outputs") if not node.get(key)]
    if missing or node.get("share", "scores") not in SHARES or node["site"] not in CENTERS:
        raise SiteError(
            f"the node's configuration {node} must name site (one of {', '.join(CENTERS)}), data, "
            f"outputs and perhaps share ({' or '.join(SHARES)})"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}", order["token"]):
        raise SiteError("the server's run token is no plain name")
    own = {"data": str(Path(node["data"]).resolve()), "outputs": str(Path(node["outputs"]).resolve())}
    p = Params.model_validate_json(order["profile"]).model_copy(update=own)
    machine.prepare(p.threads)
    return Site(node["site"], p, runs.Run(**order["run"]), order["token"], node.get("share", "scores"))


def introduce(site: Site) -> dict[str, Any]:
    """What the server needs to know first: counts, a fingerprint keyed by the run, with "scores" labels."""
    n_train = int((site.rows["role"] == "train").sum())
    key = hmac.new(site.token.encode(), site._loaded[2].encode(), hashlib.sha256).hexdigest()
    hello = {"center": site.center, "n_train": n_train, "n_test": len(site.tested), "data": key}
    if site.share == "scores":
        hello["y_true"] = runs.targets(site.tested["label"].to_numpy(), site.run.task).tolist()
    return hello


def train(site: Site, w_global: State, round_: int, k: int, since: int, fresh: bool) -> Update:
    """The site's local update of round `round_`, as client `k`, from its state after round `since` (0: none).

    With `fresh` it begins with new AdamW moments, as after an update that was refused. The state it ends with
    is on disk before it returns, that of `since` stays: a round asked for again ends with the same bits.
    Raises SiteError if the state of `since` is not there.
    """
    model, steps = site._model(), runs.steps_of(site.settings)
    train = runs.indices(site.rows[site.rows["role"] == "train"])[site.center]
    learner = training.Learner(site.center, model, train, steps)
    if since:
        path = site.folder / f"learner_{since}.pt"
        if not path.exists():
            raise SiteError(f"{path}, its state after round {since}, is gone: start the run afresh")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        learner.optimizer.load_state_dict(saved["optimizer"])
        learner.schedule.load_state_dict(saved["schedule"])
    if fresh:
        learner = federated.afresh(site.center, model, learner, steps)
    strategy = runs.strategy_of(site.settings)
    w_global = {key: value.to(machine.device_of(site.p)) for key, value in w_global.items()}
    seed = [*steps.seed, round_, k]
    loss = federated.local_update(model, w_global, learner, site.cases, steps, strategy, seed)
    noise = _noise_seed(site, w_global, round_, since) if strategy.noise_multiplier else seed
    state = privacy.protected(model.state_dict(), w_global, strategy, noise)
    kept = {"optimizer": learner.optimizer.state_dict(), "schedule": learner.schedule.state_dict()}
    disk.write(site.folder / f"learner_{round_}.pt", lambda tmp: torch.save(kept, tmp))
    for path in site.folder.glob("learner_*.pt"):
        if int(path.stem.split("_")[1]) not in (since, round_):
            path.unlink()
    return Update(site.center, len(train), loss, {key: value.cpu() for key, value in state.items()})


def _noise_seed(site: Site, w_global: State, round_: int, since: int) -> list[int]:
    """A seed that no one else knows, the same only for the same question: else two answers' difference would
    hold no noise.
    """
    asked = hashlib.sha256(site.secret + f"{round_} {since}".encode())
    for value in w_global.values():
        asked.update(value.cpu().numpy().tobytes())
    return list(asked.digest())


def evaluate(site: Site, w_global: State, round_: int) -> dict[str, Any]:
    """What the site tells of the global model of a round on its test fold; by case only to its own disk."""
    model = site._model()
    model.load_state_dict(w_global)
    test = torch.tensor(site.rows.index[site.rows["role"] == "test"].to_numpy())
    prob = training.evaluate(model, test, site.cases, runs.steps_of(site.settings))
    rows = site.rows.loc[test.tolist()]
    _keep_predictions(site, runs.frame_of(round_, prob, site.run, site.p.seed, rows).drop(columns="role"))
    if site.share == "scores":
        prob = pd.DataFrame(prob, index=rows.index).loc[site.tested.index].to_numpy()
        return {"prob": prob.ravel().tolist()}
    y = runs.targets(rows["label"].to_numpy(), site.run.task)
    return {"n": len(y), "acc": metrics.accuracy(y, prob), "auc": metrics.auc(y, prob)}


def _keep_predictions(site: Site, frame: pd.DataFrame) -> None:
    path = site.folder / "predictions.parquet"
    if path.exists():
        earlier = pd.read_parquet(path)
        frame = pd.concat([earlier[~earlier["epoch"].isin(frame["epoch"])], frame], ignore_index=True)
    disk.write(path, lambda tmp: frame.to_parquet(tmp, index=False))


def note_sent(site: Site, kind: str, values: dict[str, Any], weights: int = 0) -> None:
    """One line in the site's own `sent.csv`: what left, with the number of bytes of `weights`."""
    path = site.folder / "sent.csv"
    row = {
        "at": pd.Timestamp.now("UTC").isoformat(timespec="seconds"),
        "what": kind,
        "weights_bytes": weights,
    }
    row["values"] = "; ".join(f"{key}={value}" for key, value in values.items())
    line = pd.DataFrame([row])
    before = [pd.read_csv(path)] if path.exists() else []
    disk.write(path, lambda tmp: pd.concat([*before, line]).to_csv(tmp, index=False))
