import types

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from hospitals import SITES, profile, tiny_net, write_phantom, written_to

from ipmn_core import models, phantom
from ipmn_core.flower import app


@pytest.fixture(scope="module", autouse=True)
def a_process_of_flowers():
    """As Flower prepares a server app's process; the threads that training sets are put back."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny_net", lambda n_classes: tiny_net())
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def clock():
    """The server's clock: sleeping takes no time."""
    now = types.SimpleNamespace(time=0.0)
    sleep = lambda seconds: setattr(now, "time", now.time + seconds)  # noqa: E731
    instead = types.SimpleNamespace(monotonic=lambda: now.time, perf_counter=lambda: now.time, sleep=sleep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "time", instead)
        yield now


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """The folder with all hospitals' cases."""
    return write_phantom(tmp_path_factory.mktemp("federation") / "together", SITES)


@pytest.fixture(scope="session")
def nodes(together):
    """Each hospital's own configuration; all tests share the work folders, runs differ by token."""
    folders, work = phantom.split(together, together.parent / "data", SITES), together.parent / "work"
    return {n: {"site": n, "data": str(folders[n]), "outputs": str(work / n)} for n in SITES}


@pytest.fixture
def p(together, request):
    """A profile of the test's own; all tests share the folder of cubes."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:90]
    return lambda **changes: profile(together.parent / "server", profile=name, data=str(together), **changes)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return written_to(tmp_path_factory.mktemp("federation"), away="continue")


@pytest.fixture
def written(tmp_path):
    """A federation whose files a test may spoil."""
    return written_to(tmp_path)
