"""One typed schema for every setting; the paper's protocol is the default of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Modality = Literal["t1", "t2"]
Count = Annotated[int, Field(ge=1)]
Folder = Annotated[str, Field(pattern=r"^[^\x00]+$")]
PHANTOM = "v1"  # a phantom that draws other voxels gets another folder: raise it with such a change
List = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML has no tuples


class ParamsError(ValueError):
    """A setting is unknown, missing or of the wrong kind."""


class Params(BaseModel):
    """The settings of one profile, flat, as they stand in `params/*.yaml` and in a notebook's first cell.

    Sizes are voxels, rates and probabilities plain numbers. Sections 2 and 3 of the paper and its
    released code give the defaults.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    profile: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")] = "paper"
    outputs: Folder = "outputs"
    data: Folder = "phantom"
    columns: Literal["header", "position"] = "header"
    phantom_max_per_cell: Count | None = None
    phantom_shortcut: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_per_cell: Count | None = None
    modalities: Annotated[tuple[Modality, ...], List, Field(min_length=1)] = ("t1", "t2")
    size: Annotated[int, Field(ge=32)] = 96
    fold_rule: Literal["center", "patient"] = "center"
    three_class_folds: Annotated[int, Field(ge=2)] = 5
    binary_folds: Annotated[int, Field(ge=2)] = 4
    inner_validation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    three_class_models: Annotated[tuple[str, ...], List, Field(min_length=1)] = (
        "resnet34",
        "shufflenetv2",
        "mobilenetv2",
        "efficientnetb0",
        "densenet121",
    )
    binary_model: str = "densenet121"
    arms: Annotated[tuple[str, ...], List, Field(min_length=1)] = (
        "centralized",
        "fedavg",
        "fedprox_0.1",
        "fedprox_0.3",
        "local_only",
    )
    epochs: Count = 100
    epochs_by_model: dict[str, Count] = {}
    rounds: Count = 100
    local_epochs: Count = 1
    clients_per_round: Count | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 16
    batches_per_epoch: Count | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    lr_step: Count = 30
    lr_gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    augment_prob: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # scikit-learn takes no larger one
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    threads: Annotated[int, Field(ge=0)] = 0
    jobs: Count = 1
    backend: Literal["loky", "ray", "dask"] = "loky"
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _names(self) -> Params:
        if self.profile.lower() in ("phantom", "cache", "reference"):  # some disks know no case
            raise ValueError(f"profile: {self.profile} is a folder of its own in outputs, take another name")
        for key in ("modalities", "three_class_models", "arms"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} lists a value twice: {list(values)}")
        if self.noise_multiplier is not None and self.clip_norm is None:
            raise ValueError("noise_multiplier: noise is in units of clip_norm, set that, too")
        return self

    @property
    def folder(self) -> Path:
        """Where everything of this profile lands: `<outputs>/<profile>`."""
        return project_root() / self.outputs / self.profile

    def folds(self, task: str) -> int:
        """The number of folds of a task, `three_class` or `binary`."""
        return {"three_class": self.three_class_folds, "binary": self.binary_folds}[task]

    @property
    def phantom_root(self) -> Path:
        """Where the phantom cohort of this seed and size lies, shared by all profiles."""
        cases = "all" if self.phantom_max_per_cell is None else f"first{self.phantom_max_per_cell}"
        shortcut = f"_shortcut{self.phantom_shortcut:g}" if self.phantom_shortcut else ""
        return project_root() / self.outputs / "phantom" / f"{PHANTOM}_seed{self.seed}_{cases}{shortcut}"

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
    """The validated settings of a YAML file. Raises ParamsError naming file, key and remedy."""
    path = Path(path)
    if not path.is_file():
        raise ParamsError(f"{path}: no such file; profiles lie in params/, for instance params/demo.yaml")
    try:
        text = path.read_text(encoding="utf-8")
        values, lines = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except Exception as error:  # PyYAML lets through whatever a date, number or tag provokes
        raise ParamsError(f"{path}: not valid YAML: {error}; mend it, or start from a copy") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected lines of `key: value`, found {type(values).__name__}")
    keys = [key.value for key, _ in lines.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:  # YAML would take the last without a word
        raise ParamsError(f"{path}: {', '.join(twice)} stands there twice; keep one line for each setting")
    return validate(values, str(path))


def validate(values: Mapping[str, Any], source: str) -> Params:
    """The settings in `values`, each checked. Raises ParamsError listing every fault with its key."""
    try:
        return Params.model_validate(dict(values))
    except ValidationError as error:
        faults = "\n".join(f"  {_in_words(fault)}" for fault in error.errors())
        raise ParamsError(f"{source}: {error.error_count()} setting(s) to mend\n{faults}") from error


def from_notebook(variables: Mapping[str, Any]) -> Params:
    """The settings among a notebook's variables (`globals()`), validated like a file's."""
    missing = [key for key in Params.model_fields if key not in variables]
    if missing:
        raise ParamsError(f"the notebook's parameters cell lacks {', '.join(missing)}; run that cell first")
    return validate({key: variables[key] for key in Params.model_fields}, "the notebook's parameters cell")


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
