"""One typed schema for all settings; the defaults are the paper's protocol."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ipmn_core.names import ARMS, MODELS

PHANTOM = "v3"  # a phantom that draws other voxels gets another folder: raise it with such a change


class ParamsError(ValueError):
    """A setting is unknown, missing or has an invalid value."""


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is listed twice")
    return values


def _naming(values: Any) -> Any:
    """A list of names as {name: name}; YAML's numbers become text."""
    values = {value: value for value in values} if isinstance(values, (list, tuple)) else values
    if not isinstance(values, dict) or any(
        isinstance(name, bool) for pair in values.items() for name in pair
    ):
        raise ValueError("write a list of names, or `in the data: shown`; quote words such as no and yes")
    return {str(key): str(value) for key, value in values.items()}


Naming = Annotated[dict[str, str], BeforeValidator(_naming), Field(min_length=1)]
T = TypeVar("T")
PLAIN = r"^\w[\w .+-]*\Z"  # also the name of a folder
Maybe = Annotated[tuple[T, ...], Field(strict=False), AfterValidator(_distinct)]  # or a list
Distinct = Annotated[tuple[T, ...], Field(strict=False, min_length=1), AfterValidator(_distinct)]
Plain = Annotated[str, Field(pattern=PLAIN)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Intensity = Literal["minmax", "zscore", "none"]
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]  # "~" is the user's home


