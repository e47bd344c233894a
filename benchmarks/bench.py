"""Time this package against the plain pipeline on one machine: `python benchmarks/bench.py`.

Each side of a case runs in its own process, warmed up with one batch. The sides alternate, and the result is
the median of the repeats. A ratio above 1 is in our favor. A strategy that the plain pipeline lacks is
compared with our own round of FedAvg, so its ratio is its cost. `docs/performance.md` discusses the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import plain
import torch
from tqdm import tqdm

from ipmn_core import federated, models, phantom
from ipmn_core.data import load_cubes, read
from ipmn_core.federated import device
from ipmn_core.names import CENTERS
from ipmn_core.params import Preprocessing

COLUMNS = ["case", "unit", "plain", "ours", "ratio"]
LESS_IS_BETTER = ("s", "s/sample", "GB")
GEMM = 2048  # edge of the matrices multiplied
STEPS = ("cubes in memory", "+ channels-last", "+ memory kept", "+ bfloat16")  # each includes the former


@dataclass(frozen=True)
class Case:
    """An epoch of `model` on `n` cubes of `size`^3, or a round of `arm` with `n` cubes per center."""

    model: str
    size: int
    n: int
    batch_size: int
    arm: str | None = None
    step: str = STEPS[-1]

    @property
    def name(self) -> str:
        """Model or arm, size, and our step if it is not the last."""
        step = "" if self.step == STEPS[-1] else f", {self.step}"
        beside = " beside our FedAvg" if self.arm in BEYOND else ""
        return f"{self.arm or self.model} {self.size}^3{beside}{step}"


BEYOND = ("fedbn", "fedavg_bn_local", "fedavg_bn_recomputed", "fedadam", "scaffold", "ditto_0.1")
CASES = (
    Case("densenet121", 32, 32, 16),
    Case("resnet34", 32, 16, 16),
    Case("densenet121", 32, 4, 4, "fedavg"),
    Case("densenet121", 32, 4, 4, "fedprox_0.1"),
    Case("densenet121", 96, 16, 16),
    Case("resnet34", 96, 4, 4),
    Case("densenet121", 96, 8, 8, "fedprox_0.1"),
    *(Case("densenet121", 96, 4, 4, step=step) for step in STEPS[:-1]),
    *(Case("densenet121", 32, 4, 4, arm) for arm in BEYOND),
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; with `--json` also write it."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.partition(":")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="median of N (default: 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options = parser.parse_args(arguments)
    names = [*(case.name for case in CASES), "preprocessing"]
    if not any(options.only in name for name in names):
        parser.error(f"no case is called {options.only!r}; there are {', '.join(names)}")
    results = run(options.only, options.repeats, options.jobs)
    print("matrix product:", *(f"{v:.0f} GFLOP/s {k}" for k, v in results["gemm_gflops"].items()))
    print(pd.DataFrame(results["rows"]).to_markdown(index=False, floatfmt=".4g"))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def run(only: str = "", repeats: int = 3, jobs: int = 2) -> dict:
    """Time the cases whose name contains `only`: `rows` of COLUMNS, `gemm_gflops` by dtype, `machine`.

    Writes a small phantom cohort to a temporary folder first.
    """
    has_bfloat16 = device.has_bfloat16(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("first", "second"):
            phantom.write(Path(folder) / layout, layout=layout, max_per_cell=2, jobs=jobs, progress=False)
        rows = list(_preprocessing(Path(folder), repeats, jobs)) if only in "preprocessing" else []
        gemm = {dtype: apart(_gemm, dtype)[0] for dtype in ("float32", "bfloat16")[: 1 + has_bfloat16]}
        for case in tqdm([case for case in CASES if only in case.name], "bench", unit="case"):
            rows += _beside(case, Path(folder), repeats)
    about = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16,
        "torch": torch.__version__,
    }
    table = pd.DataFrame(rows, columns=COLUMNS).round(4)
    return {"machine": about, "gemm_gflops": gemm, "rows": table.to_dict("records")}


def _beside(case: Case, folder: Path, repeats: int) -> Iterator[tuple]:
    """The rows of one case: time, memory and, for an epoch, the rate of its multiplications."""
    sides = {"plain": (_plain, case, folder), "ours": (_ours, case, folder)}
    if case.arm in BEYOND:
        sides["plain"] = (_ours, replace(case, arm="fedavg"), folder)
    measured = [{side: apart(*call) for side, call in sides.items()} for _ in range(repeats)]
    seconds, gigabytes = (
        {side: statistics.median(m[side][k] for m in measured) for side in sides} for k in (0, 1)
    )
    unit = "s" if case.arm else "s/sample"
    yield _row(case.name, unit, **seconds)
    yield _row(f"{case.name}, peak memory", "GB", **gigabytes)
    if not case.arm:
        gflop = 6 * models.complexity(case.model, 2, case.size)[0]  # 2 per MAC; backward counts twice
        yield _row(f"{case.name}, rate", "GFLOP/s", **{side: gflop / s for side, s in seconds.items()})


def _row(name: str, unit: str, plain: float, ours: float) -> tuple:
    return name, unit, plain, ours, plain / ours if unit in LESS_IS_BETTER else ours / plain


def apart(function: Callable, *arguments) -> tuple[float, float]:
    """Result of `function` (seconds or a rate) and peak memory in GB, in a separate process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured, function, arguments).result()


