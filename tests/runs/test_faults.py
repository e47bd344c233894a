"""`ipmn run` is killed, started again, started twice, or has no place to write."""

import re
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
import yaml
from project import Project

from ipmn_core import cli, params, pipeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses signals and limits of Linux")
PROFILE = "params/smoke.yaml"
ROUND = "outputs/smoke/runs/binary/t2/fedprox_0.1/fold0/checkpoint.pt"  # written after the first round of two
MOMENTS = (  # what is seen on disk at a moment of each kind, in the order in which a run comes to them
    "outputs/cache/.*.partial",
    "outputs/smoke/runs/binary/t2/local_only/fold*/.checkpoint.pt.*.partial",
    "outputs/smoke/notebooks/*.running.ipynb",
)


@pytest.fixture
def project(smoke, tmp_path, monkeypatch):
    """A second project with the phantom of the first and no run yet; the working directory."""
    project = Project.new(tmp_path / "project")
    shutil.copytree(smoke.root / "outputs" / "phantom", project.root / "outputs" / "phantom")
    monkeypatch.chdir(project.root)
    return project


def kill_at(project, pattern):
    """Kill `ipmn run` as soon as there is something of `pattern`."""
    old, process = set(project.root.glob(pattern)), project.start()
    while process.poll() is None and not set(project.root.glob(pattern)) - old:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, project.said[-3000:]


def results(project, *parts):
    """Numbers and weights in `parts` of a project's results, by name."""
    found = {}
    for path in (path for part in parts for path in (project.folder / part).rglob("*")):
        if path.suffix in (".csv", ".parquet"):
            found[str(path.relative_to(project.folder))] = path.read_bytes()
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            found[str(path.relative_to(project.folder))] = {k: v.numpy().tobytes() for k, v in state.items()}
    return found


def test_a_federated_run_killed_between_rounds_ends_with_the_same_bits_and_is_not_repeated(smoke, project):
    values = yaml.safe_load((project.root / PROFILE).read_text()) | {"arms": ["fedprox_0.1"], "jobs": 1}
    (project.root / PROFILE).write_text(yaml.safe_dump(values))
    kill_at(project, ROUND)
    p = params.load(PROFILE)
    pipeline.prepare(p)
    ours, theirs = (results(of, "runs/binary/t2/fedprox_0.1") for of in (project, smoke))
    assert ours == theirs and any(name.endswith("model.pt") for name in ours)
    assert list(project.folder.rglob("checkpoint.pt")) == []
    before = {path: path.stat().st_mtime_ns for path in (project.folder / "runs").rglob("*")}
    pipeline.prepare(p)
    assert {path: path.stat().st_mtime_ns for path in (project.folder / "runs").rglob("*")} == before


@pytest.mark.slow
def test_a_run_killed_at_every_kind_of_moment_ends_as_one_that_was_not(smoke, project):
    for pattern in MOMENTS:
        kill_at(project, pattern)
    assert project.start().wait() == 0, project.said[-3000:]
    ours, theirs = results(project, "runs", "tables"), results(smoke, "runs", "tables")
    assert ours.keys() == theirs.keys() and len(ours) > 30
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_a_second_run_is_refused_while_the_first_works(project, capsys):
    with pipeline.locked(params.load(PROFILE)):
        assert cli.main(["run", PROFILE]) == 1
    assert f"ipmn: another `ipmn run` uses {project.folder}" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(project, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # the cache of cubes grows beyond it
    try:
        assert cli.main(["run", PROFILE]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"cache/cubes32_\w+\.npy cannot be written .*free disk space, or choose another folder", said
    )
    assert not list(project.root.rglob("*.partial")) and not list(project.folder.rglob("run.json"))
