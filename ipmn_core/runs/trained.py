"""Trained networks on disk: find them, read their weights, load them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ipmn_core import models
from ipmn_core.disk import digest
from ipmn_core.names import LABELS, TASKS, binary_names, fusion, is_personal
from ipmn_core.params import Preprocessing

METADATA = Path("configs", "metadata.json")  # of a MONAI bundle
WRAPPED = r"((module|_orig_mod)\.)+"  # the prefix of all keys after DataParallel or torch.compile
NESTED = ("state_dict", "model_state_dict", "model")  # where a trainer's checkpoint keeps the weights
POINTER = b"version https://git-lfs"


class PredictError(ValueError):
    """A trained model cannot be used for a prediction; the message names the file and the remedy."""


@dataclass(frozen=True)
class Trained:
    """A trained network on disk: its weights and the facts of its run, None where unknown."""

    weights: Path
    network: str
    task: str
    classes: tuple[str, ...]
    how: Preprocessing  # of the scans it was trained on
    modality: str | None = None
    arm: str | None = None
    fold: int | None = None
    centers: tuple[str, ...] = ()  # the clients, in the order of a personal arm's networks
    outputs: int = 0  # 1: only the positive class, through a sigmoid; 0: one per class
    data: str = ""  # key of the cohort it was trained on
    splits: Path | None = None  # the file with the role of each case

    @property
    def name(self) -> str:
        """Display name: `fedavg fold 0`, or the names of folder and file."""
        return "/".join(self.weights.parts[-2:]) if self.arm is None else f"{self.arm} fold {self.fold}"


def find(
    folders: str | Path | Sequence[str | Path],
    how: Preprocessing | None = None,
    network: str | None = None,
) -> list[Trained]:
    """Trained networks in run folders `.../fold<k>`, folders of an arm, bundles, or files.

    A file is a state dict of `network` (default: densenet121) with one, two or three outputs, for scans
    preprocessed as `how` says (default: as in the paper). One output is the positive class, through a
    sigmoid, as the data set's authors release them. Raises PredictError for what is absent, unfinished,
    damaged or, in a bundle, changed, and for a run with another `network` or preprocessing.
    """
    found = {}
    for path in map(Path, [folders] if isinstance(folders, str | Path) else folders):
        if path.name == "model.pt" and (path.parent / "run.json").exists():
            path = path.parent
        if not path.exists():
            raise PredictError(f"{path}: no such folder or file; give a run, an arm, a bundle or weights")
        full = path.absolute()
        bundle = next((root for root in (full, full.parent.parent) if _is_ours(root / METADATA)), None)
        of = [one for one in _of_bundle(bundle) if full in (bundle, one.weights)] if bundle else []
        folds = sorted(path.glob("fold[0-9]*"), key=lambda fold: (len(fold.name), fold.name)) or [path]
        if not of and path.is_file():
            of = [_of_file(path, how or Preprocessing(), network or "densenet121")]
        of = of or [_of_run(fold) for fold in folds]
        if how and any(one.how != how for one in of):
            text = f"{path} was trained with {in_words(of[0].how)}, not {in_words(how)}"
            raise PredictError(f"{text}; leave out --size, --spacing, --intensity and --orientation")
        if network and any(one.network != network for one in of):
            raise PredictError(f"{path} has the network {of[0].network}, not {network}; leave out --network")
        found |= {one.weights.resolve(): one for one in of}  # once, even if given twice
    return list(found.values())


def _of_run(folder: Path) -> Trained:
    path = folder / "run.json"
    if not path.exists():
        files = [str(file) for file in sorted(folder.rglob("*.pt*")) if file.is_file()]
        remedy = f"give its files: {', '.join(files[:8])}" if files else "train it, or leave it out"
        raise PredictError(f"{folder} holds no finished run (no run.json); {remedy}")
    with _read(path) as record:
        more = {"fold": record["settings"]["fold"], "centers": tuple(record["centers"])}
        more |= {"data": record.get("data", ""), "splits": folder / "splits.csv"}
        found = Trained(folder / "model.pt", **_known(record), **more)
    if fusion(found.modality)[1]:
        raise PredictError(f"{folder} needs two scans of a patient ({found.modality}); give another run")
    if not record.get("trained_here", True):
        files = ", ".join(one["file"] for one in record["weights"])
        raise PredictError(f"{folder} is a test of weights from elsewhere; give those weights: {files}")
    return found


def _is_ours(metadata: Path) -> bool:
    """Whether a bundle's metadata comes from `ipmn export`."""
    return metadata.is_file() and '"ipmn": {' in metadata.read_text(encoding="utf-8")


