"""Trained networks on disk: find them, read their weights, load them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ipmn_core import models
from ipmn_core.names import LABELS, TASKS, binary_names
from ipmn_core.params import Preprocessing
from ipmn_core.runs.grid import LOCAL_ONLY

METADATA = Path("configs", "metadata.json")  # of a MONAI bundle


class PredictError(ValueError):
    """A trained model cannot be used for a prediction; the message names the file and the remedy."""


@dataclass(frozen=True)
class Trained:
    """A trained network on disk: its weights and what its run says about it, None where unknown."""

    weights: Path
    network: str
    task: str
    classes: tuple[str, ...]
    how: Preprocessing  # of the scans it was trained on
    modality: str | None = None
    arm: str | None = None
    fold: int | None = None
    centers: tuple[str, ...] = ()  # of the arm `local_only`: whose networks these are, in order
    outputs: int = 0  # 1: the positive class alone, through a sigmoid; 0: one per class
    splits: Path | None = None  # the role of each case that the run knew

    @property
    def name(self) -> str:
        """Display name: `fedavg fold 0`, or the file's."""
        return self.weights.name if self.arm is None else f"{self.arm} fold {self.fold}"

    @property
    def per_center(self) -> bool:
        """Whether the file holds one network per center, as the runs of the arm `local_only` do."""
        return self.arm == LOCAL_ONLY and bool(self.centers)


def find(
    folders: str | Path | Sequence[str | Path],
    how: Preprocessing | None = None,
    network: str = "densenet121",
) -> list[Trained]:
    """Trained networks in run folders `.../fold<k>`, in folders that hold such (arms), bundles, or files.

    A file is a state dict of `network` with one, two or three outputs, for scans preprocessed as `how` says,
    by default as in the paper; one output is the positive class, through a sigmoid, as the data set's authors
    release them. Raises PredictError naming what is absent, unfinished, damaged or, in a bundle, changed, and
    a run that was trained on scans preprocessed in another way than `how`.
    """
    found = {}
    for path in map(Path, [folders] if isinstance(folders, str | Path) else folders):
        if path.name == "model.pt" and (path.parent / "run.json").exists():
            path = path.parent
        if not path.exists():
            raise PredictError(f"{path}: no such folder or file; give a run, an arm, a bundle or weights")
        bundle = next((root for root in (path, path.parent.parent) if (root / METADATA).exists()), None)
        of = [one for one in _of_bundle(bundle) if path in (bundle, one.weights)] if bundle else []
        folds = sorted(path.glob("fold[0-9]*"), key=lambda fold: (len(fold.name), fold.name)) or [path]
        if not of and path.is_file():
            of = [_of_file(path, how or Preprocessing(), network)]
        of = of or [_of_run(fold) for fold in folds]
        if how and any(one.how != how for one in of):
            raise PredictError(f"{path} was trained with {of[0].how}, not {how}; leave these options out")
        found |= {one.weights.resolve(): one for one in of}  # once, even if given twice
    return list(found.values())


def _of_run(folder: Path) -> Trained:
    path = folder / "run.json"
    if not path.exists():
        raise PredictError(f"{folder} holds no finished run (no run.json); train it, or leave it out")
    with _read(path) as record:
        more = {"fold": record["settings"]["fold"], "centers": tuple(record["centers"])}
        return Trained(folder / "model.pt", **_known(record), **more, splits=folder / "splits.csv")


def _of_bundle(root: Path) -> list[Trained]:
    """The networks of a bundle. Raises PredictError for a file that is not the one its metadata names."""
    with _read(root / METADATA) as metadata:
        record, splits = metadata["ipmn"], root / "docs" / "splits.csv"
        digests, weights = record["sha256"], {k: f"models/fold{k}.pt" for k in record["folds"]}
        of = [Trained(root / weights[k], **_known(record), fold=k, splits=splits) for k in weights]
        digests = {name: digests[name] for name in (*weights.values(), *digests)}
    for name, expected in digests.items():
        if not (root / name).is_file() or digest(root / name) != expected:
            key = f"`ipmn.sha256.{name}` in {root / METADATA}"
            raise PredictError(f"{root / name} is not the file of {key}: it was changed; export it again")
    return of


