import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
WHERE = "from ipmn_core import pipeline; print(*pipeline.chapters(), sep='\\n')"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of a wheel's files, built from a copy of the repository."""
    base = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("ipmn_core", "notebooks", "params"):
        shutil.copytree(ROOT / name, base / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, base / "source")
    subprocess.run([sys.executable, "-c", BUILD, base], cwd=base / "source", check=True, capture_output=True)
    zipfile.ZipFile(next(base.glob("*.whl"))).extractall(base / "installed")
    return base / "installed"


def files(folder, *patterns):
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    paths = (path for path in paths if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_wheel_has_every_file_of_the_package(installed):
    assert files(ROOT, "ipmn_core/**/*").items() <= files(installed, "ipmn_core/**/*").items()


def test_an_installed_package_has_notebooks_and_writes_them_with_the_profiles(installed, tmp_path):
    def told(*command):
        how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(installed)}, "text": True}
        return subprocess.run([sys.executable, *command], check=True, capture_output=True, **how).stdout

    expected = installed / "ipmn_core" / "project" / "notebooks"
    assert {Path(line).parent for line in told("-c", WHERE).split()} == {expected}
    told("-m", "ipmn_core.cli", "init", "here")
    expected = files(ROOT, "notebooks/*.ipynb", "params/*.yaml")
    assert len(expected) > 8 and files(tmp_path / "here", "**/*") == expected
