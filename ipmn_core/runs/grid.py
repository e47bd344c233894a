"""The grid of a profile's runs: task x modality x arm x fold, each with its settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ipmn_core import federated, models
from ipmn_core.federated import Settings, Strategy
from ipmn_core.names import TASKS, fusion
from ipmn_core.params import Params, Preprocessing

CENTRALIZED, LOCAL_ONLY = "centralized", "local_only"  # one model for all images; one model per center
MACHINE = ("device", "bfloat16", "channels_last")  # recorded, not compared


@dataclass(frozen=True)
class Run:
    """One cell of the grid: the task, modality and arm, and the fold that is tested."""

    task: str
    modality: str
    arm: str
    fold: int


@dataclass(frozen=True, kw_only=True)
class RunSettings(Preprocessing, Settings, Run):
    """A run with all settings that its result depends on; facts about the machine are not compared."""

    model: str
    folds: int
    fold_rule: str
    inner_validation: float
    max_per_cell: int | None
    threads: int
    batch_norm_momentum: float | None
    strategy: Strategy | None
    device: str = field(default="cpu", compare=False)

    def record(self) -> dict[str, Any]:
        """All settings as plain values, for `run.json`."""
        return json.loads(json.dumps(asdict(self)))

    def protocol(self) -> dict[str, Any]:
        """The settings that identify a run, as plain values."""
        return {key: value for key, value in self.record().items() if key not in MACHINE}


def grid(p: Params, task: str) -> list[Run]:
    """All runs of a task: models x modalities x folds, or arms x modalities x folds.

    Raises ValueError naming an unknown task, model or arm, and for a fused modality that cannot be trained.
    """
    if task not in TASKS:
        raise ValueError(f"{task}: unknown task; known are {', '.join(TASKS)}")
    for name in (*p.multiclass_models, *p.epochs_by_model, p.binary_model):
        models.factory(name)
    for arm in set(p.arms) - {CENTRALIZED, LOCAL_ONLY}:
        federated.strategy(arm)
    multiclass = task == "multiclass"
    if arms := p.multiclass_models if multiclass else p.arms:
        _check_fusion(p, arms if multiclass else (p.binary_model,))
    # arms innermost, so that workers rarely train the largest model at the same time (memory)
    return [Run(task, m, arm, k) for m in p.modalities for k in range(p.folds(task)) for arm in arms]


def _check_fusion(p: Params, networks: Sequence[str]) -> None:
    """Raise ValueError for a profile whose fused modality cannot be trained or compared fairly."""
    fused = [modality for modality in p.modalities if fusion(modality)[1]]
    for wrong, text in (
        (not p.paired, "needs patients with both scans; set `paired: true`"),
        (p.fold_rule == "center", "needs both scans of a patient in one fold; set `fold_rule: patient`"),
        (set(networks) != {"densenet121"}, f"needs densenet121, not {', '.join(networks)}; set that"),
        (fused[-1:] == [*p.modalities[-1:]], "is last, but chapters show the last modality's scans; reorder"),
    ):
        if fused and wrong:
            raise ValueError(f"modalities: {fused[0]} {text}")


def named(run: Run) -> str:
    """The display name of a run: `binary t2 fedavg fold 0`."""
    return f"{run.task} {run.modality} {run.arm} fold {run.fold}"


def folder_of(p: Params, run: Run) -> Path:
    """The folder of a run: `<outputs>/<profile>/runs/<task>/<modality>/<arm>/fold<k>`."""
    return p.folder / "runs" / run.task / run.modality / run.arm / f"fold{run.fold}"


def shown(p: Params) -> list[Run]:
    """The runs whose networks chapter 3 shows: the first and the last arm on the last modality, fold 0."""
    return [Run("binary", p.modalities[-1], arm, 0) for arm in (*p.arms[:1], *p.arms[-1:])]


def run_settings(p: Params, run: Run) -> RunSettings:
    """The settings of a run of a profile, independent of the machine (see `on_this_machine`)."""
    model, epochs, strategy = p.binary_model, p.epochs, None
    if run.task == "multiclass":
        model, epochs = run.arm, p.epochs_by_model.get(run.arm, p.epochs)
    elif run.arm == LOCAL_ONLY:
        epochs = p.rounds * p.local_epochs
    elif run.arm != CENTRALIZED:
        epochs, strategy = p.rounds, federated.strategy(run.arm, p.clients_per_round)
    finetune_epochs = p.finetune_epochs if strategy and strategy.finetune else 0
    same = {each.name for each in fields(RunSettings)} & Params.model_fields.keys() - set(MACHINE)
    of_run = {"model": model, "folds": p.folds(run.task), "strategy": strategy, "seed": (p.seed, run.fold)}
    of_run |= {"epochs": epochs + finetune_epochs, "finetune_epochs": finetune_epochs}
    of_run |= {"local_epochs": p.local_epochs if strategy else 1}
    return RunSettings(**{key: getattr(p, key) for key in same} | asdict(run) | of_run)


def protocols(p: Params, task: str) -> dict[Run, dict[str, Any]]:
    """{run: `RunSettings.protocol`} of all runs of a task that the profile trains."""
    return {run: run_settings(p, run).protocol() for run in grid(p, task)}


def scored(p: Params, task: str) -> dict[Run, dict[str, Any]]:
    """{run: settings} of all runs of a task on disk whose weights are from elsewhere (`score`).

    Preprocessing is that of the weights; folds are the profile's. Arms that the profile trains are left out.
    """
    found, trained = {}, {run.arm for run in grid(p, task)}
    for path in sorted((p.folder / "runs" / task).glob("*/*/fold*/run.json")):
        record = json.loads(path.read_text())
        of = record["settings"]
        if record.get("trained_here", True) or of["arm"] in trained or of["modality"] not in p.modalities:
            continue
        now = {"folds": p.folds(task), "fold_rule": p.fold_rule} if of["folds"] > 1 else {}  # 1: the whole
        run = Run(task, of["modality"], of["arm"], of["fold"])
        found[run] = {**of, **now, "max_per_cell": p.max_per_cell}
    return found


def networks(p: Params) -> dict[str, str]:
    """The network of each arm of the multiclass task: the arm's name or, if scored, that of its weights."""
    named = {name: name for name in p.multiclass_models}
    return named | {run.arm: settings["model"] for run, settings in scored(p, "multiclass").items()}


def on_this_machine(p: Params, settings: RunSettings) -> RunSettings:
    """The settings with this machine's device, precision and memory layout.

    Raises ValueError for a device or precision that this machine lacks.
    """
    device = federated.device_of(p)
    return replace(
        settings,
        device=device.type,
        bfloat16=federated.uses_bfloat16(p, device, settings.model),
        channels_last=device.type == "cuda" or settings.model in models.CHANNELS_LAST,
    )
