import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from ipmn_core import fetch

SHA = "0123456789abcdef" * 2 + "01234567"  # the revision
BODY = bytes(range(256)) * 1000
PAGE, API = "https://huggingface.co/datasets/phy710/Cyst-X", "/api/datasets/phy710/Cyst-X"
SPLIT = "data splits/classification/2-class/t1.csv"


def release():
    """Path -> content of a small release."""
    files = {"README.md": b"the card", "data splits/pansegnet segmentation/t1.csv": b"none of ours"}
    for m in ("t1", "t2"):
        files[f"data splits/classification/2-class/{m}.csv"] = f"name,fold\n{m},0\n".encode()
        files[f"IPMN_Classification/IPMN_labels_{m}_total.xlsx"] = f"sheet of {m}".encode()
        images = f"IPMN_images_masks/{m}"
        for folder in (f"IPMN_Classification/{m}", f"{images}/images", f"{images}/masks"):
            paths = [f"{folder}/NYU_{i}[{m}].nii.gz" for i in range(4)]  # brackets: a pattern has them, too
            files |= {path: path.encode() + BODY for path in paths}
    return dict(sorted(files.items()))


class Hub(ThreadingHTTPServer):
    """The hub on one machine: the data set's card, its list in two pages, its files, and faults."""

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url, self.card = root, f"http://127.0.0.1:{self.server_port}", {"license": "mit"}
        self.files = release()
        self.listed = {path: entry(path, body) for path, body in self.files.items()}
        self.faults, self.asked, self.stuck = {}, [], threading.Event()  # path -> what to do instead, once

    def got(self):  # the files requested, in order
        return [path for path in self.asked if path in self.files]

    def fetch(self, *parts, ask=lambda facts: True, **options):
        return fetch.fetch(self.root, ask, parts or fetch.DEFAULT, endpoint=self.url, **options)

    def command(self, *arguments):
        """`ipmn fetch --yes` in a separate process."""
        env = os.environ | {"HF_ENDPOINT": self.url, "HF_HOME": f"{self.root}.hf", "HF_HUB_DISABLE_XET": "1"}
        env["HF_HUB_DISABLE_TELEMETRY"] = "1"
        line = [sys.executable, "-m", "ipmn_core.cli", "fetch", str(self.root), "--yes", *arguments]
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def entry(path, body):
    """A file as the hub lists it; its large-file store has a sha256, git a sha1."""
    oid, lfs = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(), {}
    if path.endswith((".nii.gz", ".xlsx")):
        lfs = {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(body), "oid": oid} | lfs


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path).removeprefix(f"/datasets/{fetch.REPO}/resolve/{SHA}/")
        if self.command == "GET":
            hub.asked.append(path)
        if (path, self.command) in hub.faults:
            return hub.faults.pop((path, self.command))(self)
        if path == API:
            return self.answer(json.dumps({"id": fetch.REPO, "sha": SHA, "cardData": hub.card}).encode())
        if path == f"{API}/tree/{SHA}":
            entries, second = list(hub.listed.values()), "page=2" in url.query
            more = {} if second else {"Link": f'<{hub.url}{url.path}?page=2>; rel="next"'}
            return self.answer(json.dumps(entries[5:] if second else entries[:5]).encode(), **more)
        etag = hub.listed[path].get("lfs", hub.listed[path])["oid"]
        self.answer(hub.files[path], X_Repo_Commit=SHA, ETag=f'"{etag}"')

    do_HEAD = do_GET

    def answer(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it would ask the real hub
    with Hub(tmp_path / "cystx") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def on_disk(root):
    paths = [path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths)}


def of(hub, pattern):
    """The files of the release with a pattern in their path."""
    return {path: body for path, body in hub.files.items() if re.search(pattern, path)}


def test_the_parts_of_the_papers_protocol_come_whole_and_once_after_a_question(hub):
    said, wanted = [], of(hub, "images_masks|xlsx|classification/2")
    assert hub.fetch(ask=lambda facts: said.append(facts) or True) == len(wanted) == 20
    assert on_disk(hub.root) == wanted
    size = fetch._size(sum(map(len, wanted.values())))
    assert f"license: mit\nimages, labels, splits: 20 files, {size}\nto download: 20 files, {size}" in said[0]
    hub.asked.clear()
    assert hub.fetch(ask=said.append) == 20 and hub.got() == [] and len(said) == 1


