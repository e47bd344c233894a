"""A project folder for `ipmn run` as a user starts it."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Project:
    """A separate project folder with the smoke profile, and the output of `ipmn run` in it."""

    root: Path

    @classmethod
    def new(cls, root):
        """Copy `params/` and `notebooks/` to `root`."""
        for name in ("params", "notebooks"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".*"))
        return cls(root)

    @property
    def folder(self):
        """Where the smoke profile's results go."""
        return self.root / "outputs" / "smoke"

    @property
    def said(self):
        return (self.root / "ipmn.log").read_text()

    def start(self):
        """A process of `ipmn run params/smoke.yaml`, started as a user would."""
        command = [sys.executable, "-m", "ipmn_core.cli", "run", "params/smoke.yaml"]
        with (self.root / "ipmn.log").open("a") as log:
            return subprocess.Popen(command, cwd=self.root, stdout=log, stderr=log)
