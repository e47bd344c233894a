import itertools
import os

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from project import Project

matplotlib.use("Agg")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The project in which the smoke profile ran, once for all tests and workers; not to be changed."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "smoke.lock"):
        project = Project(base / "smoke")
        if not project.root.exists():
            Project.new(project.root).start().wait()
    assert (project.folder / "report.html").is_file(), project.said[-3000:]
    return project


@pytest.fixture(scope="session", autouse=True)
def tiny_network():
    """Register the model "tiny", two convolutions with batch norm, in this process alone."""
    from torch import nn

    from ipmn_core import models

    def tiny(n_classes):
        first = nn.Conv3d(1, 4, 3, stride=4, padding=1), nn.BatchNorm3d(4), nn.ReLU()
        second = nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU()
        return nn.Sequential(*first, *second, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, n_classes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", tiny)
        yield


@pytest.fixture
def house_style():
    """Figures as the notebooks draw them, closed afterwards."""
    from ipmn_core import views

    with plt.rc_context():
        views.use_style()
        yield
        plt.close("all")


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory):
    """A phantom cohort, one case per center and class, second release's layout; not to be changed."""
    from ipmn_core import phantom

    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    return phantom.write(folder, max_per_cell=1, jobs=1, progress=False)


@pytest.fixture(scope="session")
def phantom_scans(phantom_root):
    from ipmn_core import data

    return data.read(phantom_root).scans


@pytest.fixture(scope="session")
def binary_predictions():
    """One epoch per run of two methods, two folds and three centers; AHN has no high risk on T2."""
    rng, rows = np.random.default_rng(0), []
    for m, arm, center in itertools.product(
        ("t1", "t2"), ("centralized", "fedprox_0.1"), ("NYU", "MCF", "AHN")
    ):
        for k in range(12):
            y = int(k % 3 == 0 and (center, m) != ("AHN", "t2"))
            p = float(np.clip(rng.normal(0.4 + 0.2 * y, 0.2), 0.01, 0.99))
            rows.append((f"{center}{k:02d}", center, m, "binary", arm, k // 6, 0, 1, y, 1 - p, p))
    columns = ["case_id", "center", "modality", "task", "arm", "fold", "seed", "epoch", "y_true"]
    return pd.DataFrame(rows, columns=[*columns, "prob_0", "prob_1"])


@pytest.fixture
def one_thread():
    """torch computes on one thread during the test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chromium():
    """One Chromium for all tests of a session; without one they skip, as `browser.lacking` says."""
    import browser

    path = browser.chromium()
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=browser.FLAGS)
        yield running
        running.close()
