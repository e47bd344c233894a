"""Trained networks on disk: find them, read their weights, load them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ipmn_core import models
from ipmn_core.names import LABEL_NAMES, LABELS
from ipmn_core.runs.run import LOCAL_ONLY

CLASSES = {"three_class": LABELS, "binary": LABEL_NAMES[True]}


class PredictError(ValueError):
    """A trained model cannot be used for a prediction; the message names the file and the remedy."""


@dataclass(frozen=True)
class Trained:
    """A trained network on disk: its weights and what its run says of it, None where nothing is known."""

    weights: Path
    network: str
    task: str
    size: int  # edge of its cubes, voxels
    modality: str | None = None
    arm: str | None = None
    fold: int | None = None

    @property
    def name(self) -> str:
        """As people read it: `fedavg fold 0`, or the file."""
        return self.weights.name if self.arm is None else f"{self.arm} fold {self.fold}"


def find(folders: str | Path | Sequence[str | Path], size: int = 96) -> list[Trained]:
    """The trained networks in run folders `.../fold<k>`, in arm or exported folders that hold such, or files.

    A file is the state dict of a 3D DenseNet-121 with two or three classes, for cubes of `size`, such as the
    paper's authors release. Raises PredictError naming what is not there, unfinished or damaged.
    """
    paths = [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]
    found = []
    for path in paths:
        if path.is_file():
            of_run = path.name == "model.pt" and (path.parent / "run.json").exists()
            found.append(_of_run(path.parent) if of_run else _of_file(path, size))
        elif path.is_dir():
            folds = [folder for folder in path.glob("fold*") if folder.name[4:].isdigit()]
            folds.sort(key=lambda folder: int(folder.name[4:]))
            found += [_of_run(folder) for folder in folds or [path]]
        else:
            raise PredictError(f"{path}: no such folder or file; give a run, an arm, an export or weights")
    if not found:
        raise PredictError("no trained model was given; give a run, an arm, an export or weights")
    return list({one.weights.resolve(): one for one in found}.values())  # once, even if given twice


def _of_run(folder: Path) -> Trained:
    path = folder / "run.json"
    if not path.exists():
        raise PredictError(f"{folder} holds no finished run (no run.json); train it, or leave it out")
    try:
        of = json.loads(path.read_text())["settings"]
        models.factory(of["model"])
        known = (CLASSES[of["task"]] and of["task"], int(of["size"]), of["modality"], of["arm"], of["fold"])
    except (ValueError, KeyError, TypeError) as error:
        raise PredictError(f"{path} is damaged or of no network ({error!r}); restore or repeat it") from error
    return Trained(folder / "model.pt", of["model"], *known)


def _of_file(path: Path, size: int) -> Trained:
    layers = [value for value in weights(path).values() if value.ndim == 2]
    n_classes = len(layers[-1]) if layers else 0
    tasks = [task for task, names in CLASSES.items() if len(names) == n_classes]
    if not tasks:
        raise PredictError(f"{path}: its last layer has {n_classes} classes; expected a network with 2 or 3")
    return Trained(path, "densenet121", tasks[0], size)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`, on the CPU, read without running any code that a pickle may hold.

    Also one wrapped as "state_dict" or "model", and one with DataParallel's prefix "module.". Raises
    PredictError if there is none.
    """
    if not path.is_file():
        raise PredictError(f"{path}: no such file; fetch the weights, or repeat the run")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        remedy = "ask for a plain state dict"
        text = f"{path} is refused: it is no file of tensors alone, and nothing in it was run; {remedy}"
        raise PredictError(text) from error
    except Exception as error:  # torch, zip and pickle each raise their own kinds
        reason = str(error).partition("\n")[0]
        raise PredictError(f"{path} cannot be read as weights ({reason}); fetch the file again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise PredictError(f"{path} holds {type(state).__name__}, no tensors by name; ask for a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise PredictError(f"{path}: {key} is no dense tensor; ask for a plain state dict")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load(trained: Trained, center: str | None = None) -> nn.Module:
    """The network with its weights, to be asked, not trained. Raises PredictError naming file and key."""
    state, source = weights(trained.weights), str(trained.weights)
    if trained.arm == LOCAL_ONLY:
        if center not in centers(state):
            wrong = f", not {center}" if center else ""
            known = ", ".join(centers(state))
            raise PredictError(f"{source} holds one model a center: choose `center` of {known}{wrong}")
        source += f", {center}"
        mine = f"{center}."
        state = {key.removeprefix(mine): value for key, value in state.items() if key.startswith(mine)}
    network = models.build(trained.network, len(CLASSES[trained.task]))
    faults = _faults(network.state_dict(), state)
    if faults:
        more = f" and {len(faults) - 1} more fault(s)" if len(faults) > 1 else ""
        wanted = f"{trained.network} with {len(CLASSES[trained.task])} classes"
        raise PredictError(f"{source}: {faults[0]}{more}; no weights of {wanted}: fetch or train others")
    network.load_state_dict(state)
    return network.eval()


def centers(state: dict[str, torch.Tensor]) -> list[str]:
    """Whose networks a state dict of the arm `local_only` holds."""
    return list(dict.fromkeys(key.partition(".")[0] for key in state))


def _faults(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> list[str]:
    """What keeps `state` from being that of a network whose state is `own`."""
    faults = [f"{key} is missing" for key in own if key not in state]
    faults += [f"{key} is not expected" for key in state if key not in own]
    for key in (key for key in own if key in state):
        wanted, value = own[key], state[key]
        if value.shape != wanted.shape:
            faults.append(f"{key} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
        elif value.is_floating_point() != wanted.is_floating_point():
            faults.append(f"{key} is {value.dtype}, expected {wanted.dtype}")
        elif not value.isfinite().all():
            faults.append(f"{key} holds NaN or infinity")
    return faults