def _measured(function: Callable, arguments: tuple) -> tuple[float, float]:
    value = function(*arguments)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())  # Linux only
    return value, int(peak[1]) * 1024 / 1e9 if peak else float("nan")


def _gemm(dtype: str) -> float:
    """GFLOP/s of the product of two square matrices, the best of ten."""
    a, b = (torch.rand(GEMM, GEMM).to(getattr(torch, dtype)) for _ in "ab")
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2e-9 * GEMM**3 / min(seconds)


def chosen_scans(case: Case, folder: Path) -> pd.DataFrame:
    """The case's scans of the cohort in `folder`: `n`, or for an arm `n` per center, ordered by center."""
    scans = read(folder / "first").scans
    scans = scans[scans["modality"] == "t2"]
    if case.arm:
        scans = scans.groupby("center", sort=False).head(case.n)
        scans = scans.sort_values("center", key=lambda c: c.map(CENTERS.index), kind="stable")
    else:
        scans = scans.head(case.n)
    return scans.assign(target=(scans["label"] == 2).astype(int)).reset_index(drop=True)


def settings_for(case: Case, bfloat16: bool, channels_last: bool) -> federated.Settings:
    """The paper's protocol for one epoch or round of `case`."""
    protocol = {"epochs": 1, "local_epochs": 1, "batches_per_epoch": None, "lr": 1e-3, "weight_decay": 0.01}
    protocol |= {"lr_step": 30, "lr_gamma": 0.1, "augment_prob": 0.1, "seed": (0,)}
    on_machine = {"bfloat16": bfloat16, "channels_last": channels_last}
    return federated.Settings(batch_size=case.batch_size, **protocol, **on_machine)


def _plain(case: Case, folder: Path) -> float:
    scans, seconds = chosen_scans(case, folder), []
    model = models.build(case.model, 2)
    parts = [rows for _, rows in scans.groupby("center", sort=False)] if case.arm else [scans]
    batches = [plain.loader(rows["image"], rows["target"], case.size, case.batch_size, 0.1) for rows in parts]
    clients = [copy.deepcopy(model) for _ in parts]
    optimizers = [plain.optimizer_of(client) for client in clients]
    mu = federated.strategy(case.arm).mu if case.arm else 0.0
    for of_clients in ([[next(iter(batches[0]))]], batches):  # a warm-up of one batch, then all
        started = time.perf_counter()
        if case.arm and of_clients is batches:
            plain.federated_round(model, clients, optimizers, batches, [len(rows) for rows in parts], mu)
        else:
            plain.train_epoch(clients[0], optimizers[0], of_clients[0], mu, model)
        seconds.append(time.perf_counter() - started)
    return seconds[-1] / (1 if case.arm else len(scans))


def _ours(case: Case, folder: Path) -> float:
    step = STEPS.index(case.step)
    if step >= 2:
        federated.prepare(0)
    scans = chosen_scans(case, folder)
    cubes, _ = load_cubes(
        scans, Preprocessing(case.size), folder / "cache"
    )  # read once, which `preprocessing` times
    y = torch.tensor(scans["target"].to_numpy())
    cases = federated.Cases(torch.tensor(cubes).unsqueeze(1), y)
    bfloat16 = device.has_bfloat16(torch.device("cpu")) and case.model not in models.DEPTHWISE
    settings = settings_for(case, bfloat16 and step >= 3, case.model in models.CHANNELS_LAST and step >= 1)
    model = models.build(case.model, 2)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last_3d)
    places = {c: torch.tensor(rows.index.to_numpy()) for c, rows in scans.groupby("center", sort=False)}
    everyone = torch.cat(list(places.values()))
    warm_up = federated.Learner("warm-up", model, everyone[: case.batch_size], settings)
    federated.train_epoch(model, warm_up, cases, settings, (1,))
    if case.arm:
        one = {next(iter(places)): everyone[:1]}
        strategy = federated.strategy(case.arm)
        started = time.perf_counter()  # includes drift and one test case, which the plain side omits
        next(federated.fit_federated(model, places, one, cases, settings, strategy))
        return time.perf_counter() - started
    learner = federated.Learner("all", model, everyone, settings)
    started = time.perf_counter()
    federated.train_epoch(model, learner, cases, settings, (2,))
    return (time.perf_counter() - started) / len(everyone)


def _preprocessing(folder: Path, repeats: int, jobs: int) -> Iterator[tuple]:
    scans, size = read(folder / "second").scans, 96
    sides = {"plain": (_plain_cubes, scans, size), "ours": (_our_cubes, scans, size, jobs)}
    measured = [{side: apart(*call)[0] for side, call in sides.items()} for _ in range(repeats)]
    yield _row("preprocessing", "volumes/s", **{s: statistics.median(m[s] for m in measured) for s in sides})


def _plain_cubes(scans: pd.DataFrame, size: int) -> float:
    plain.cube(scans["image"].iloc[0], scans["mask"].iloc[0], size)  # a warm-up
    started = time.perf_counter()
    for scan in scans.itertuples():
        plain.cube(scan.image, scan.mask, size)
    return len(scans) / (time.perf_counter() - started)


def _our_cubes(scans: pd.DataFrame, size: int, jobs: int) -> float:
    federated.prepare(0)
    with tempfile.TemporaryDirectory() as cache:
        load_cubes(scans.head(1), Preprocessing(size), cache, jobs)  # a warm-up
        started = time.perf_counter()
        load_cubes(scans, Preprocessing(size), cache, jobs)
        return len(scans) / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
