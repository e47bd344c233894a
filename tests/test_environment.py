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


def test_conda_users_get_the_same_dependencies_in_the_same_ranges():
    expected = {"pip", "python" + PROJECT["requires-python"]}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        expected.add(f"{CONDA_NAMES.get(requirement.name, requirement.name)}{requirement.specifier}")
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {entry for entry in listed if isinstance(entry, str)} == expected


def test_the_version_is_that_of_the_citation_and_of_the_newest_release_in_the_changelog():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert PROJECT["version"] == cited == newest


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): pin for name, pin in pinned}


def test_what_is_installed_for_this_package_is_what_is_pinned_down_to_the_last_dependency():
    lists = PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()
    todo, seen, differ = [Requirement(line) for lines in lists for line in lines], {}, {}
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
    assert {"torch", "monai", "numpy", "huggingface-hub", "httpx2"} <= set(seen)
