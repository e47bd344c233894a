import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def conda_dependencies():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return {re.split("[><=]", entry)[0]: entry for entry in listed if isinstance(entry, str)}


def test_conda_users_get_the_same_dependencies_in_the_same_ranges():
    expected = {"pip": "pip", "python": "python" + PROJECT["requires-python"]}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = CONDA_NAMES.get(requirement.name, requirement.name)
        expected[name] = f"{name}{requirement.specifier}"
    assert conda_dependencies() == expected


def test_the_packages_that_users_were_promised_are_dependencies():
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    promised = "jupyterlab papermill torch monai nibabel ipywidgets matplotlib scikit-learn pandas"
    assert set(promised.split()) <= names


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): pin for name, pin in pinned}


def direct(*extras):
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in PROJECT["dependencies"] + lines]


def test_every_dependency_is_pinned_within_its_range():
    for requirement in direct(*PROJECT["optional-dependencies"]):
        assert requirement.specifier.contains(pins()[requirement.name]), requirement


def test_what_is_installed_for_this_package_is_what_is_pinned_down_to_the_last_dependency():
    todo, seen, differ = direct("dev", "flower"), {}, {}
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if extras <= seen.setdefault(name, set()):
            continue
        seen[name] |= extras
        installed = version(name).split("+")[0]  # torch's "+cpu" is no other version
        if installed != pins().get(name):
            differ[name] = (installed, pins().get(name))
        needed = map(Requirement, requires(name) or [])
        todo += [n for n in needed if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
    assert differ == {}  # name: (installed, pinned)
    assert {"torch", "monai", "numpy", "requests", "urllib3"} <= set(seen)