@pytest.mark.parametrize(
    ("parts", "options", "pattern"),
    [
        (["roi"], {}, "Classification/t"),
        (["labels", "splits", "labels"], {}, "xlsx|classification/2"),
        (["roi"], {"modality": "t2"}, "Classification/t2"),
        (["images"], {"modality": "t1", "cases": 2}, r"(images|masks)/NYU_[01]\[t1"),
        (["splits", "images"], {"cases": 1}, "(images|masks)/NYU_0|classification/2"),
        (["labels", "roi"], {"modality": "t1", "cases": 9}, "xlsx|Classification/t1"),
    ],
)
def test_what_is_chosen_comes_and_nothing_else(hub, parts, options, pattern):
    wanted = of(hub, pattern)
    assert hub.fetch(*parts, **options) == len(wanted) > 1 and on_disk(hub.root) == wanted


def test_a_cut_file_is_repeated_and_a_killed_command_given_again_asks_for_the_rest_only(hub):
    wanted = of(hub, r"(images|masks)/NYU_[0-2]\[t1|xlsx")
    cut, *_, last = [path for path in wanted if path.endswith("gz")]
    hub.faults[cut, "GET"] = lambda handler: handler.answer(BODY[:70000], length=len(hub.files[cut]))
    hub.faults[last, "GET"] = lambda handler: (handler.answer(b"half", length=10**6), hub.stuck.wait(30))
    arguments = "--only", "images", "--only", "labels", "--modality", "t1", "--cases", "3"
    process = hub.command(*arguments)
    while last not in hub.got() or len(on_disk(hub.root)) < len(wanted) - 1:
        assert process.poll() is None, process.stdout.read()
        hub.stuck.wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.stuck.set()
    assert sorted(hub.got()) == sorted([cut, *wanted])
    assert on_disk(hub.root) == {path: body for path, body in wanted.items() if path != last}
    hub.asked.clear()
    again = hub.command(*arguments)
    said = again.communicate()[0]
    assert hub.got() == [last] and on_disk(hub.root) == wanted
    assert "8 files, size and checksum as on the hub" in said
    assert again.returncode == 1 and "error(s)" in said.splitlines()[-1]  # `check`: these are no volumes


@pytest.mark.parametrize("path", ["IPMN_images_masks/t1/masks/NYU_0[t1].nii.gz", SPLIT])
@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: b"x" + body[1:]])
def test_a_file_changed_on_disk_is_refused_by_name_and_fetched_again_once_it_is_away(hub, path, change):
    hub.fetch()
    (hub.root / path).write_bytes(change(hub.files[path]))
    hub.asked.clear()
    with pytest.raises(fetch.FetchError, match=f"{re.escape(repr(path))} differ.* Move"):
        hub.fetch()
    assert hub.got() == [] and (hub.root / path).unlink() is None
    assert hub.fetch() == 20 and hub.got() == [path] and on_disk(hub.root)[path] == hub.files[path]


