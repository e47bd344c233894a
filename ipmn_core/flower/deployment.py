"""A federation across machines as files: who takes part, keys, certificates, settings.

A federation's folder holds `federation.yaml`, `profile.yaml`, `server/` (for the server alone) and
`sites/<center>/` (for that hospital alone: the CA's certificate, its key, the server's address).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from ipmn_core import params
from ipmn_core.names import CENTERS
from ipmn_core.params import Params

APP = """[project]
name = "ipmn-federation"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "ipmn"

[tool.flwr.app.components]
serverapp = "ipmn_core.flower.app:server_app"
clientapp = "ipmn_core.flower.app:client_app"

[tool.flwr.app.config]
order = ""
"""


class FederationError(RuntimeError):
    """A federation cannot be started or went wrong; the message says where and what to do."""


class Policy(BaseModel):
    """What a round does while a site is away, in seconds and sites.

    "wait" asks again until every site has answered; "continue" goes on with at least `min_sites` of them
    after `round_seconds`. Both give up after `wait_seconds` without enough of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    away: Literal["wait", "continue"] = "wait"
    min_sites: PositiveInt = 2
    round_seconds: PositiveFloat = 600.0
    wait_seconds: PositiveFloat = 3600.0


class Federation(Policy):
    """Where the server listens, which sites take part, the profile that they train and the policy."""

    folder: Path
    host: str = Field(min_length=1)
    port: int = Field(ge=1, le=65535)
    profile: Params
    sites: tuple[str, ...]

    @property
    def server(self) -> Path:
        """The folder that only the server may have."""
        return self.folder / "server"

    @field_validator("sites")
    @classmethod
    def _are_centers(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(sites)) < 2 or len(set(sites)) < len(sites) or not set(sites) <= set(CENTERS):
            raise ValueError(f"name two or more of {', '.join(CENTERS)}, once each, not {', '.join(sites)}")
        return sites

    @field_validator("profile")
    @classmethod
    def _can_be_federated(cls, p: Params) -> Params:
        from ipmn_core import federated

        alone = [arm for arm in p.arms if arm not in federated.STRATEGIES]
        if alone:
            raise ValueError(
                f"arms: {', '.join(alone)} do not federate; use {', '.join(federated.STRATEGIES)}"
            )
        if p.inner_validation:
            raise ValueError("inner_validation: sites draw no inner split yet; set it to 0.0")
        return p


def write(
    folder: Path, profile: Path, sites: Sequence[str], host: str, port: int, **policy: Any
) -> Federation:
    """Write a new federation's folder: certificates, keys and settings of the server and of every site.

    Raises FileExistsError if it exists, FederationError for sites or a profile that cannot federate.
    """
    flower("flwr")
    from ipmn_core.flower import certificates  # of the extra

    p = params.load(profile)
    p = p.model_copy(update={"outputs": str((params.project_root() / p.outputs).resolve())})
    made = _checked(profile, folder=folder, profile=p, sites=sites, host=host, port=port, **policy)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder, its keys may be in use")
    for place in ("server/app", "server/flwr", *(f"sites/{name}" for name in sites)):
        (folder / place).mkdir(parents=True)
    (made.server / "app" / "pyproject.toml").write_text(APP)
    certificates.write(made.server, host)
    for name in sites:
        place = folder / "sites" / name
        certificates.node_key(place)
        shutil.copy(made.server / "ca.crt", place)
        shutil.copy(place / "key.pub", made.server / f"{name}.pub")
        (place / "site.yaml").write_text(yaml.safe_dump({"site": name, "server": f"{host}:{port}"}))
    (folder / "profile.yaml").write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    about = made.model_dump(mode="json", exclude={"folder", "profile"})
    (folder / "federation.yaml").write_text(yaml.safe_dump(about, sort_keys=False))  # last: it is whole
    return read(folder)


def read(folder: Path) -> Federation:
    """Read the federation in `folder`. Raises FederationError naming the file and what is wrong with it."""
    path = folder / "federation.yaml"
    if not path.is_file():
        raise FederationError(f"{path}: no such file; `ipmn federation init` writes it")
    try:
        values = dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise FederationError(f"{path}: not lines of `key: value` ({error})") from error
    values |= {"folder": folder.resolve(), "profile": params.load(folder / "profile.yaml")}
    return _checked(path, **values)


def _checked(source: Path, **values: Any) -> Federation:
    try:
        return Federation(**values)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise FederationError(f"{source}: {'; '.join(faults)}") from error


def flower(name: str) -> str:
    """The path of a command of Flower's. Raises FederationError if the extra `flower` is not installed."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FederationError("Flower is not installed; `pip install 'ipmn[flower]'`")
    return str(path)
