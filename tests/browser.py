"""What tests in Chromium share: Chromium, JupyterLab on loopback, live views and their pictures."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time

import pytest

from ipmn_core.views import live

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox",)  # for root
ELSEWHERE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
SETTINGS = {  # every cell in the page, and neither questions nor answers about news
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def lacking(reason):
    """Skip the module that is being collected, or fail it if IPMN_BROWSER is `required`."""
    if os.environ.get("IPMN_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


try:  # of the extra `dev` only the tests in Chromium need these two
    import playwright.sync_api  # noqa: F401
    import psutil
except ModuleNotFoundError as error:
    lacking(f"no {error.name}: pip install 'ipmn[dev]'")


def chromium():
    """The path of a Chromium; without one the module skips, as `lacking` says."""
    for path in filter(None, map(shutil.which, CHROMIUM)):
        return path
    lacking("no Chromium: apt-get install chromium")


# ---- JupyterLab


def live_project(smoke, folder):
    """Copy the project in which the smoke profile ran; its notebooks then name that profile."""
    shutil.copytree(smoke, folder)
    for path in (folder / "notebooks").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert text.count('profile = \\"demo\\"') == 1
        path.write_text(text.replace('profile = \\"demo\\"', 'profile = \\"smoke\\"'), encoding="utf-8")
    return folder


@contextlib.contextmanager
def jupyter_lab(project, home):
    """Run JupyterLab in `project` with HOME `home`; yields a notebook's address, `{stem}` for its name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",  # the other one asks PyPI
    }
    overrides = home / ".jupyter" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    own = ("JUPYTER", "IPYTHON", "MPL", "XDG_")  # variables by which the user's settings would be read
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    token = secrets.token_hex()
    environment |= {"HOME": str(home), "JUPYTER_TOKEN": token}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (home / "lab.log").open("w") as log:
        server = psutil.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: _listens(port), seconds=60)
        yield f"http://127.0.0.1:{port}/lab/workspaces/{{stem}}/tree/notebooks/{{stem}}.ipynb?token={token}"
    finally:
        _stop(server)


def _listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def _stop(server):
    """End the server, its kernels and their workers; a kernel is no member of its server's process group."""
    everyone = [server, *server.children(recursive=True)]
    server.terminate()
    _, left = psutil.wait_procs(everyone, timeout=10)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


_PANEL = "window.jupyterapp?.shell.currentWidget?"
_IDLE = f"{_PANEL}.sessionContext?.session?.kernel?.status === 'idle'"
_RUN_ALL = """() => {
    window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true })
}"""


def open_notebook(context, lab, stem):
    """A page with the notebook open in JupyterLab, in a separate workspace, with its kernel ready."""
    page = context.new_page()
    page.goto(lab.format(stem=stem))
    page.wait_for_function(_IDLE, timeout=120_000)
    return page


def run_all(pages):
    """The code cells of each live notebook after "Run All Cells" in all, once the kernels are idle again."""
    for page in pages:
        page.evaluate(_RUN_ALL)
    for page in pages:
        page.wait_for_function(f"window.ran && {_IDLE}", timeout=480_000)
    notebooks = [page.evaluate(f"{_PANEL}.content.model.sharedModel.toJSON()") for page in pages]
    return [[cell for cell in notebook["cells"] if cell["cell_type"] == "code"] for notebook in notebooks]


# ---- pages and views


def listen(context):
    """The console errors and the requests of all pages of `context` from now on, two lists.

    Requests for files and for data in the page itself are left out; those for another host are cut off.
    """
    errors, requests = [], []
    context.on("request", lambda one: one.url.startswith(("file:", "data:")) or requests.append(one.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda line: line.type == "error" and errors.append(line.text))
    context.on("page", lambda page: page.on("websocket", lambda ws: requests.append(ws.url)))
    context.route(ELSEWHERE, lambda route: route.abort())
    return errors, requests


def write_page(path, states):
    """Write a page of live views, their states by name, and return its path."""
    # sorted as in a notebook's file
    kept = {view: json.loads(json.dumps(s, sort_keys=True)) for view, s in states.items()}
    shown = [live.as_html({"view": view, "alt": view, "state": s}, PIXEL) for view, s in kept.items()]
    text = f'<meta charset="utf-8"><style>{live.css()}</style>{"".join(shown)}'
    path.write_text(f'<!DOCTYPE html>{text}<script type="module">{live.module()}</script>', encoding="utf-8")
    return path


def views(page, kind):
    """The live views of this kind on a page or in the outputs of a notebook."""
    return page.locator(f".ipmn-view[data-view={kind}]")


def pictures(view):
    """What the canvases and drawings of a view show: equal texts are equal pictures."""
    text = "one => one.tagName === 'CANVAS' ? one.toDataURL() : one.outerHTML"
    return view.locator("canvas, svg").evaluate_all(f"all => all.map({text})")


def act(view, do):
    """The pictures of a view after `do`, a key press, choice or click that changes one of them."""
    before = pictures(view)
    do()
    until(lambda: pictures(view) != before, seconds=30)
    return pictures(view)


def cut_off(view):
    """What of a view reaches over its right edge, with the pixels."""
    edge = view.evaluate("view => view.parentElement.getBoundingClientRect().right")
    over = "items => items.map(item => [item.tagName, item.getBoundingClientRect().right])"
    items = view.locator("canvas, svg, select, button, table").filter(visible=True).evaluate_all(over)
    return [f"{tag}: {right - edge:.0f}" for tag, right in items if right > edge + 2]


def until(true, seconds=10):
    """Return once `true()` holds. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
