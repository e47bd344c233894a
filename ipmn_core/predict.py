"""A new case and trained models -> probabilities, a picture, JSON. For research, not for clinical use."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import nn

from ipmn_core import data, federated, models, params, runs
from ipmn_core.names import LABEL_NAMES, LABELS

CLASSES = {"three_class": LABELS, "binary": LABEL_NAMES[True]}
NOTICE = "Not for clinical use: a research model without external validation."
LONGEST_MM = 250  # an ROI that is longer is hardly a pancreas of 12 to 15 cm, rather a whole image


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


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one case: `folds` has a row a network, columns model, weights (a path) and classes.

    `center` is whose networks were asked (arm `local_only`), else None; `warnings` are sentences.
    """

    case: str
    task: str
    modality: str | None
    size: int
    center: str | None
    device: str
    folds: pd.DataFrame
    warnings: tuple[str, ...]


def predict(
    image: str | Path,
    mask: str | Path | None,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    size: int = 96,
    device: str = "cpu",
    case: str | None = None,
) -> Prediction:
    """The probabilities that the trained networks in `folders` (see `find`) give a scan, in float32.

    `image` with its pancreas `mask`, or a clean ROI without. `center`: whose networks to ask, for the arm
    `local_only`. `size`: edge of the cubes, for bare weights. `case`: its name in the cohort, by default the
    file's; with it the prediction says whether the case was trained on. Raises PredictError or ScanError.
    """
    where = federated.device_of(params.validate({"device": device, "size": size}, "predict"))
    trained = find(folders, size)
    _refuse_mixed(trained, center)
    case = case or data.case_name(Path(image).name)
    roi = data.load_roi(image, mask, case)
    cube = data.to_cube(np.asanyarray(roi.dataobj), trained[0].size)
    x = torch.from_numpy(cube).float()[None, None].to(where)  # (1, 1, S, S, S)
    prob = [_probabilities(load(one, center).to(where), x, one.weights) for one in trained]
    names = pd.DataFrame([(one.name, str(one.weights)) for one in trained], columns=["model", "weights"])
    folds = names.join(pd.DataFrame(prob, columns=list(CLASSES[trained[0].task])))
    said = (*_said_of_roi(roi), *_said_of_case(case, trained, center))
    of = trained[0]
    return Prediction(case, of.task, of.modality, of.size, center, str(where), folds, said)


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


def _refuse_mixed(trained: list[Trained], center: str | None) -> None:
    first = trained[0]
    for key in ("task", "modality", "size"):
        for one in trained:
            a, b = getattr(first, key), getattr(one, key)
            if a != b:
                known = f"{first.weights} has {a or 'none'}, {one.weights} {b or 'none'}"
                raise PredictError(f"models of more than one {key}: {known}; predict with each by itself")
    shared = [one for one in trained if one.arm != runs.LOCAL_ONLY]
    if center and shared:
        raise PredictError(f"{shared[0].weights} holds one model for all centers; leave out center {center}")


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
    if trained.arm == runs.LOCAL_ONLY:
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


@torch.inference_mode()
def _probabilities(network: nn.Module, x: torch.Tensor, source: Path) -> np.ndarray:
    """Class probabilities (K,) float64 of one cube (1, 1, S, S, S); the same bits each time."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        prob = network(x).softmax(1)[0].double().cpu().numpy()
    if not np.isfinite(prob).all():
        raise PredictError(f"{source}: its probabilities are not numbers; its training diverged: repeat it")
    return prob


def _said_of_roi(roi: nib.Nifti1Image) -> list[str]:
    longest = float(np.max(np.multiply(roi.shape, roi.header.get_zooms())))
    if longest <= LONGEST_MM:
        return []
    return [f"the ROI is {longest:.0f} mm long, more than a pancreas: check mask and voxel size"]


def _said_of_case(case: str, trained: list[Trained], center: str | None) -> list[str]:
    """Sentences on what the networks have seen of a case, by its name."""
    names = {}
    for one in trained:
        names.setdefault(_role(case, one.weights.with_name("splits.csv"), center), []).append(one.name)
    said = {
        "train": "{case} was trained on by {names}: what they say of it is no test",
        "validation": "{case} was held out of the training of {names} for validation: it is no test either",
        "test": "{case} was a test case of {names}, whose epoch was chosen on the test cases: this flatters",
        "unknown": "which cases {names} was trained on is not known; if {case} was one, this is no test",
    }
    return [text.format(case=case, names=", ".join(names[r])) for r, text in said.items() if r in names]


def _role(case: str, path: Path, center: str | None) -> str:
    """What a run (its `center`) used a case for, by `splits.csv`: train, validation, test, "" or unknown."""
    if not path.exists():
        return "unknown"
    try:
        splits = data.from_spreadsheet(pd.read_csv(path, dtype=str))
        ids = splits["case_sha256"] if "case_sha256" in splits else splits["case_id"].map(hashed)
        mine = (ids == hashed(case)) & (splits["center"].eq(center) | (center is None))
        return next(iter(splits.loc[mine, "role"]), "")
    except (ValueError, KeyError) as error:
        raise PredictError(f"{path} is damaged ({error}); restore it, or delete it to do without") from error


def hashed(case_id: str) -> str:
    """SHA-256 of a case's name in lower case, for files and sheets differ in case."""
    return hashlib.sha256(case_id.lower().encode()).hexdigest()


def table(result: Prediction) -> pd.DataFrame:
    """A row a model, then `mean` and `std` over them (ddof = 0): columns model and classes."""
    over = pd.DataFrame(over_models(result)).T.rename_axis("model").reset_index()
    return pd.concat([result.folds.drop(columns="weights"), over], ignore_index=True)


def over_models(result: Prediction) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (ddof = 0) of each class over the models."""
    prob = result.folds[list(CLASSES[result.task])]
    return {"mean": prob.mean().to_dict(), "std": prob.std(ddof=0).to_dict()}


def to_json(result: Prediction) -> str:
    """The prediction in plain values: case, settings, each model, mean and std over them, warnings."""
    settings = {key: getattr(result, key) for key in ("task", "modality", "size", "center", "device")}
    content = {
        "notice": NOTICE,
        "case": result.case,
        "settings": {**settings, "precision": "float32"},
        "folds": result.folds.to_dict("records"),
        **over_models(result),
        "warnings": list(result.warnings),
    }
    return json.dumps(content, indent=2)


def picture(result: Prediction, roi: nib.Nifti1Image, path: str | Path | None = None):
    """A figure, written to `path` if given: the ROI's widest slice, a bar a class (mean), a dot a model.

    `roi` as `preprocess.load_roi` gives it; it is turned as radiologists see it, its aspect is that in mm.
    """
    import matplotlib.pyplot as plt

    from ipmn_core import views

    classes, roi = list(CLASSES[result.task]), nib.as_closest_canonical(roi)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    views.show_slice(left, roi, views.widest_slice(roi.dataobj)).set_title(f"{result.case}, ROI")
    prob = result.folds[classes]
    right.barh(classes, prob.mean(), color=views.PALETTE[5])
    for k, name in enumerate(classes):
        right.plot(prob[name], np.full(len(prob), k), "o", ms=4, color=views.PALETTE[0], alpha=0.7)
    right.set(xlim=(0, 1), xlabel=f"probability: mean (bar) of {len(prob)} model(s) (dots)")
    figure.suptitle(NOTICE, fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure
