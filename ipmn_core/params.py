"""One typed schema for every setting; the default of each is the paper's protocol."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ipmn_core.names import ARMS, MODELS

PHANTOM = "v1"  # a phantom that draws other voxels gets another folder: raise it with such a change
List = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has no tuples
Names = Annotated[tuple[str, ...], List, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Folder = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class ParamsError(ValueError):
    """A setting is unknown, missing or of the wrong kind."""


class Params(BaseModel):
    """The settings of one profile, flat. The defaults are those of the paper and of its released code.

    `params/<profile>.yaml` lists what differs from them; `ipmn params` prints all of them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    profile: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")] = Field(
        "paper", description="name; results go to outputs/<profile>/"
    )
    outputs: Folder = Field("outputs", description="folder for everything that is written")
    data: Folder = Field("phantom", description="phantom, or the folder of the real data set")
    phantom_max_per_cell: Count | None = Field(
        None, description="phantom only: cases written per center and class; null for those of table 1"
    )
    phantom_shortcut: float = Field(
        0.0, ge=0, le=1, description="phantom only: tie of the scanning protocol to the label, 0 (none) to 1"
    )
    phantom_seed: int = Field(0, ge=0, lt=2**32, description="phantom only: draws patients and images")
    max_per_cell: Count | None = Field(None, description="cases used per center and class; null for all")
    modalities: Annotated[tuple[Literal["t1", "t2"], ...], List] = Field(
        ("t1", "t2"), min_length=1, description="modalities, each with networks of its own"
    )
    size: int = Field(96, ge=32, description="edge of the ROI cube, voxels")
    fold_rule: Literal["center", "patient"] = Field(
        "center", description="center as in the paper; patient keeps T1 and T2 of a patient in one fold"
    )
    three_class_folds: int = Field(5, ge=2, description="folds of the three-class task")
    binary_folds: int = Field(4, ge=2, description="folds of the binary task")
    inner_validation: float = Field(
        0.0, ge=0, le=0.5, description="share of each training fold held out to choose an epoch on"
    )
    three_class_models: Names = Field(MODELS, description="networks of the three-class task")
    binary_model: str = Field("densenet121", description="network of the binary task")
    arms: Names = Field(ARMS, description="arms of the binary task; local_only is not in the paper")
    epochs: Count = Field(100, description="centralized epochs")
    epochs_by_model: dict[str, Count] = Field(
        {}, description="networks of the three-class task that train for another number of epochs"
    )
    rounds: Count = Field(100, description="federated rounds")
    local_epochs: Count = Field(1, description="local epochs of a client in a round")
    clients_per_round: Count | None = Field(None, description="clients drawn for a round; null for all")
    batch_size: int = Field(16, ge=2, description="cases per batch")
    batches_per_epoch: Count | None = Field(
        None, description="batches after which an epoch ends; null for all"
    )
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    lr_step: Count = Field(30, description="epochs after which the learning rate is multiplied by lr_gamma")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor of the learning rate after lr_step epochs")
    augment_prob: float = Field(
        0.1, ge=0, le=1, description="probability of a random flip, and of a random 90-degree rotation"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="draws weights, batches, augmentation and inner splits")
    keep_models: Annotated[tuple[str, ...], List] = Field(
        ("*",),
        description="runs that keep weights, beside chapter 3's: patterns of task/modality/arm/fold<k>",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="auto, cpu, cuda or cuda:1"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="float32, bfloat16 (autocast), or auto to ask the hardware"
    )
    threads: int = Field(0, ge=0, description="torch threads per run; 0 for all cores")
    jobs: Count = Field(1, description="runs at a time")
    checkpoint_seconds: float = Field(
        60.0, ge=0, description="least time between two checkpoints of an unfinished run; 0: every epoch"
    )

    @model_validator(mode="after")
    def _names(self) -> Params:
        if self.profile.lower() in ("phantom", "cache", "reference"):  # some disks ignore case
            raise ValueError(f"profile: {self.profile} is a folder of its own in outputs, take another name")
        for key in ("modalities", "three_class_models", "arms"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} lists a value twice: {list(values)}")
        return self

    @property
    def folder(self) -> Path:
        """The folder of everything that this profile writes: `<outputs>/<profile>`."""
        return project_root() / self.outputs / self.profile

    def folds(self, task: str) -> int:
        """The number of folds of a task, `three_class` or `binary`."""
        return {"three_class": self.three_class_folds, "binary": self.binary_folds}[task]

    @property
    def phantom_root(self) -> Path:
        """The folder of the phantom cohort of this seed and size, shared by all profiles."""
        cases = "all" if self.phantom_max_per_cell is None else f"first{self.phantom_max_per_cell}"
        shortcut = f"_shortcut{self.phantom_shortcut:g}" if self.phantom_shortcut else ""
        name = f"{PHANTOM}_seed{self.phantom_seed}_{cases}{shortcut}"
        return project_root() / self.outputs / "phantom" / name

    @property
    def cohort_root(self) -> Path:
        """The cohort's folder: `data`, relative to the project if it is not absolute, or the phantom's."""
        return self.phantom_root if self.data == "phantom" else project_root() / self.data


def project_root() -> Path:
    """The nearest folder at or above the working directory that holds `params/` and `notebooks/`."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def load(path: str | Path) -> Params:
    """The settings of a YAML file, the paper's where it has none. Raises ParamsError naming file and key."""
    return validate(_read(Path(path)), str(path))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ParamsError(f"{path}: no such file; profiles are in params/, for instance params/demo.yaml")
    try:
        text = path.read_text(encoding="utf-8")
        values, lines = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except Exception as error:  # PyYAML lets other errors through, by a date, a number or a tag
        raise ParamsError(f"{path}: not valid YAML: {error}; fix it, or start from a copy") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected lines of `key: value`, found {type(values).__name__}")
    keys = [key.value for key, _ in lines.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:  # YAML would take the last one silently
        raise ParamsError(f"{path}: {', '.join(twice)} is given twice; keep one line per setting")
    return values


def validate(values: Mapping[str, Any], source: str) -> Params:
    """The settings in `values`, each checked. Raises ParamsError listing every invalid one by its key."""
    try:
        return Params.model_validate(dict(values))
    except ValidationError as error:
        faults = "\n".join(f"  {_in_words(fault)}" for fault in error.errors())
        raise ParamsError(f"{source}: {error.error_count()} invalid setting(s)\n{faults}") from error


def from_notebook(variables: Mapping[str, Any]) -> Params:
    """The settings of a notebook, from its variables (`globals()`).

    In this order: the schema's defaults, `params/<profile>.yaml` (or the file that `profile` is the path of),
    the variables that are named like a setting and are not None. Raises ParamsError for a setting of the
    wrong kind, and for one that papermill injected and the schema does not know.
    """
    injected = [cell for cell in variables.get("In", ()) if cell.startswith("# Parameters")]  # papermill's
    nodes = [node for cell in injected for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    names = {target.id for node in nodes for target in node.targets} | Params.model_fields.keys()
    given = {key: variables[key] for key in names if variables.get(key) is not None}
    profile = str(given.pop("profile", "paper"))
    path = Path(profile) if profile.endswith(".yaml") else project_root() / "params" / f"{profile}.yaml"
    values = _read(path) if path.is_file() or profile.endswith(".yaml") else {"profile": profile}
    return validate({**values, **given}, "the notebook's parameters")


def table() -> list[dict[str, str]]:
    """All settings, one row each: setting, default (the paper's protocol), description."""
    fields = Params.model_fields.items()
    return [{"setting": k, "default": str(f.default), "description": f.description} for k, f in fields]


def _in_words(fault: dict[str, Any]) -> str:
    key, value = ".".join(map(str, fault["loc"])), fault.get("input")
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown setting; known are {', '.join(Params.model_fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message
    hint = ""
    if isinstance(value, str) and fault["type"] in ("float_type", "int_type"):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3, without quotes)"
    return f"{key}: {message}, not {value!r:.100}{hint}"
