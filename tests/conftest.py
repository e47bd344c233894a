import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")


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
    """A phantom cohort with one case a center and class, second release's layout; not to be changed."""
    from ipmn_core import phantom

    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    return phantom.write(folder, max_per_cell=1, jobs=1, progress=False)


@pytest.fixture(scope="session")
def phantom_scans(phantom_root):
    from ipmn_core import data

    return data.read(phantom_root)


@pytest.fixture(scope="session")
def binary_predictions():
    """One epoch a run of two methods, two folds and three centers; at AHN nobody has high risk on T2."""
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
    """One Chromium without a network for all tests of a session; they skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    import browser

    path = browser.chromium()  # skips without one
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


def pytest_terminal_summary(terminalreporter):
    """What tests measured (`record_property("measured", ...)`), one line each, under -q too."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(value)
