"""Results of all runs of a profile, read from their folders: predictions, curves, updates."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import pandas as pd

from ipmn_core import metrics
from ipmn_core.federated import STRATEGIES
from ipmn_core.names import TASKS
from ipmn_core.params import Params
from ipmn_core.runs import store
from ipmn_core.runs.grid import Run, folder_of, grid, run_settings


def predictions(p: Params, task: str) -> pd.DataFrame:
    """The test predictions of all runs of a task, one row per case and epoch, checked (`metrics.check`).

    Raises FileNotFoundError naming the first run that is not finished, PredictionsError naming a bad row.
    """
    return metrics.check(_of_all(p, task, "test"), source=f"{p.folder / 'runs' / task}, all runs")


def validation(p: Params, task: str) -> pd.DataFrame:
    """The predictions of the inner validation cases, in the form of `predictions`; empty without a split."""
    return _of_all(p, task, "validation") if p.inner_validation else pd.DataFrame(columns=metrics.COLUMNS)


def _of_all(p: Params, task: str, role: str) -> pd.DataFrame:
    protocols = {run: run_settings(p, run).protocol() for run in grid(p, task)}
    frames = [store.read_predictions(folder_of(p, run), of, role) for run, of in protocols.items()]
    return pd.concat(frames, ignore_index=True)


def finished_predictions(p: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`predictions` and `validation` of every task whose runs are all finished, one under the other.

    Raises FileNotFoundError if no task is finished.
    """
    tested, inner = [], []
    for task in TASKS:
        with contextlib.suppress(FileNotFoundError):
            of_task = predictions(p, task), validation(p, task)
            tested.append(of_task[0])
            inner.append(of_task[1])
    if not tested:
        raise FileNotFoundError(f"{p.folder / 'runs'}: no task is finished; run chapter 2 or 3 first")
    return pd.concat(tested, ignore_index=True), pd.concat(inner, ignore_index=True)


def histories(p: Params, task: str) -> pd.DataFrame:
    """Training loss, test accuracy and test AUC of every epoch of all runs of a task.

    Raises FileNotFoundError naming the first run that is not finished.
    """
    return pd.concat([_table(p, run, "history.csv") for run in grid(p, task)], ignore_index=True)


def updates(p: Params) -> pd.DataFrame:
    """Inner products of the clients' updates in every round of all federated runs.

    Columns modality, arm, fold, round, client, other, inner_product. Raises FileNotFoundError naming a run
    that is not finished.
    """
    columns = ["modality", "arm", "fold", "round", "client", "other", "inner_product"]
    frames = [_table(p, run, "updates.csv") for run in grid(p, "binary") if run.arm in STRATEGIES]
    return pd.concat(frames or [pd.DataFrame(columns=columns)], ignore_index=True)[columns]


def left_out(p: Params) -> pd.DataFrame:
    """Clients that were left out of a round: columns modality, arm, fold, round, client, reason.

    Raises FileNotFoundError naming a run that is not finished.
    """
    columns = ["modality", "arm", "fold", "round", "client", "reason"]
    frames = [_table(p, run, "left_out.csv") for run in grid(p, "binary")]
    return pd.concat(
        [frame for frame in frames if len(frame)] or [pd.DataFrame(columns=columns)], ignore_index=True
    )[columns]


def _table(p: Params, run: Run, name: str) -> pd.DataFrame:
    """A CSV file of a run, with the run's task, modality, arm and fold; empty if the run has no such file."""
    path = store.whole(folder_of(p, run), run_settings(p, run).protocol()) / name
    return (pd.read_csv(path) if path.exists() else pd.DataFrame()).assign(**asdict(run))