def test_a_file_damaged_on_the_way_is_named_and_comes_again(hub):
    path = "IPMN_Classification/t1/NYU_0[t1].nii.gz"
    hub.files[path] = b"x" + hub.files[path][1:]
    with pytest.raises(fetch.FetchError, match=f"{re.escape(repr(path))} arrived damaged"):
        hub.fetch("roi")
    hub.files = release()
    assert path not in on_disk(hub.root)
    assert hub.fetch("roi") == 8 and on_disk(hub.root)[path] == hub.files[path]


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ((SPLIT, "HEAD"), (404, "EntryNotFound"), "no longer has .*t1.csv"),
        ((API, "GET"), (404, "RepoNotFound"), f"no longer has .*{fetch.REPO}; see {PAGE}"),
        ((f"{API}/tree/{SHA}", "GET"), (404, "RevisionNotFound"), f"no longer has .*{SHA}"),
        ((API, "GET"), (401, "RepoNotFound"), "gated, private or gone .*hf auth login"),
        ((SPLIT, "HEAD"), (403, "GatedRepo"), "gated, private or gone .*hf auth login"),
        ((API, "GET"), (503, ""), "connection to the hub failed .*503.*same command"),
        ((API, "GET"), (200, ""), "connection to the hub failed .*JSON"),  # as the page of a hotel's network
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_the_same_call_goes_on(hub, where, status, words):
    hub.faults[where] = lambda handler: handler.answer(b"<html>", status[0], X_Error_Code=status[1])
    with pytest.raises(fetch.FetchError, match=words) as error:
        hub.fetch("splits")
    assert "\n" not in str(error.value)
    assert hub.fetch("splits") == 2 and on_disk(hub.root) == of(hub, "classification/2")


def test_no_network_and_no_folder_to_write_to_are_told_apart(hub):
    words = "connection to the hub failed .*ConnectError.*HTTPS_PROXY.*same command"
    with pytest.raises(fetch.FetchError, match=words):
        fetch.fetch(hub.root, lambda facts: True, endpoint="http://127.0.0.1:9")
    hub.root.write_text("a file")
    with pytest.raises(fetch.FetchError, match=f"{hub.root} cannot be written"):
        hub.fetch("splits")


def test_nothing_comes_without_a_yes_or_without_room(hub, monkeypatch):
    hub.card, said = None, []
    with pytest.raises(fetch.FetchError, match="canceled"):
        hub.fetch(ask=said.append)
    assert "license: CC-BY-NC-4.0 (the hub does not say)" in said[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(fetch.FetchError, match=r"1.00kB free, 4.10MB to download; free disk space.*--cases"):
        hub.fetch("images", ask=pytest.fail)
    assert hub.got() == [] and not hub.root.exists()


@pytest.mark.parametrize(
    "path",
    [
        "IPMN_labels_total.xlsx",  # the sheet of another release
        "IPMN_images_masks/t1/images/AHN01.nii.gz",
        "IPMN_Classification/IPMN_labels_t1_total.xlsx",  # a name of this set, with another content
        "holiday.jpg",  # nothing of this set is there
    ],
)
def test_a_folder_that_holds_another_set_is_refused_by_name(hub, path):
    (hub.root / path).parent.mkdir(parents=True)
    (hub.root / path).write_text("others")
    with pytest.raises(fetch.FetchError, match="another data set") as error:
        hub.fetch("splits")
    assert path in str(error.value) and hub.got() == [] and on_disk(hub.root) == {path: b"others"}


def test_hidden_files_and_notes_are_no_other_set_but_another_scan_is(hub):
    hub.root.mkdir()
    (hub.root / ".DS_Store").write_text("")
    hub.fetch("labels")
    (hub.root / "mine.csv").write_text("image,label")
    assert hub.fetch("splits") == 2
    (hub.root / "mine.nii.gz").write_text("image")
    with pytest.raises(fetch.FetchError, match=r"another data set: 'mine.nii.gz'"):
        hub.fetch("splits")


@pytest.mark.parametrize("name", ["../../../../out.nii", "..\\out.nii", "C:out.nii", "\x1b[2J.nii"])
def test_a_name_that_would_leave_the_folder_is_refused(hub, tmp_path, name):
    path = f"IPMN_images_masks/t1/images/{name}"
    hub.files[path], hub.listed[path] = b"out", entry(path, b"out")
    with pytest.raises(fetch.FetchError, match="may leave the folder"):
        hub.fetch("images")
    assert hub.got() == [] and list(tmp_path.iterdir()) == []


def test_a_part_that_the_hub_does_not_list_and_no_number_of_cases_are_refused(hub):
    hub.listed = {path: listed for path, listed in hub.listed.items() if "splits" not in path}
    with pytest.raises(fetch.FetchError, match=f"{PAGE} lists no splits"):
        hub.fetch()
    with pytest.raises(fetch.FetchError, match="--cases 0"):
        hub.fetch("images", cases=0)