@contextlib.contextmanager
def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a record; raise PredictError naming its file for what is wrong with it."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise PredictError(f"{path} is damaged or of no network ({error!r}); restore or repeat it") from error


def _known(record: dict[str, Any]) -> dict[str, Any]:
    of = record["settings"]
    models.factory(of["model"])
    if of["task"] not in TASKS:
        raise ValueError(f"unknown task {of['task']!r}")
    how = Preprocessing(**{key: of[key] for key in Preprocessing.__dataclass_fields__})
    known = {"network": of["model"], "task": of["task"], "classes": tuple(record["classes"]), "how": how}
    return known | {"modality": of["modality"], "arm": of["arm"]}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_file(path: Path, how: Preprocessing, network: str) -> Trained:
    models.factory(network)
    layers = [value for value in weights(path).values() if value.ndim == 2]
    outputs = len(layers[-1]) if layers else 0
    if outputs not in (1, 2, 3):
        raise PredictError(f"{path}: its last layer has {outputs} outputs; expected a network with 1 to 3")
    multiclass = outputs == 3
    task, names = ("multiclass", LABELS) if multiclass else ("binary", binary_names(LABELS[2:]))
    return Trained(path, network, task, names, how, outputs=outputs)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the state dict in `path` without running code that a pickle may hold, or raise PredictError."""
    if not path.is_file():
        raise PredictError(f"{path}: no such file; fetch the weights, or repeat the run with them kept")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch, zip and pickle each raise their own kinds
        reason = str(error).partition("\n")[0]
        text = f"is refused: it cannot be read as plain tensors, and nothing in it was run ({reason})"
        raise PredictError(f"{path} {text}; fetch the file again, or ask for a plain state dict") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise PredictError(f"{path} holds more than tensors by name; ask for a plain state dict")
    return dict(state)


def load(trained: Trained, center: str | None = None) -> nn.Module:
    """The network with its weights, in evaluation mode; of the arm `local_only` the one of `center`.

    Raises PredictError naming file and key.
    """
    state, source = weights(trained.weights), str(trained.weights)
    if center and not trained.per_center:
        raise PredictError(f"{source} holds one model for all centers; leave out center {center}")
    if trained.per_center:
        if center not in trained.centers:
            wrong, known = f", not {center}" if center else "", ", ".join(trained.centers)
            raise PredictError(f"{source} holds one model per center: choose `center` of {known}{wrong}")
        mine, source = f"{trained.centers.index(center)}.", f"{source}, {center}"
        state = {key.removeprefix(mine): value for key, value in state.items() if key.startswith(mine)}
    network = models.build(trained.network, trained.outputs or len(trained.classes))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # torch names what is missing, unexpected, of another shape
        reason = textwrap.shorten(str(error), 250, placeholder=" ...")
        remedy = f"no weights of {trained.network} for {trained.task}: fetch or train others"
        raise PredictError(f"{source}: {reason}; {remedy}") from error
    for key, value in network.state_dict().items():
        if not value.isfinite().all():
            raise PredictError(f"{source}: {key} holds NaN or infinity: fetch or train others")
    return network.eval()


@torch.inference_mode()
def probabilities(network: nn.Module, x: torch.Tensor, source: Path) -> np.ndarray:
    """Class probabilities (N, K) float64 of cubes (N, 1, S, S, S), one by one: the same bits each time.

    A network of one output gives (1 - p, p). Raises PredictError naming `source` if one is not a number.
    """
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        logits = torch.cat([network(cube[None]).float() for cube in x]).double().cpu()
    p = logits.sigmoid()
    prob = torch.cat([1 - p, p], 1) if logits.shape[1] == 1 else logits.softmax(1)
    if not prob.isfinite().all():
        raise PredictError(f"{source}: its probabilities are not numbers; its training diverged: repeat it")
    return prob.numpy()
