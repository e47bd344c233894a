"""The work of a hospital on its own machine: its cases, local updates and files, without networking.

`<outputs>/<token of the run>/` has, each written atomically: `learner_<round>.pt` (AdamW and schedule after
a round), `predictions.parquet` (by case), and `sent.csv` (what left the site, and when).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ipmn_core import data, federated, metrics, runs
from ipmn_core.disk import atomic
from ipmn_core.federated import Cases, Learner, State
from ipmn_core.flower.deployment import FederationError
from ipmn_core.params import Params
from ipmn_core.runs import store


class Site:
    """One hospital in one run, from the node's configuration (`site, data, outputs, share`) and the order.

    `data` is a manifest or the folder of a release. A site shares "scores" of its test cases (labels and
    probabilities without ids), or only "metrics". Raises ValueError for a token that may lead out of the
    site's own folder.
    """

    def __init__(self, node: dict[str, Any], order: dict[str, Any]):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}", order["token"]):
            raise ValueError("the server's run token is not a plain name")
        self.center, self.share, self.token = node["site"], node["share"], order["token"]
        self.others = {name.casefold() for name in order["sites"]} - {self.center.casefold()}
        own = {key: str(Path(node[key]).resolve()) for key in ("data", "outputs")}
        self.p = Params.model_validate_json(order["profile"]).model_copy(update=own)
        self.settings = runs.on_this_machine(self.p, runs.run_settings(self.p, runs.Run(**order["run"])))
        self.folder = Path(self.p.outputs) / self.token
        self.folder.mkdir(parents=True, exist_ok=True)
        federated.prepare(self.p.threads)

    @cached_property
    def cohort(self) -> data.Cohort:
        """The cases of the run's modality, each with its `role`; their center is renamed to the site.

        Raises FederationError if they are not what the sites agreed on; its cause stays at the site.
        """
        _, classes, positive = data.classes_of(self.p, data.PAPER)
        try:
            cohort = data.load_cohort(self.p)
            own = ", ".join(cohort.centers)
            if (cohort.classes, cohort.positive) != (classes, positive):
                text = f"has the classes {', '.join(cohort.classes)} (positive: {', '.join(cohort.positive)})"
                raise data.CohortError(self.p.data, text, "name its labels in the profile's `classes`")
            if len(cohort.centers) > 1 or own.casefold() in self.others:
                text = f"holds scans of {own}, but this is the site {self.center}"
                remedy = "give a table of its own scans, or one name to its scanners (`center_names`)"
                raise data.CohortError(self.p.data, text, remedy)
        except data.CohortError as error:
            text = f"of one center, {', '.join(self.p.modalities)}, classes {', '.join(classes)}"
            text = f"its cases are not what the sites agreed on ({text}; positive: {', '.join(positive)})"
            raise FederationError(text) from error
        cohort = replace(cohort, scans=cohort.scans.assign(center=self.center))
        return runs.with_roles(cohort, self.settings)

    @cached_property
    def cases(self) -> Cases:
        """Cubes and targets of `cohort`."""
        x, device = torch.tensor(self.cohort.cubes).unsqueeze(1), federated.device_of(self.p)
        y = torch.tensor(data.targets(self.cohort.scans, self.settings.task).to_numpy())
        return Cases(x.to(device), y.to(device))

    @cached_property
    def test(self) -> pd.DataFrame:
        """The test cases in the order of the files."""
        return self.cohort.scans[self.cohort.scans["role"] == "test"]

    @cached_property
    def order(self) -> np.ndarray:
        """The secret order in which the scores of the test cases leave the site."""
        path = self.folder / "secret"
        if not path.exists():
            with atomic(path) as tmp:
                tmp.write_bytes(secrets.token_bytes(16))
        return np.random.default_rng(list(path.read_bytes())).permutation(len(self.test))

    def model(self) -> torch.nn.Module:
        """The run's network, untrained, on the site's device."""
        return runs.build(self.settings, federated.device_of(self.p), 2, [self.center])

    def learner(self, model: torch.nn.Module, since: int) -> Learner:
        """The site's training state after round `since` (0: a new one)."""
        mine = runs.indices(self.cohort.scans, "train")[self.center]
        learner = Learner(self.center, model, mine, self.settings, self.settings.strategy)
        if since:
            path = self.folder / f"learner_{since}.pt"
            learner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return learner


def introduce(site: Site) -> dict[str, Any]:
    """The first answer to the server: counts, a hash of the data keyed by the run, and, if shared, labels."""
    n_train = int((site.cohort.scans["role"] == "train").sum())
    key = hmac.new(site.token.encode(), site.cohort.key.encode(), hashlib.sha256).hexdigest()
    hello = {"center": site.center, "n_train": n_train, "n_test": len(site.test), "data": key}
    if site.share == "scores":
        y = data.targets(site.test, site.settings.task).to_numpy()
        hello["y_true"] = y[site.order].tolist()
    return hello


def train(site: Site, w_global: State, round_: int, k: int, since: int, fresh: bool) -> tuple[float, State]:
    """Loss and weights of client `k`'s local update in a round, from its state after round `since` (0: none).

    With `fresh` it starts with new AdamW moments, as after a refused update. The new state is written before
    returning and that of `since` is kept, so a repeated round gives the same bits.
    """
    model, settings = site.model(), site.settings
    learner = site.learner(model, since)
    keep = [site.folder / f"learner_{number}.pt" for number in (since, round_)]
    if fresh:
        learner.forget_moments()
    how = site.cases, settings, settings.strategy, [*settings.seed, round_, k]
    loss, state = federated.local_update(model, w_global, learner, *how)
    with atomic(keep[1]) as tmp:
        torch.save(learner.state_dict(), tmp)
    for path in set(site.folder.glob("learner_*.pt")) - set(keep):
        path.unlink()
    return loss, state


def evaluate(site: Site, w_global: State, round_: int, since: int) -> dict[str, Any]:
    """Results of a round's model on the site's test fold; predictions by case stay on its own disk.

    The model is the global one. With a personal strategy it is the site's own, made from its state after
    round `since` and kept at the site as `model.pt`.
    """
    model, strategy = site.model(), site.settings.strategy
    model.load_state_dict(w_global)
    if strategy.personal:
        federated.personalize(model, site.learner(model, since), site.cases, site.settings, strategy)
        store.save_model(site.folder, model)
    prob = federated.evaluate(model, torch.tensor(site.test.index), site.cases, site.settings)
    frame = runs.predictions_of(round_, prob, site.settings, site.settings.seed[0], site.test)
    frame = frame.drop(columns="role")
    path = site.folder / "predictions.parquet"
    earlier = [pd.read_parquet(path).query("epoch != @round_")] if path.exists() else []
    store.write_table(path, pd.concat([*earlier, frame], ignore_index=True))
    y = frame["y_true"].to_numpy()
    told = {"n": len(y), "acc": metrics.accuracy(y, prob), "auc": metrics.auc(y, prob)}
    if site.share == "scores":
        told["prob"] = prob[site.order].ravel().tolist()
    return told


def note_sent(site: Site, kind: str, values: dict[str, Any], weights: int = 0) -> None:
    """Add a line to the site's own `sent.csv`: what is sent, with the number of bytes of `weights`."""
    path, now = site.folder / "sent.csv", pd.Timestamp.now("UTC").isoformat(timespec="seconds")
    told = "; ".join(f"{key}={value}" for key, value in values.items())
    row = pd.DataFrame({"at": [now], "what": kind, "weights_bytes": weights, "values": told})
    store.write_table(path, pd.concat([pd.read_csv(path), row] if path.exists() else [row]))
