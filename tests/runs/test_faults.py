"""What befalls `ipmn run` from outside: it is killed, started twice, or has no place to write."""

import contextlib
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from ipmn_core import cli, pipeline
from ipmn_core.runs import spread

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes start from a server that forks")

SETTINGS = {"profile": "kill", "phantom_max_per_cell": 3, "modalities": ["t2"], "size": 32, "device": "cpu"}
SETTINGS |= {"three_class_models": ["shufflenetv2"], "binary_model": "shufflenetv2", "binary_folds": 2}
SETTINGS |= {"three_class_folds": 2, "arms": ["centralized", "fedprox_0.1"]}
SETTINGS |= {"epochs": 6, "rounds": 8, "batch_size": 4, "batches_per_epoch": 2, "threads": 1}
SETTINGS |= {"precision": "float32", "checkpoint_seconds": 0.0}

# What is seen on disk at a moment of each kind, in the order in which a run comes by them.
MOMENTS = {
    "writing the phantom": "phantom/.*.partial",
    "filling the cache": "cache/*.partial",
    "a federated round": "kill/runs/binary/t2/fedprox_0.1/fold*/share_done",
    "writing a checkpoint of all clients": "kill/runs/binary/t2/fedprox_0.1/fold*/.checkpoint.pt.*.partial",
    "training": "kill/runs/three_class/t2/shufflenetv2/fold*/share_done",
    "writing a checkpoint": "kill/runs/three_class/t2/shufflenetv2/fold*/.checkpoint.pt.*.partial",
    "writing the best model": "kill/runs/three_class/t2/shufflenetv2/fold*/.model.pt.*.partial",
    "a notebook": "kill/notebooks/*.running.ipynb",
    "writing tables": "kill/tables/*",
}
KILLS = dict(zip(MOMENTS, (3, 2, 5, 3, 3, 2, 1, 2, 1), strict=True))


def start(profile, jobs=1, largest_file=None):
    """`ipmn run` in a process of its own, its imports done; none of its files grows beyond a size."""
    multiprocessing.set_forkserver_preload([spread.PRELOAD, "ipmn_core.cli", "ipmn_core.runs", "papermill"])
    profile.write_text(yaml.safe_dump({"outputs": str(profile.parent), **SETTINGS, "jobs": jobs}))
    process = multiprocessing.get_context(spread.CLEAN).Process(target=run, args=(profile, largest_file))
    process.start()
    return process


def run(profile, largest_file):
    log = open(profile.with_suffix(".log"), "a", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = log
    os.chdir(ROOT)
    pipeline.START = spread.FORK  # its imports are done: seconds less at each start
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(cli.main(["run", str(profile)]))


def seen(process, profile, pattern):
    """Whether something of `pattern` turned up, or was written again, before the process ended."""
    before = written(profile.parent, pattern)
    while process.is_alive():
        if written(profile.parent, pattern) - before:
            return True
        time.sleep(0.001)
    return False


def written(folder, pattern):
    """What there is of `pattern`, with the time of its last change."""
    found = set()
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # it has its final name now
            found.add((path, path.stat().st_mtime_ns))
    return found


def kill_at(profile, pattern, delay, jobs):
    """Whether `ipmn run` was killed, `delay` seconds after something of `pattern` turned up."""
    process = start(profile, jobs)
    if seen(process, profile, pattern):
        time.sleep(delay)
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def results(folder):
    """Every table, and of every run its numbers and weights, by name."""
    found = {path.name: path.read_bytes() for path in (folder / "kill" / "tables").iterdir()}
    for path in (folder / "kill" / "runs").rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix in (".parquet", ".csv"):
            found[name] = path.read_bytes()
        elif path.suffix == ".pt":
            found[name] = {k: v.numpy().tobytes() for k, v in torch.load(path, weights_only=True).items()}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder / "kill.yaml")
    process.join()
    assert process.exitcode == 0, (folder / "kill.log").read_text()[-3000:]
    return results(folder)


def test_a_run_killed_at_every_kind_of_moment_ends_as_one_that_was_not(undisturbed, tmp_path):
    rng, killed, profile = random.Random(0), Counter(), tmp_path / "kill.yaml"
    for moment, times in KILLS.items():
        for k in range(times):
            delay = 0.0 if "writing" in moment else rng.uniform(0, 0.1)
            jobs = 2 if k == 1 and "writing" not in moment else 1  # two workers take seconds more to start
            started = time.monotonic()
            killed[moment] += kill_at(profile, MOMENTS[moment], delay, jobs)
            print(f"{time.monotonic() - started:6.1f} s  {moment}, {jobs} job(s)", flush=True)
    print(dict(killed), "kills:", killed.total(), flush=True)
    assert killed.total() >= 20 and set(killed) == set(MOMENTS) and min(killed.values()) > 0
    last = start(profile, jobs=2)
    last.join()
    assert last.exitcode == 0, profile.with_suffix(".log").read_text()[-3000:]
    ours = results(tmp_path)
    assert ours.keys() == undisturbed.keys()
    assert [name for name in ours if ours[name] != undisturbed[name]] == []
    assert list(tmp_path.rglob("*.partial")) == [] and list(tmp_path.rglob("checkpoint.pt")) == []
    assert len(pd.read_csv(tmp_path / "kill" / "tables" / "table3.csv")) == 16


def refused(profile, **limits):
    """What a run that cannot go on says at its end, with exit status 1, leaving nothing half written."""
    process = start(profile, **limits)
    process.join()
    said = profile.with_suffix(".log").read_text()
    assert process.exitcode == 1 and "Traceback" not in said, said[-3000:]
    assert not [path for path in profile.parent.rglob("*.partial") if path.is_file()]
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("megabytes", "what"),
    [(3, r"cache/cubes32_\w+\.npy"), (6, r"runs/\w+/t2/\w+/fold\d/(model|checkpoint)\.pt")],
)
def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(tmp_path, megabytes, what):
    said = refused(tmp_path / "kill.yaml", largest_file=megabytes * 10**6)
    assert re.search(what + " cannot be written .*make room, or choose another folder", said)
    assert not list((tmp_path / "kill").rglob("run.json"))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "outputs", "/sys")
    said = refused(tmp_path / "kill.yaml")
    assert re.fullmatch(r"ipmn: /sys/kill: .* \(make room, or choose another folder\)", said)


def test_a_second_run_is_refused_until_the_first_has_ended_however_it_ends(tmp_path):
    profile = tmp_path / "kill.yaml"
    first = start(profile)
    assert seen(first, profile, "phantom/.*.partial")
    said = refused_while_another_works(profile)
    assert said.startswith(f"ipmn: another `ipmn run` is at work in {tmp_path}/kill; wait for its end")
    first.kill()
    first.join()
    third = start(profile)
    assert seen(third, profile, "cache/*.npy")
    third.kill()
    third.join()


def refused_while_another_works(profile):
    process = start(profile)
    process.join()
    assert process.exitcode == 1
    (said,) = (line for line in profile.with_suffix(".log").read_text().splitlines() if "ipmn: " in line)
    return said[said.index("ipmn: ") :]
