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

from ipmn_core import cli, fetch

SHA, COUNT = "0123456789abcdef" * 2 + "01234567", 4  # the revision, and the cases of each modality
BODY = bytes(range(256)) * 1000
LARGE = ".nii.gz", ".xlsx"  # what the hub keeps in its large-file store, and gives a sha256
PAGE, API = "https://huggingface.co/datasets/phy710/Cyst-X", "/api/datasets/phy710/Cyst-X"
SPLIT = "data splits/classification/2-class/t1.csv"


def release():
    """Path -> content of a small release."""
    files = {"README.md": b"the card", "data splits/pansegnet segmentation/t1.csv": b"none of ours"}
    for m in ("t1", "t2"):
        files[f"data splits/classification/2-class/{m}.csv"] = f"name,fold\n{m},0\n".encode()
        files[f"IPMN_Classification/IPMN_labels_{m}_total.xlsx"] = f"sheet of {m}".encode()
        for i in range(COUNT):
            for folder in (
                "IPMN_Classification/{}",
                "IPMN_images_masks/{}/images",
                "IPMN_images_masks/{}/masks",
            ):
                path = f"{folder.format(m)}/NYU_{i}[{m}].nii.gz"  # brackets, which are also a pattern's
                files[path] = path.encode() + BODY
    return dict(sorted(files.items()))


class Hub(ThreadingHTTPServer):
    """The hub on one machine: the data set's card, its list in two pages, its files, and faults."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.files, self.card = (
            f"http://127.0.0.1:{self.server_port}",
            release(),
            {"license": "mit"},
        )
        self.listed = {path: entry(path, body) for path, body in self.files.items()}
        self.faults, self.asked, self.stuck = {}, [], threading.Event()  # path -> what to do instead, once

    def got(self):
        """The files that were requested, in order."""
        return [path for path in self.asked if path in self.files]


def entry(path, body):
    """A file as the hub lists it."""
    listed = {"type": "file", "path": path, "size": len(body)}
    listed["oid"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    if path.endswith(LARGE):
        oid = hashlib.sha256(body).hexdigest()
        listed |= {"oid": "0" * 40, "lfs": {"oid": oid, "size": len(body), "pointerSize": 130}}
    return listed


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


def status(code, error):
    return lambda handler: handler.answer(b"", code, X_Error_Code=error)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """A function that fetches from the hub to `root` and returns the number of files."""

    def go(*parts, ask=lambda facts: True, **options):
        return fetch.fetch(go.root, ask, parts or fetch.DEFAULT, endpoint=hub.url, **options)

    go.root = tmp_path / "cystx"
    return go


def on_disk(root):
    paths = [path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths)}


def of(hub, pattern):
    """The files of the release with a pattern in their path."""
    return {path: body for path, body in hub.files.items() if re.search(pattern, path)}


def command(hub, tmp_path, *arguments):
    """`ipmn fetch --yes` in a process of its own."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    line = [sys.executable, "-m", "ipmn_core.cli", "fetch", str(tmp_path / "cystx"), "--yes", *arguments]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_parts_of_the_papers_protocol_come_whole_and_once_after_a_question(hub, run):
    said, wanted = [], of(hub, "images_masks|xlsx|classification/2")
    assert run(ask=lambda facts: said.append(facts) or True) == len(wanted) == 20
    assert on_disk(run.root) == wanted
    size = fetch._size(sum(map(len, wanted.values())))
    assert f"license: mit\nimages, labels, splits: 20 files, {size}\nto download: 20 files, {size}" in said[0]
    hub.asked.clear()
    assert run(ask=said.append) == 20 and hub.got() == [] and len(said) == 1


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
def test_what_is_chosen_comes_and_nothing_else(hub, run, parts, options, pattern):
    wanted = of(hub, pattern)
    assert run(*parts, **options) == len(wanted) > 1 and on_disk(run.root) == wanted


def test_a_license_that_the_hub_does_not_give_is_the_known_one_and_no_means_no(hub, run):
    hub.card, said = None, []
    with pytest.raises(fetch.FetchError, match="cancelled"):
        run(ask=said.append)
    assert "license: CC-BY-NC-4.0 (the hub does not say)" in said[0] and not run.root.exists()


def test_a_connection_cut_within_a_file_is_repaired_by_the_same_call(hub, run):
    path = "IPMN_images_masks/t1/images/NYU_0[t1].nii.gz"
    hub.faults[path, "GET"] = lambda handler: handler.answer(BODY[:70000], length=len(hub.files[path]))
    run("images", cases=1)
    assert hub.got().count(path) == 2 and on_disk(run.root)[path] == hub.files[path]


def test_a_killed_process_leaves_whole_files_and_the_same_command_asks_for_the_rest(hub, tmp_path):
    last = list(of(hub, "images_masks"))[-1]
    hub.faults[last, "GET"] = lambda handler: (handler.answer(b"half", length=10**6), hub.stuck.wait(30))
    process = command(hub, tmp_path, "--only", "images")
    for _ in iter(lambda: len(on_disk(tmp_path / "cystx")) < 15, False):
        assert process.poll() is None or pytest.fail(process.stdout.read())
        hub.stuck.wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert on_disk(tmp_path / "cystx") == {p: b for p, b in of(hub, "images_masks").items() if p != last}
    hub.stuck.set()
    hub.asked.clear()
    again = command(hub, tmp_path, "--only", "images")
    said = again.communicate()[0]
    assert hub.got() == [last] and on_disk(tmp_path / "cystx") == of(hub, "images_masks")
    assert "16 files, size and checksum as on the hub" in said
    assert again.returncode == 1 and "error(s)" in said.splitlines()[-1]  # `check`: these are no volumes


