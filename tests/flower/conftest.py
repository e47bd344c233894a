import types

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from hospitals import SITES, Hospitals, federation_in, nodes_of, profile, serve, write_phantom

from ipmn_core.flower import app, demo, site


@pytest.fixture(scope="module", autouse=True)
def a_process_of_flowers():
    """As Flower prepares a server app's process; the threads that training sets are put back.

    A process for each message reads a site's cases anew; here they are read once per folder and fold.
    """
    threads, read, cases = torch.get_num_threads(), site.Site.cohort.func, {}

    def cohort(at):
        key = (at.center, at.p.data, at.settings.fold)
        cases[key] = cases[key] if key in cases else read(at)
        return cases[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.Site, "cohort", property(cohort))
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def clock():
    """The server's clock: sleeping takes no time."""
    now = types.SimpleNamespace(time=0.0)
    sleep = lambda seconds: setattr(now, "time", now.time + seconds)  # noqa: E731
    instead = types.SimpleNamespace(monotonic=lambda: now.time, sleep=sleep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "time", instead)
        yield now


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """The folder with all hospitals' cases; `data` beside it has a folder for each."""
    root = write_phantom(tmp_path_factory.mktemp("federation") / "together", SITES)
    for name, n in SITES.items():
        write_phantom(root.parent / "data" / name, {name: n})
    return root


@pytest.fixture
def nodes(together, tmp_path):
    """Each hospital's own configuration."""
    return nodes_of(together, tmp_path / "work")


@pytest.fixture
def p(together, request):
    """A profile of the test's own; all tests share the folder of cubes."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:90]
    return lambda **changes: profile(together.parent / "server", profile=name, data=str(together), **changes)


@pytest.fixture(scope="module")
def trained(together, tmp_path_factory):
    """A whole run at the hospitals and in one process, with what was sent."""
    work = tmp_path_factory.mktemp("work")
    p, grid = profile(together.parent / "server", data=str(together)), Hospitals(nodes_of(together, work))
    there, here = serve(grid, p), demo.in_process(p, SITES)
    return types.SimpleNamespace(grid=grid, there=there, here=here, work=work)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return federation_in(tmp_path_factory.mktemp("federation") / "f")


@pytest.fixture
def written(tmp_path):
    """A federation whose files a test may spoil."""
    return federation_in(tmp_path / "f")