def seal_of(record: dict[str, Any]) -> str:
    """SHA-256 of a bundle's record without its checksums; the model card allows deleting one of these."""
    kept = {key: value for key, value in record.items() if key not in ("sha256", "seal")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _of_bundle(root: Path) -> list[Trained]:
    """The networks of a bundle. Raises PredictError for a file that differs from its metadata."""
    with _read(root / METADATA) as metadata:
        record = metadata["ipmn"]
        more = {"data": record["settings"]["data"], "splits": root / "docs" / "splits.csv"}
        digests, weights = record["sha256"], {k: f"models/fold{k}.pt" for k in record["folds"]}
        of = [Trained(root / weights[k], **_known(record), fold=k, **more) for k in weights]
        digests = {name: digests[name] for name in (*weights.values(), *digests)}
    if record.get("seal") != seal_of(record):
        raise PredictError(f"`ipmn` in {root / METADATA} was changed; export it again")
    for name, expected in digests.items():
        if not (root / name).is_file() or digest(root / name) != expected:
            key = f"`ipmn.sha256.{name}` in {root / METADATA}"
            raise PredictError(f"{root / name} is not the file of {key}: it was changed; export it again")
    return of


@contextlib.contextmanager
def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a record; raise PredictError naming its file if the record is invalid."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        text = f"{path} cannot be read as a run or bundle ({error!r})"
        raise PredictError(f"{text}; restore it, or repeat the run") from error


def _known(record: dict[str, Any]) -> dict[str, Any]:
    of = record["settings"]
    models.factory(of["model"])
    if of["task"] not in TASKS:
        raise ValueError(f"unknown task {of['task']!r}")
    how = Preprocessing(**{key: of[key] for key in Preprocessing.__dataclass_fields__})
    known = {"network": of["model"], "task": of["task"], "classes": tuple(record["classes"]), "how": how}
    return known | {"modality": of["modality"], "arm": of["arm"]}


def _of_file(path: Path, how: Preprocessing, network: str) -> Trained:
    models.factory(network)
    layers = {key: value for key, value in weights(path).items() if value.ndim == 2}
    last, layer = next(reversed(layers.items()), ("", ()))
    outputs = len(layer)
    if outputs not in (1, 2, 3):
        found = f"its last linear layer, {last or 'none'}, has {outputs} outputs"
        raise PredictError(f"{path}: {found}; expected a network of 1, 2 or 3 classes")
    task, names = ("multiclass", LABELS) if outputs == 3 else ("binary", binary_names(LABELS[2:]))
    return Trained(path, network, task, names, how, outputs=outputs)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the state dict in `path` without running code of a pickle, or raise PredictError.

    It may be part of a trainer's checkpoint, with wrapped keys and in half or double precision.
    """
    if not path.is_file():
        raise PredictError(f"{path}: no such file; fetch the weights, or repeat the run with them kept")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch, zip and pickle each raise their own kinds
        text = f"is refused: {_unreadable(path, error)}; no code in it was run"
        raise PredictError(f"{path} {text}; fetch the file again, or ask for a plain state dict") from error
    if isinstance(state, dict):
        state = next((state[key] for key in NESTED if isinstance(state.get(key), dict)), state)
    entries = state.items() if isinstance(state, dict) else [(type(state).__name__, state)]
    for key, value in entries:
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            text = f"holds more than named tensors: {key!r} is of type {type(value).__name__}"
            raise PredictError(f"{path} {text}; ask for a plain state dict")
    if all(re.match(WRAPPED, key) for key in state):
        state = {re.sub(f"^{WRAPPED}", "", key): value for key, value in state.items()}
    return {k: v.float().contiguous() if v.is_floating_point() else v for k, v in state.items()}


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded; torch's message recommends loading it in an unsafe way."""
    with open(path, "rb") as file:
        head = file.read(len(POINTER))
    if not head or head == POINTER:
        return "it is a Git LFS pointer (`git lfs pull` fetches the weights)" if head else "it is empty"
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it holds code, {code[1]}" if code else "it cannot be read as plain tensors"


def hashed(case_id: str) -> str:
    """SHA-256 of a case's name in lower case, because files and sheets differ in case."""
    return hashlib.sha256(case_id.lower().encode()).hexdigest()


def roles(trained: Trained) -> pd.DataFrame:
    """Hashed case, center and role of each case of the network's run; empty if unknown."""
    if not trained.splits or not trained.splits.exists():
        return pd.DataFrame(columns=["case", "center", "role"])
    table = pd.read_csv(trained.splits, dtype=str, keep_default_na=False)
    table = table[table["fold"] == str(trained.fold)] if "fold" in table else table
    case = table["case_sha256"] if "case_sha256" in table else table["case_id"].map(hashed)
    return table.assign(case=case)[["case", "center", "role"]]


def load(trained: Trained, center: str | None = None) -> nn.Module:
    """The network with its weights, in evaluation mode; for a personal arm the network of `center`.

    Raises PredictError naming file and key.
    """
    state, source = weights(trained.weights), str(trained.weights)
    per_center = trained.arm and is_personal(trained.arm) and trained.centers  # a bundle has one center's
    if center and not per_center:
        raise PredictError(f"{source} holds one model for all centers; leave out center {center}")
    if per_center:
        if center not in trained.centers:
            wrong, known = f", not {center}" if center else "", ", ".join(trained.centers)
            raise PredictError(f"{source} holds one model per center: choose `center` of {known}{wrong}")
        mine, source = f"{trained.centers.index(center)}.", f"{source}, {center}"
        state = {key.removeprefix(mine): value for key, value in state.items() if key.startswith(mine)}
    for key, value in state.items():
        whole = not value.is_floating_point() and not key.endswith("num_batches_tracked")
        if whole or not value.isfinite().all():
            wrong = f"is of type {value.dtype}" if whole else "holds NaN or infinity"
            raise PredictError(f"{source}: {key} {wrong}; fetch or train others")
    outputs = trained.outputs or len(trained.classes)
    try:
        return _filled(trained.network, outputs, state)
    except RuntimeError as error:
        reason, fitting = " ".join(str(error).split()).partition(": ")[2][:400], ""
        for name in models.MODELS:
            with contextlib.suppress(RuntimeError):
                _filled(name, outputs, state)
                fitting = fitting or f"; they fit {name}: name that network"
        of = f"these are not weights of {trained.network} with {outputs} output(s)"
        raise PredictError(f"{source}: {of}{fitting or ': fetch or train others'} ({reason})") from error


def _filled(name: str, outputs: int, state: dict[str, torch.Tensor]) -> nn.Module:
    """A network with the weights `state`. Raises RuntimeError naming keys that do not fit."""
    with torch.device("meta"):  # without memory for weights that are replaced
        network = models.factory(name)(outputs)
    network.load_state_dict(state, assign=True)
    return network.eval()


def in_words(how: Preprocessing) -> str:
    """The preprocessing in words: `96^3, spacing as stored, intensity minmax, stored axes`."""
    spacing = f"{how.spacing:g} mm" if how.spacing else "spacing as stored"
    return f"{how.size}^3, {spacing}, intensity {how.intensity}, {how.orientation} axes"


@torch.inference_mode()
def probabilities(network: nn.Module, x: torch.Tensor, source: Path) -> np.ndarray:
    """Class probabilities (N, K) float64 of cubes (N, 1, S, S, S), one by one, so bits are reproducible.

    A network with one output gives (1 - p, p). Raises PredictError naming `source` for NaN.
    """
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        logits = torch.cat([network(cube[None]).float() for cube in x]).double().cpu()
    p = logits.sigmoid()
    prob = torch.cat([1 - p, p], 1) if logits.shape[1] == 1 else logits.softmax(1)
    if not prob.isfinite().all():
        raise PredictError(f"{source}: its probabilities are NaN because its training diverged; repeat it")
    return prob.numpy()


def probabilities_of(
    one: Trained, cubes: Iterable[np.ndarray], device: torch.device, bar: tqdm, center: str | None = None
) -> list[np.ndarray]:
    """`probabilities` (K,) of each cube (S, S, S) by one network, loaded only during this call."""
    network, prob = load(one, center).to(device), []
    for cube in cubes:
        x = torch.from_numpy(np.float32(cube))[None, None].to(device)  # (1, 1, S, S, S)
        prob.append(probabilities(network, x, one.weights)[0])
        bar.update()
    return prob
