"""What a hospital does on its own machine: its cases, its local updates, its own files. Knows no network.

`<outputs>/<token of the run>/` holds, each written atomically: `learner_<round>.pt`, its AdamW and schedule
after a round, `predictions.parquet`, by case, and `sent.csv`, what left the site and when.
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

from ipmn_core import data, federated, metrics, runs
from ipmn_core.disk import atomic
from ipmn_core.federated import Cases, Learner, State, Update
from ipmn_core.names import CENTERS
from ipmn_core.params import Params

SHARES = ("scores", "metrics")  # of its test cases: labels and probabilities without ids, or ACC and AUC only


class SiteError(RuntimeError):
    """A site cannot take part; the message is for its own people, with remedy."""


@dataclass(frozen=True)
class Site:
    """One hospital, by its center's name, in one run: the profile `p` has the site's own folders in place."""

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
    def settings(self) -> runs.RunSettings:
        """The run's settings, the machine's part as this machine decides."""
        return runs.on_this_machine(self.p, runs.run_settings(self.p, self.run))

    @cached_property
    def cohort(self) -> data.Cohort:
        """The cases of the run's modality, each with its `role`. Raises SiteError for cases of others."""
        cohort = data.load_cohort(self.p)
        others = sorted(set(cohort.scans["center"]) - {self.center})
        if others:
            raise SiteError(
                f"{self.p.data} holds scans of {', '.join(others)}, this is {self.center}: name its folder"
            )
        return runs.with_roles(cohort, self.settings)

    @cached_property
    def cases(self) -> Cases:
        """Cubes and targets of `cohort`."""
        x, device = torch.tensor(self.cohort.cubes).unsqueeze(1), federated.device_of(self.p)
        y = torch.tensor(runs.targets(self.cohort.scans["label"].to_numpy(), self.run.task))
        return Cases(x.to(device), y.to(device))

    @cached_property
    def test(self) -> pd.DataFrame:
        """The test cases in the order of the files."""
        return self.cohort.scans[self.cohort.scans["role"] == "test"]

    @cached_property
    def tested(self) -> pd.DataFrame:
        """The test cases in the order in which their scores leave: one that only this site knows."""
        path = self.folder / "secret"
        if not path.exists():
            with atomic(path) as tmp:
                tmp.write_bytes(secrets.token_bytes(16))
        rng = np.random.default_rng(list(path.read_bytes()))
        return self.test.iloc[rng.permutation(len(self.test))]

    def model(self) -> torch.nn.Module:
        """The run's network, untrained, on the site's device."""
        return runs.build(self.settings, federated.device_of(self.p), [self.center])


def open_site(node: dict[str, Any], order: dict[str, Any]) -> Site:
    """The site of a node's own configuration (`site, data, outputs, share`) in the run that `order` names.

    Raises SiteError for a configuration or a token that cannot be right.
    """
    missing = [key for key in ("site", "data", "outputs") if not node.get(key)]
    share = node.get("share", "scores")
    if missing or share not in SHARES or node["site"] not in CENTERS:
        raise SiteError(
            f"the node's configuration {node} must name site (one of {', '.join(CENTERS)}), data, "
            f"outputs and perhaps share ({' or '.join(SHARES)})"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}", order["token"]):
        raise SiteError("the server's run token is no plain name")
    own = {key: str(Path(node[key]).resolve()) for key in ("data", "outputs")}
    p = Params.model_validate_json(order["profile"]).model_copy(update=own)
    federated.prepare(p.threads)
    return Site(node["site"], p, runs.Run(**order["run"]), order["token"], share)


def introduce(site: Site) -> dict[str, Any]:
    """What the server needs to know first: counts, a hash of the data keyed by the run, perhaps labels."""
    n_train = int((site.cohort.scans["role"] == "train").sum())
    key = hmac.new(site.token.encode(), site.cohort.key.encode(), hashlib.sha256).hexdigest()
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
    model, settings = site.model(), site.settings
    mine = runs.indices(site.cohort.scans, "train")[site.center]
    learner = Learner(site.center, model, mine, settings)
    if since:
        path = site.folder / f"learner_{since}.pt"
        if not path.exists():
            raise SiteError(f"{path}, its state after round {since}, is gone: start the run afresh")
        learner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    if fresh:
        learner = federated.afresh(site.center, model, learner, settings)
    w_global = {key: value.to(site.cases.y.device) for key, value in w_global.items()}
    seed = [*settings.seed, round_, k]
    loss = federated.local_update(model, w_global, learner, site.cases, settings, settings.strategy, seed)
    with atomic(site.folder / f"learner_{round_}.pt") as tmp:
        torch.save(learner.state_dict(), tmp)
    for path in site.folder.glob("learner_*.pt"):
        if path.stem not in (f"learner_{since}", f"learner_{round_}"):
            path.unlink()
    return Update(
        site.center, len(mine), loss, {key: value.cpu() for key, value in model.state_dict().items()}
    )


def evaluate(site: Site, w_global: State, round_: int) -> dict[str, Any]:
    """What the site tells of the global model of a round on its test fold; by case only to its own disk."""
    model = site.model()
    model.load_state_dict(w_global)
    prob = federated.evaluate(model, torch.tensor(site.test.index), site.cases, site.settings)
    frame = runs.predictions_of(round_, prob, site.settings, site.test).drop(columns="role")
    path = site.folder / "predictions.parquet"
    earlier = [pd.read_parquet(path).query("epoch != @round_")] if path.exists() else []
    with atomic(path) as tmp:
        pd.concat([*earlier, frame], ignore_index=True).to_parquet(tmp, index=False)
    y = frame["y_true"].to_numpy()
    told = {"n": len(y), "acc": metrics.accuracy(y, prob), "auc": metrics.auc(y, prob)}
    if site.share == "scores":
        told["prob"] = pd.DataFrame(prob, site.test.index).loc[site.tested.index].to_numpy().ravel().tolist()
    return told


def note_sent(site: Site, kind: str, values: dict[str, Any], weights: int = 0) -> None:
    """Add a line to the site's own `sent.csv`: what leaves, with the number of bytes of `weights`."""
    path = site.folder / "sent.csv"
    row = {"at": pd.Timestamp.now("UTC").isoformat(timespec="seconds"), "what": kind}
    row |= {"weights_bytes": weights, "values": "; ".join(f"{key}={value}" for key, value in values.items())}
    earlier = [pd.read_csv(path)] if path.exists() else []
    with atomic(path) as tmp:
        pd.concat([*earlier, pd.DataFrame([row])]).to_csv(tmp, index=False)
