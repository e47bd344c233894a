"""`ipmn bench --growth`: what more scans, cases and clients cost, in seconds and memory."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ipmn_core import bench, cohort, federated, inference, machine, models, phantom, preprocess, training

SCANS = (100, 1_000, 10_000)
CASES = (1_000, 10_000, 100_000)
CLIENTS = (7, 70)


def run() -> dict:
    """`rows` of what, size, seconds, gigabytes: each measured once, in a process of its own.

    The gigabytes are the peak of that process less what it held before, its imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        roots = {n: Path(folder) / str(n) for n in SCANS}
        for n, root in roots.items():
            bench.apart(write_cohort, root, n)
        calls = [
            *((what, n, _cohort, (roots[n], what)) for what in ("index", "check", "folds") for n in SCANS),
            *((what, n, _interval, (n, what)) for what in ("DeLong", "bootstrap") for n in CASES),
            *(("FedAvg round, clients", n, _round, (n,)) for n in CLIENTS),
        ]
        rows = []
        for what, size, function, arguments in tqdm(calls, "growth", unit="measurement"):
            (seconds, before), peak = bench.apart(function, *arguments)
            rows.append({"what": what, "size": size, "seconds": seconds, "gigabytes": peak - before})
    return {"machine": bench.about_machine(), "rows": pd.DataFrame(rows).round(4).to_dict("records")}


def _started() -> tuple[float, float]:
    return time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_cohort(root: Path, n: int) -> None:
    """Writes a first-release T2 cohort of `n` scans: links to one ROI, labels 0 to 2 in every center."""
    phantom.write(root.with_name(f"one for {n}"), layout="first", max_per_cell=1, progress=False)
    roi = next((root.with_name(f"one for {n}") / "t2_clean_ROI").iterdir())
    folder = root / "t2_clean_ROI"
    folder.mkdir(parents=True)
    names = [f"{cohort.CENTERS[i % 7]}_{i:05d}" for i in range(n)]
    for name in names:
        os.link(roi, folder / f"{name}.nii.gz")
    sheet = pd.DataFrame({"Patient ID": names, "Age": 60, "Sex": "F", "Center": "", "Modality": "T2"})
    sheet = sheet.assign(**{"Risk assessment": [i // 7 % 3 for i in range(n)]})
    sheet.to_excel(root / "IPMN_labels_t2_total.xlsx", index=False)


def _cohort(root: Path, step: str) -> tuple[float, float]:
    """Indexing reads sheet and folders, a check every voxel as well, folds deal the cases."""
    scans = cohort.read(root) if step == "folds" else None
    started, before = _started()
    if step == "folds":
        cohort.assign_folds(scans, 5)
    else:
        scans, _ = cohort.inspect(root)
        if step == "check":
            preprocess.volume_problems(scans)
    return time.perf_counter() - started, before


def _interval(n: int, kind: str) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    score = rng.random(n) + 0.5 * y
    centers, fold = np.array(cohort.CENTERS)[np.arange(n) % 7], np.arange(n) // 14 % 4
    rows = pd.DataFrame({"case_id": np.arange(n), "center": centers, "fold": fold, "y_true": y})
    rows = rows.assign(task="binary", prob_0=1 - score / 2, prob_1=score / 2)
    started, before = _started()
    if kind == "DeLong":
        inference.auc_interval(y, score)
    else:
        inference.bootstrap_auc(rows, n_resamples=200)
    return time.perf_counter() - started, before


def _round(n_clients: int) -> tuple[float, float]:
    """One FedAvg round of DenseNet-121 at 32^3, four cases a client."""
    machine.prepare(0)
    started, before = _started()
    case = bench.Case("densenet121", 32, 4, 4, "fedavg")
    settings = bench.settings_for(case, machine.has_bfloat16(torch.device("cpu")), True)
    model = models.build(case.model, 2).to(memory_format=torch.channels_last_3d)
    places = torch.arange(4 * n_clients)
    data = training.Cases(torch.rand(len(places), 1, 32, 32, 32).half(), places % 2)
    clients = {str(k): own for k, own in enumerate(places.split(4))}
    started = time.perf_counter()
    next(federated.fit(model, clients, [places[:4]], data, settings, federated.strategy(case.arm)))
    return time.perf_counter() - started, before