@pytest.mark.parametrize("path", ["IPMN_images_masks/t1/masks/NYU_0[t1].nii.gz", SPLIT])
@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: b"x" + body[1:]])
def test_a_file_changed_on_disk_is_refused_by_name_and_fetched_again_once_it_is_away(hub, run, path, change):
    run()
    (run.root / path).write_bytes(change(hub.files[path]))
    hub.asked.clear()
    with pytest.raises(fetch.FetchError) as error:
        run()
    assert repr(path) in str(error.value) and "Move" in str(error.value) and hub.got() == []
    (run.root / path).unlink()
    run()
    assert hub.got() == [path] and on_disk(run.root)[path] == hub.files[path]


def test_a_file_damaged_on_the_way_is_named_and_comes_again(hub, run):
    path = "IPMN_Classification/t1/NYU_0[t1].nii.gz"
    good = hub.files[path]
    hub.files[path] = b"x" + good[1:]
    with pytest.raises(fetch.FetchError) as error:
        run("roi")
    assert repr(path) in str(error.value) and path not in on_disk(run.root)
    hub.files[path] = good
    assert run("roi") == 8 and on_disk(run.root)[path] == good


@pytest.mark.parametrize(
    ("where", "fault", "words"),
    [
        ((SPLIT, "HEAD"), status(404, "EntryNotFound"), "no longer has .*t1.csv"),
        ((API, "GET"), status(404, "RepoNotFound"), f"no longer has .*{fetch.REPO}; see {PAGE}"),
        ((f"{API}/tree/{SHA}", "GET"), status(404, "RevisionNotFound"), f"no longer has .*{SHA}"),
        ((API, "GET"), status(401, "RepoNotFound"), "gated, private or gone .*hf auth login"),
        ((SPLIT, "HEAD"), status(403, "GatedRepo"), "gated, private or gone .*hf auth login"),
        ((SPLIT, "HEAD"), status(403, ""), "gated, private or gone .*hf auth login"),
        ((API, "GET"), status(503, ""), "cannot be reached .*503.*same command"),
        ((API, "GET"), lambda handler: handler.answer(b"<html>Log in to the hotel"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_the_same_call_goes_on(hub, run, where, fault, words):
    hub.faults[where] = fault
    with pytest.raises(fetch.FetchError, match=words) as error:
        run("splits")
    assert "\n" not in str(error.value)
    assert run("splits") == 2 and on_disk(run.root) == of(hub, "classification/2")


def test_without_a_network_it_says_so(run):
    with pytest.raises(
        fetch.FetchError, match=r"cannot be reached .*ConnectError.*HTTPS_PROXY.*same command"
    ):
        fetch.fetch(run.root, lambda facts: True, endpoint="http://127.0.0.1:9")


def test_without_room_nothing_is_asked_or_downloaded(hub, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(fetch.FetchError, match=r"1.00kB free, 4.10MB to download; make room.*--cases"):
        run("images", ask=pytest.fail)
    assert hub.got() == [] and not run.root.exists()


def test_a_folder_that_cannot_be_written_is_named(hub, run):
    run.root.write_text("a file")
    with pytest.raises(fetch.FetchError, match=rf"{run.root} cannot be written"):
        run("splits")


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("IPMN_labels_total.xlsx", True),  # the sheet of another release
        ("IPMN_images_masks/t1/images/AHN01.nii.gz", True),
        ("IPMN_Classification/IPMN_labels_t1_total.xlsx", True),  # a name of this set, with another content
        ("holiday.jpg", True),  # nothing of this set is there
        (".DS_Store", False),
    ],
)
def test_a_folder_that_holds_another_set_is_refused_by_name(hub, run, path, refused):
    (run.root / path).parent.mkdir(parents=True)
    (run.root / path).write_text("others")
    if not refused:
        assert run("splits") == 2
        return
    with pytest.raises(fetch.FetchError, match=r"another data set|of another") as error:
        run("splits")
    assert path in str(error.value) and hub.got() == [] and on_disk(run.root) == {path: b"others"}


def test_notes_beside_the_data_are_no_other_set(hub, run):
    run("labels")
    (run.root / "mine.csv").write_text("image,label")
    assert run("splits") == 2


@pytest.mark.parametrize(
    "name", ["../../../../out.nii.gz", "..\\out.nii.gz", "C:out.nii.gz", "\x1b[2J.nii.gz"]
)
def test_a_name_that_would_leave_the_folder_is_refused(hub, run, tmp_path, name):
    path = f"IPMN_images_masks/t1/images/{name}"
    hub.files[path], hub.listed[path] = b"out", entry(path, b"out")
    with pytest.raises(fetch.FetchError, match="may leave the folder"):
        run("images")
    assert hub.got() == [] and list(tmp_path.iterdir()) == []


def test_a_part_that_the_hub_does_not_list_and_no_number_of_cases_are_refused(hub, run):
    hub.listed = {path: listed for path, listed in hub.listed.items() if "splits" not in path}
    with pytest.raises(fetch.FetchError, match=f"{PAGE} lists no splits"):
        run()
    with pytest.raises(fetch.FetchError, match="--cases 0"):
        run("images", cases=0)


def test_the_command_passes_all_its_options_on(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(fetch, "fetch", lambda root, ask, *rest: given.append(rest) or 3)
    monkeypatch.setattr(cli, "check", lambda options: 0)
    line = ["fetch", str(tmp_path), "--only", "roi", "--only", "labels", "--modality", "t2", "--cases", "3"]
    assert cli.main(line) == 0 and cli.main(line[:2]) == 0
    assert given == [(["roi", "labels"], "t2", 3), (fetch.DEFAULT, None, None)]
