import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.requirements import Requirement

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


def test_every_dependency_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_tests_run_on_the_pinned_torch_and_monai():
    pins = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "monai"):
        assert f"{name}=={version(name).split('+')[0]}\n" in pins