def setting(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


@dataclass(frozen=True)
class Preprocessing:
    """The settings by which a scan becomes a cube; the defaults are the paper's."""

    size: int = 96  # voxels
    spacing: float | None = None  # mm
    intensity: str = "minmax"
    orientation: str = "stored"


class Params(BaseModel):
    """The settings of one profile. The defaults are those of the paper and its released code.

    `params/<profile>.yaml` lists what differs from them; `ipmn params` prints all settings.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, regex_engine="python-re"
    )

    profile: str = setting(
        "paper",
        "name; results go to outputs/<profile>/; phantom, cache and reference are not allowed",
        pattern=r"(?i)^(?!(phantom|cache|reference)\Z)[a-z0-9_-]{1,100}\Z",
    )
    outputs: Place = setting("outputs", "folder for all results")
    data: Place = setting("phantom", "phantom, the folder of the real data set, or a manifest (CSV, Excel)")
    classes: Naming | None = setting(None, "classes in order, or {label: class}; null: the data's")
    positive: Distinct[str] | None = setting(None, "positive classes of the binary task; null: the last")
    center_names: Naming | None = setting(None, "centers in order, or {in the data: name}; null: the data's")
    phantom_max_per_cell: Count | None = setting(None, "phantom: cases per center and class; null: table 1's")
    phantom_shortcut: Share = setting(0.0, "phantom: how strongly the scanning protocol follows the label")
    phantom_shift: Share = setting(
        0.5, "phantom: 0: one scanner for all centers; 0.5: one per center; 1: opposite contrasts"
    )
    dial_shifts: Maybe[Share] = setting(
        (), "phantom: values of phantom_shift at which to train the binary arms, too, for chapter 3's dial"
    )
    dial_intensities: Maybe[Intensity] = setting((), "values of intensity for the dial; [] for the profile's")
    phantom_seed: Seed = setting(0, "phantom: seed of patients and images")
    cohort: Literal["all", "histology"] = setting(
        "all", "real data set: all cases, or without those that were only followed up"
    )
    max_per_cell: Count | None = setting(None, "cases used per center and class; null for all")
    modalities: Distinct[Plain] = setting(("t1", "t2"), "modalities, each with its own networks")
    paired: bool = setting(
        False, "only patients with a scan of every modality; fusion needs it. Departs from the paper"
    )
    size: int = setting(96, "edge of the ROI cube, voxels", ge=32)
    spacing: float | None = setting(
        None, "edge of the voxels before masking, mm; null: as stored, as in the paper", ge=0.25, le=10
    )
    intensity: Intensity = setting(
        "minmax", "scaling of an ROI: minmax to 0-1 as in the paper, zscore inside the mask, or none"
    )
    orientation: Literal["stored", "canonical"] = setting(
        "stored", "axes of the voxels: stored as in the paper, or canonical (to right, front and head)"
    )
    fold_rule: Literal["center", "patient", "given", "official", "leave_one_center_out"] = setting(
        "center",
        "center as in the paper; patient keeps T1 and T2 of a patient in one fold; given: the data's; "
        "leave_one_center_out: fold k is center k",
    )
    multiclass_folds: int = setting(5, "folds of the multiclass task", ge=2)
    binary_folds: int = setting(4, "folds of the binary task", ge=2)
    inner_validation: float = setting(0.0, "share of training cases to choose the epoch on", ge=0, le=0.5)
    multiclass_models: Maybe[str] = setting(MODELS, "networks of the multiclass task; [] trains none")
    binary_model: str = setting("densenet121", "network of the binary task")
    arms: Maybe[str] = setting(ARMS, "arms of the binary task; [] trains none; docs/strategies.md lists all")
    epochs: Count = setting(100, "centralized epochs")
    epochs_by_model: dict[str, Count] = setting({}, "{network: epochs} where they differ, multiclass task")
    rounds: Count = setting(100, "federated rounds")
    local_epochs: Count = setting(1, "local epochs of a client in a round")
    finetune_epochs: Count = setting(5, "epochs of each client alone after the rounds, in the arm finetune")
    clients_per_round: Count | None = setting(None, "clients drawn for a round; null for all")
    batch_size: int = setting(16, "cases per batch", ge=2)
    batches_per_epoch: Count | None = setting(None, "batches after which an epoch ends; null for all")
    lr: float = setting(1e-3, "learning rate of AdamW", gt=0)
    weight_decay: float = setting(0.01, "weight decay of AdamW", ge=0)
    lr_step: Count = setting(30, "epochs after which the learning rate is multiplied by lr_gamma")
    lr_gamma: Factor = setting(0.1, "factor of the learning rate after lr_step epochs")
    batch_norm_momentum: Factor | None = setting(
        None, "weight of a batch in BatchNorm's running statistics; null: 0.1 (EfficientNet: 0.01)"
    )
    augment_prob: Share = setting(0.1, "probability of a random flip, and of a quarter turn")
    seed: Seed = setting(0, "seed of weights, batches, augmentation and inner splits")
    more_seeds: Maybe[Seed] = setting(
        (), "more seeds for training the binary arms on the last modality, for chapter 4's spread"
    )
    keep_models: Maybe[str] = setting(
        ("*",), "runs that keep weights, besides chapter 3's: patterns of task/modality/arm/fold<k>"
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:1", pattern=r"^(auto|cpu|cuda(:\d+)?)\Z")
    precision: Literal["auto", "float32", "bfloat16"] = setting("float32", "float32, bfloat16 or auto")
    threads: int = setting(0, "torch threads per run; 0 for all cores", ge=0)
    jobs: Count = setting(1, "runs at a time")
    checkpoint_seconds: float = setting(60.0, "minimum time between two checkpoints; 0: every epoch", ge=0)

    @property
    def folder(self) -> Path:
        """The folder of all results of this profile: `<outputs>/<profile>`."""
        return project_root() / self.outputs / self.profile

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.size, self.spacing, self.intensity, self.orientation)

    def folds(self, task: str) -> int:
        """The number of folds of a task, `multiclass` or `binary`."""
        return {"multiclass": self.multiclass_folds, "binary": self.binary_folds}[task]

    @property
    def phantom_root(self) -> Path:
        """The folder of the phantom with these settings, shared by all profiles."""
        cases = "all" if self.phantom_max_per_cell is None else f"first{self.phantom_max_per_cell}"
        shortcut = f"_shortcut{self.phantom_shortcut:g}" if self.phantom_shortcut else ""
        shift = f"_shift{self.phantom_shift:g}" if self.phantom_shift != 0.5 else ""
        name = f"{PHANTOM}_seed{self.phantom_seed}_{cases}{shortcut}{shift}"
        return project_root() / self.outputs / "phantom" / name

    @property
    def cohort_root(self) -> Path:
        """The cohort's folder: `data`, relative to the project if it is not absolute, or the phantom's."""
        return self.phantom_root if self.data == "phantom" else project_root() / self.data


def project_root() -> Path:
    """The nearest folder at or above the working directory that holds `params/` and `notebooks/`."""
    here = Path.cwd()
    above = (f for f in (here, *here.parents) if (f / "params").is_dir() and (f / "notebooks").is_dir())
    return next(above, here)


def load(path: str | Path) -> Params:
    """The settings of a YAML file; the rest are defaults. Raises ParamsError naming file and key."""
    return validate(_read(Path(path)), str(path))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ParamsError(f"{path}: no such file; `ipmn init .` puts profiles into params/ here")
    try:
        text = path.read_text(encoding="utf-8")
        values, lines = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except Exception as error:  # dates, numbers and tags raise errors of other kinds
        raise ParamsError(f"{path}: not valid YAML: {error}; fix it, or start from a copy") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected lines of `key: value`, found {type(values).__name__}")
    if len(values) < len(lines.value):  # YAML silently uses the last one
        raise ParamsError(f"{path}: a setting is given twice; keep one line per setting")
    return values


def validate(values: Mapping[str, Any], source: str) -> Params:
    """The settings in `values`, validated. Raises ParamsError listing every invalid setting."""
    try:
        return Params.model_validate(dict(values))
    except ValidationError as error:
        faults = "\n".join(f"  {_in_words(fault)}" for fault in error.errors())
        raise ParamsError(f"{source}: {error.error_count()} invalid setting(s)\n{faults}") from error


def _in_words(fault: dict[str, Any]) -> str:
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown setting; `ipmn params` lists all"
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if fault["type"] == "float_type" else ""
    return f"{key}: {fault['msg']}, not {fault['input']!r:.100}{hint}"


def from_notebook(variables: Mapping[str, Any]) -> Params:
    """The settings of a notebook, from its variables (`globals()`).

    Later ones win: the defaults, `params/<profile>.yaml` (or the file whose path is `profile`), variables
    that have the name of a setting and are not None. Raises ParamsError for an invalid setting, and for an
    unknown one that papermill injected.
    """
    injected = [cell for cell in variables.get("In", ()) if cell.startswith("# Parameters")]  # papermill's
    nodes = [node for cell in injected for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    names = {target.id for node in nodes for target in node.targets} | Params.model_fields.keys()
    given = {key: variables[key] for key in names if variables.get(key) is not None}
    profile = str(given.pop("profile", "paper"))
    path = Path(profile) if profile.endswith(".yaml") else project_root() / "params" / f"{profile}.yaml"
    values = _read(path) if path.is_file() or profile.endswith(".yaml") else {"profile": profile}
    return validate({**values, **given}, "the notebook's parameters")
