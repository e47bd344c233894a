"""What test_browser.py needs: JupyterLab on loopback, Chromium, and the controls and pictures of live views.

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

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ipmn_core.views import live

ROOT = Path(__file__).parents[1]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FLAGS = ("--no-sandbox",)  # for root
ELSEWHERE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
SETTINGS = {  # every cell in the page, and neither questions nor answers about news
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def lacking(reason: str) -> NoReturn:
    """Skip the module that is being collected, or fail it if IPMN_BROWSER is `required`."""
    if os.environ.get("IPMN_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


try:  # of the extra `dev` only test_browser.py needs these two
    import psutil
    from playwright.sync_api import BrowserContext, Locator, Page
except ModuleNotFoundError as error:
    lacking(f"no {error.name}: pip install 'ipmn[dev]'")


def chromium() -> str:
    """The path of a Chromium; without one the module skips, as `lacking` says."""
    for path in filter(None, map(shutil.which, CHROMIUM)):
        return path
    lacking("no Chromium: apt-get install chromium")


def live_project(smoke: Path, folder: Path) -> Path:
    """Copy the project in which the smoke profile ran; its notebooks then name that profile."""
    shutil.copytree(smoke, folder)
    for path in (folder / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert text.count('profile = \\"demo\\"') == 1
        path.write_text(text.replace('profile = \\"demo\\"', 'profile = \\"smoke\\"'), encoding="utf-8")
    return folder


@dataclass
class Lab:
    """A JupyterLab that answers at `url` with `token`."""

    url: str
    token: str


@contextlib.contextmanager
def jupyter_lab(project: Path, home: Path) -> Iterator[Lab]:
    """Run JupyterLab with `project` as its root, and settings, kernels and HOME of its own below `home`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}/", secrets.token_hex())
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": project,
        "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",  # the other one asks PyPI
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (home / "lab.log").open("w") as log:
        server = psutil.Popen(command, cwd=project, env=_environment(lab, home), stdout=log, stderr=log)
    try:
        until(lambda: _answers(lab, server), seconds=60)
        yield lab
    finally:
        _stop(server)


def _environment(lab: Lab, home: Path) -> dict[str, str]:
    """The server's variables, without those of the user that Jupyter or matplotlib would read."""
    own = ("JUPYTER", "IPYTHON", "MPL", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    return kept | folders | {"HOME": str(home), "JUPYTER_TOKEN": lab.token}


def _answers(lab: Lab, server: psutil.Popen) -> bool:
    assert server.poll() is None, "JupyterLab ended"
    request = urllib.request.Request(
        f"{lab.url}api/kernelspecs", headers={"Authorization": f"token {lab.token}"}
    )
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
        return "python3" in json.loads(answer.read())["kernelspecs"]
    return False


def _stop(parent: psutil.Popen) -> None:
    """End a process, its kernels and their workers; a kernel is no member of its server's process group."""
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
    def asked(self) -> list[str]:
        """The requests besides files and data in the page itself."""
        return [url for url in self.requests if not url.startswith(("file:", "data:"))]

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


def write_page(path: Path, states: dict[str, dict]) -> Path:
    """Write a page of live views, their states by name, and return its path."""
    shown = [live.as_html({"view": view, "alt": view, "state": s}, PIXEL) for view, s in states.items()]
    text = f'<meta charset="utf-8"><style>{live.css()}</style>{"".join(shown)}'
    path.write_text(f'<!DOCTYPE html>{text}<script type="module">{live.module()}</script>', encoding="utf-8")
    return path


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


def views(page: Page, kind: str) -> Locator:
    """The live views of this kind in the outputs of a notebook or on the report."""
    return page.locator(f".ipmn-view[data-view={kind}]")


_PICTURES = """view => [...view.querySelectorAll('canvas, svg')]
    .map(one => one.tagName === 'CANVAS' ? one.toDataURL() : one.outerHTML)"""


def pictures(view: Locator) -> list[str]:
    """What the canvases and drawings of a view show: equal texts are equal pictures."""
    return view.evaluate(_PICTURES)


def act(view: Locator, do: Callable[[], object]) -> list[str]:
    """The pictures of a view after `do`, a key press, choice or click that changes one of them."""
    before = pictures(view)
    do()
    until(lambda: pictures(view) != before, seconds=30)
    return pictures(view)


def cut_off(view: Locator) -> list[str]:
    """What of a view reaches over its right edge, with the pixels."""
    edge = view.evaluate("view => view.parentElement.getBoundingClientRect().right")
    over = "items => items.map(item => [item.tagName, item.getBoundingClientRect().right])"
    items = view.locator("canvas, svg, select, button, table").filter(visible=True).evaluate_all(over)
    return [f"{tag}: {right - edge:.0f}" for tag, right in items if right > edge + 2]


def spread(element: Locator) -> float:
    """The standard deviation of an element's pixels as the page shows them, 0 to 1: 0 is one color."""
    return float(np.std(plt.imread(BytesIO(element.screenshot()))[..., :3]))


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    """Return once `true()` holds. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
