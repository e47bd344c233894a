"""What test_browser.py needs: a smoke project, JupyterLab on loopback, Chromium, and eyes for the live views.

Controls are found by role and description, as a person finds them, not by the classes of a library.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # root; WebGL without GPU
FEWER = {  # not 20 runs, 6, of the smallest network
    "three_class_models": ["shufflenetv2"],
    "binary_model": "shufflenetv2",
    "arms": ["centralized", "fedprox_0.1"],
}
ELSEWHERE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
SETTINGS = {  # every cell in the page, and neither questions nor answers about news
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def lacking(reason: str) -> NoReturn:
    """Skips the module that is being collected, or fails it if IPMN_BROWSER says `required`."""
    if os.environ.get("IPMN_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


try:  # of the extra `dev` only test_browser.py needs these two
    import psutil
    from playwright.sync_api import BrowserContext, Locator, Page, expect
except ModuleNotFoundError as error:
    lacking(f"no {error.name}: pip install 'ipmn[dev]'")


def chromium() -> str:
    """The path of a Chromium; without one the module skips, as `lacking` says."""
    for path in filter(None, map(shutil.which, CHROMIUM)):
        return path
    lacking("no Chromium: apt-get install chromium")


def smoke_project(folder: Path) -> Path:
    """`folder`, a project of its own: notebooks and `params/smoke.yaml`, both with the values of `FEWER`."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "params").mkdir()
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text()) | FEWER
    (folder / "params" / "smoke.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        cell.source = "\n".join(f"{key} = {value!r}" for key, value in values.items())
        nbformat.write(notebook, path)
    return folder


@dataclass
class Running:
    """An `ipmn run` of the smoke profile at work in `project`."""

    project: Path
    process: psutil.Popen

    @property
    def said(self) -> str:
        """The end of what it printed."""
        return (self.project / "ipmn.log").read_text()[-700:]

    def copy_trained(self, folder: Path) -> Path:
        """`folder`, a second project with all it trained; it goes on with the notebooks in the meantime."""
        notebooks = self.project / "outputs" / "smoke" / "notebooks"  # made once all is trained
        until(lambda: notebooks.exists() or self.process.poll() is not None, seconds=600)
        assert notebooks.exists(), self.said
        written = shutil.ignore_patterns("notebooks", "tables", "figures", ".lock", "report.html")
        shutil.copytree(self.project / "outputs", smoke_project(folder) / "outputs", ignore=written)
        return folder

    def finish(self) -> Path:
        """The project, once the run has ended as it should."""
        assert self.process.wait(timeout=600) == 0, self.said
        return self.project


@contextlib.contextmanager
def ipmn_run(project: Path) -> Iterator[Running]:
    """Trains and executes the smoke profile as a user would; it is ended with the block."""
    command = [sys.executable, "-m", "ipmn_core.cli", "run", "params/smoke.yaml"]
    with (project / "ipmn.log").open("w") as log:
        running = Running(project, psutil.Popen(command, cwd=project, stdout=log, stderr=log))
    try:
        yield running
    finally:
        _stop(running.process)


@dataclass
class Lab:
    """A JupyterLab that answers at `url` with `token`."""

    url: str
    token: str

    def ask(self, path: str) -> bytes:
        """The body of the server's answer. Raises OSError if there is none."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()


@contextlib.contextmanager
def jupyter_lab(project: Path, home: Path) -> Iterator[Lab]:
    """JupyterLab with `project` as its root, and with settings, kernels and HOME of its own below `home`."""
    lab = Lab(f"http://127.0.0.1:{_free_port()}/", secrets.token_hex())
    with (home / "lab.log").open("w") as log:
        server = psutil.Popen(
            _command(lab, project), cwd=project, env=_environment(lab, home), stdout=log, stderr=log
        )
    try:
        _wait_for(lab, server, home / "lab.log")
        yield lab
    finally:
        _stop(server)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _command(lab: Lab, project: Path) -> list[str]:
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": urlsplit(lab.url).port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": project,
        "ServerApp.allow_root": True,
        "ServerApp.terminals_enabled": False,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",  # the other one asks PyPI
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "jupyter", "lab", "--no-browser", *flags]


def _environment(lab: Lab, home: Path) -> dict[str, str]:
    """The variables of the server, without those of the user that Jupyter or matplotlib would heed."""
    own = ("JUPYTER", "IPYTHON", "MPL", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    return kept | folders | {"HOME": str(home), "JUPYTER_TOKEN": lab.token}


def _wait_for(lab: Lab, server: psutil.Popen, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            assert "python3" in json.loads(lab.ask("api/kernelspecs"))["kernelspecs"]
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def _stop(parent: psutil.Popen) -> None:
    """Ends a process, its kernels and their workers; a kernel is no member of its server's process group."""
    everyone = [parent]
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
        everyone += parent.children(recursive=True)
        parent.terminate()
    _, left = psutil.wait_procs(everyone, timeout=10)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(left, timeout=5)
    assert not left, f"still running: {left}"


@dataclass
class Noise:
    """What pages did besides showing something: errors in the console, and requests."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def elsewhere(self) -> list[str]:
        """The requests to other hosts than 127.0.0.1."""
        return [url for url in self.requests if ELSEWHERE.match(url)]


def listen(context: BrowserContext) -> Noise:
    """The noise of all pages of `context`, noted from now on; what asks for another host is cut off."""
    noise = Noise()
    context.on("request", lambda request: noise.requests.append(request.url))
    context.on("weberror", lambda error: noise.errors.append(str(error.error)))
    context.on("console", lambda line: line.type == "error" and noise.errors.append(_line(line)))
    context.on("page", lambda page: page.on("websocket", lambda ws: noise.requests.append(ws.url)))
    context.route(ELSEWHERE, lambda route: route.abort())
    return noise


def _line(message) -> str:
    return f"{message.text} ({message.location.get('url', '')})"


def open_notebook(context: BrowserContext, lab: Lab, stem: str) -> Page:
    """A page with the notebook open in JupyterLab, in a workspace of its own, its kernel ready."""
    page = context.new_page()
    page.goto(f"{lab.url}lab/workspaces/{stem}/tree/notebooks/{stem}.ipynb?token={lab.token}")
    page.wait_for_function(f"window.jupyterapp?.shell.currentWidget?.{_STATUS} === 'idle'", timeout=120_000)
    return page


_PANEL = "window.jupyterapp.shell.currentWidget"
_STATUS = "sessionContext?.session?.kernel?.status"
_RUN_ALL = """() => {
    window.ran = false
    window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true })
}"""


def run_all(pages: Sequence[Page], seconds: float = 480) -> list[list[dict]]:
    """The code cells of each live notebook after "Run All Cells" in all, once the kernels are idle again."""
    for page in pages:
        page.evaluate(_RUN_ALL)
    for page in pages:
        page.wait_for_function(f"window.ran && {_PANEL}.{_STATUS} === 'idle'", timeout=seconds * 1000)
    notebooks = [page.evaluate(f"{_PANEL}.content.model.sharedModel.toJSON()") for page in pages]
    return [[cell for cell in notebook["cells"] if cell["cell_type"] == "code"] for notebook in notebooks]


def output_with(page: Page, *controls: str | Locator) -> Locator:
    """The output of the one cell that has these controls, or controls so described."""
    found = page.locator(".jp-OutputArea-output")
    for one in controls:
        found = found.filter(has=page.get_by_text(one, exact=True) if isinstance(one, str) else one)
    expect(found).to_have_count(1, timeout=10_000)
    found.scroll_into_view_if_needed()
    return found


def control(view: Locator, description: str) -> Locator:
    """The control of a view that stands beside `description`: the first, should a nested view have one."""
    return view.get_by_text(description, exact=True).filter(visible=True).first.locator("xpath=..")


def choose(view: Locator, description: str, option: str) -> None:
    """Chooses `option` in the list, or presses that of the buttons, described so."""
    found = control(view, description)
    if found.locator("select").count():
        found.locator("select").select_option(option)
    else:
        found.get_by_role("button", name=option, exact=True).click()


def options(view: Locator, description: str) -> list[str]:
    """What the list described so offers."""
    return control(view, description).locator("option").all_inner_texts()


def sliders(view: Locator) -> list[Locator]:
    """The handles of all sliders of a view that are to be seen, from top to bottom."""
    return view.get_by_role("slider").filter(visible=True).all()


_PIXELS = """images => images.map(image => {
    if (!image.complete || !image.naturalWidth) return ''
    const canvas = document.createElement('canvas')
    canvas.width = image.naturalWidth
    canvas.height = image.naturalHeight
    canvas.getContext('2d').drawImage(image, 0, 0)
    return canvas.toDataURL()
})"""


def pictures(view: Locator) -> list[str]:
    """What the visible `img` of a view show, as data URIs: equal texts are equal pixels, "" is no picture."""
    return view.locator("img").filter(visible=True).evaluate_all(_PIXELS)


def cut_off(view: Locator) -> list[str]:
    """The visible pictures, controls and tables that reach over the right edge of a view, with the pixels."""
    edge = view.evaluate("view => view.getBoundingClientRect().right")
    over = "items => items.map(item => [item.tagName, item.getBoundingClientRect().right])"
    items = view.locator("img, select, button, table").filter(visible=True).evaluate_all(over)
    return [f"{tag}: {right - edge:.0f}" for tag, right in items if right > edge + 2]


_CLOCK = """view => {
    const times = window.times = {}
    for (const act of ['keydown', 'change', 'click'])
        view.addEventListener(act, event => { times.acted = event.timeStamp }, true)
    view.addEventListener('load', event => { times.shown = event.timeStamp }, true)
}"""


def seconds_to_picture(view: Locator, act: Callable[[], None]) -> float:
    """Seconds from the key press, choice or click that `act` is to the last picture it brings.

    By the page's own clock, so that the test's own share is not counted.
    """
    view.evaluate(_CLOCK)
    act()
    page = view.page
    page.wait_for_function("window.times.shown > window.times.acted", timeout=30_000)
    page.wait_for_function(f"{_PANEL}.{_STATUS} === 'idle'")  # by then it has sent every picture
    page.wait_for_timeout(100)
    return page.evaluate("(window.times.shown - window.times.acted) / 1000")


def spread(element: Locator) -> float:
    """The standard deviation of an element's grey values as the page shows them, 0 to 1: 0 is one color."""
    return float(np.std(plt.imread(BytesIO(element.screenshot()))[..., :3]))


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Returns once `true()` holds. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
