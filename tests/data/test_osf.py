import functools
import hashlib
import io
import json
import random
import re
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ipmn_core import cli, data
from ipmn_core.data import archive, osf

LISTING, NODE = "/v2/nodes/74vfs/files/osfstorage/", "/v2/nodes/74vfs/"
BODY = random.Random(0).randbytes(300_000)  # four pieces and a bit


class Server(ThreadingHTTPServer):
    """An OSF of one machine: lists of two entries per page, bodies with ranges, and faults on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.listings, self.bodies, self.asked = {LISTING: []}, {}, []
        self.faults, self.ranges = {}, True  # path -> what to do instead, one function per request, in order

    def put(self, path, body=BODY, listing=LISTING, hashes=("sha256", "md5"), **changes):
        """Add a file to a list and return its path; `changes` are to its attributes, or to `download`."""
        at = f"/download/{len(self.bodies)}"
        self.bodies[at] = body
        digests = {name: hashlib.new(name, body).hexdigest() for name in hashes}
        attributes = {"kind": "file", "materialized_path": path, "size": len(body)}
        links = {"download": changes.pop("download", self.origin + at)}
        attributes |= {"extra": {"hashes": digests}} | changes
        self.listings.setdefault(listing, []).append({"attributes": attributes, "links": links})
        return at

    def put_folder(self, path, inside, listing=LISTING):
        href = {"files": {"links": {"related": {"href": self.origin + inside}}}}
        attributes = {"kind": "folder", "materialized_path": path}
        self.listings[listing].append({"attributes": attributes, "relationships": href, "links": {}})

    def ranges_of(self, path):
        """The ranges with which a path was requested, None where the whole was."""
        return [asked for where, asked in self.asked if where == path]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        server.asked.append((url.path, self.headers["Range"]))
        if server.faults.get(url.path):
            server.faults[url.path].pop(0)(self)
        elif url.path == NODE:
            license = {"data": {"attributes": {"name": "CC-BY-NC 4.0"}}}
            self.answer(200, json.dumps({"data": {"embeds": {"license": license}}}).encode())
        elif url.path in server.listings:
            number = int((re.findall(r"page=(\d+)", url.query) or ["1"])[0])
            entries = server.listings[url.path][2 * number - 2 :]
            more = f"{server.origin}{url.path}?page={number + 1}" if len(entries) > 2 else None
            self.answer(200, json.dumps({"data": entries[:2], "links": {"next": more}}).encode())
        else:
            self.send_file(server.bodies[url.path])

    def send_file(self, body):
        asked = self.headers["Range"]
        if not asked or not self.server.ranges:
            return self.answer(200, body)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return self.answer(416)
        return self.answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})

    def answer(self, status, body=b"", headers=(), length=None):
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def status(code, **headers):
    return lambda handler: handler.answer(code, headers={k.replace("_", "-"): v for k, v in headers.items()})


def listing(page):
    return lambda handler: handler.answer(200, json.dumps(page).encode())


@pytest.fixture
def serve(monkeypatch):
    """A function that starts one more server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(osf, "BACKOFF", 0)
    servers = []

    def start():
        servers.append(Server())
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve):
    return serve()


def fetch(server, root, answer=True, questions=None, origins=()):
    def ask(question):
        (questions if questions is not None else []).append(question)
        return answer

    allowed = (server.origin, *origins)
    return osf.fetch(root, ask, api=f"{server.origin}/v2", origins=allowed, progress=False)


def names(root):
    """All files under a root."""
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def zipped(*entries):
    """A zip of (name or ZipInfo, body)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as content:
        for name, body in entries:
            content.writestr(name, body)
    return out.getvalue()


def tarred(*members, mode="w:gz"):
    """A tar of (name, body), or of (TarInfo, None)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as content:
        for name, body in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(body or b"")
            content.addfile(member, io.BytesIO(body or b""))
    return out.getvalue()


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, None


def zip_link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_every_file_of_all_pages_and_folders_is_downloaded_to_its_place(server, tmp_path):
    bodies = {f"/f{i}.nii": bytes([i]) * 10 * i for i in range(3)}  # f0 is empty; three make two pages
    for path, body in bodies.items():
        server.put(path, body)
    server.put_folder("/deep/", "/v2/deep/")
    server.listings["/v2/deep/"] = []
    server.put_folder("/deep/er/", "/v2/deeper/", listing="/v2/deep/")
    server.put("/deep/er/x.nii", b"x", listing="/v2/deeper/")
    folder, unverified = fetch(server, tmp_path)
    for path, body in {**bodies, "/deep/er/x.nii": b"x"}.items():
        assert (tmp_path / path[1:]).read_bytes() == body
    assert len(names(tmp_path)) == 4 and (folder, unverified) == (tmp_path, [])


def test_the_question_tells_sizes_license_and_free_space_and_a_no_downloads_nothing(server, tmp_path):
    at = server.put("/a.nii")
    server.put("/b.nii", hashes=())
    with pytest.raises(osf.FetchError, match="download cancelled"):
        fetch(server, tmp_path / "data", answer=False, questions=(questions := []))
    assert "2 files, 600kB" in questions[0] and "600kB of 2 files" in questions[0]
    assert "license: CC-BY-NC 4.0" in questions[0] and "no checksum: b.nii" in questions[0]
    free = float(re.search(r"free there: ([\d.]+)GB", questions[0]).group(1))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.1)
    assert server.ranges_of(at) == [] and not (tmp_path / "data").exists()


def test_a_second_call_asks_nothing_and_downloads_nothing(server, tmp_path):
    at = [server.put("/a.nii"), server.put("/b.zip", zipped(("c.nii", b"c")))]
    at.append(server.put("/d", extra={"hashes": {"sha256": "none", "md5": None}}))
    fetch(server, tmp_path)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)}
    _, unverified = fetch(server, tmp_path, answer=False, questions=(questions := []))
    assert questions == [] and [server.ranges_of(path) for path in at] == [[None]] * 3
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in names(tmp_path)} == before
    assert unverified == ["d"]


def test_too_little_room_for_unpacking_is_found_before_the_question(server, tmp_path, monkeypatch):
    at = server.put("/a.zip", zipped(("a", BODY)))
    usage = namedtuple("usage", "free")(3 * len(server.bodies[at]) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(osf.FetchError, match="free; download and unpacking need about"):
        fetch(server, tmp_path, questions=(questions := []))
    assert questions == [] and server.ranges_of(at) == []


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (listing({}), "osfstorage/: not the answer that OSF documents"),
        (listing({"data": [{"attributes": {"kind": "link"}}]}), "not the answer that OSF documents"),
        (listing({"data": [], "links": {}}), "lists no file"),
        (listing({"data": [], "links": {"next": "https://example.org/2"}}), "leads to https://example.org/2"),
        (status(404), "status 404; see https://osf.io/74vfs"),
        (status(503, Retry_After="60"), "status 503; it asks to wait 60 s; .*goes on where it stop"),
    ],
)
def test_a_list_that_cannot_be_used_is_named(server, tmp_path, monkeypatch, answer, text):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.faults[LISTING] = [answer] * (1 + osf.TRIES)
    with pytest.raises(osf.FetchError, match=text):
        fetch(server, tmp_path)


def test_a_body_that_breaks_off_is_resumed_where_it_broke(server, tmp_path):
    at, n = server.put("/a.nii"), 3 * osf.PIECE
    server.faults[at] = [lambda handler: handler.answer(200, BODY[: n + 5], length=len(BODY))]
    fetch(server, tmp_path)
    assert server.ranges_of(at) == [None, f"bytes={n}-"] and (tmp_path / "a.nii").read_bytes() == BODY


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    at = server.put("/a.nii")
    server.ranges = False
    (tmp_path / "a.nii.partial").write_bytes(b"something else")
    fetch(server, tmp_path)
    assert server.ranges_of(at) == ["bytes=14-"] and (tmp_path / "a.nii").read_bytes() == BODY


@pytest.mark.parametrize(("size", "found"), [(len(BODY) + 1, len(BODY)), (10, osf.PIECE)])
def test_a_file_of_another_size_than_announced_is_refused(server, tmp_path, size, found):
    at = server.put("/a.nii", size=size)
    with pytest.raises(osf.FetchError, match=rf"a.nii: {size} bytes expected, {found} found"):
        fetch(server, tmp_path)
    assert server.ranges_of(at)[1:] == [f"bytes={len(BODY)}-"] * (size > 10)  # that was answered with 416
    assert names(tmp_path) == set()


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_wrong_checksum_deletes_the_download_and_says_expected_and_found(server, tmp_path, algorithm):
    at = server.put("/a.nii", hashes=(algorithm,))
    expected, found = (hashlib.new(algorithm, body).hexdigest() for body in (BODY, BODY[::-1]))
    server.bodies[at] = BODY[::-1]
    text = rf"a.nii: {algorithm} {expected} expected, {found} found; .* deleted. Run the same command again"
    with pytest.raises(osf.FetchError, match=text):
        fetch(server, tmp_path)
    assert names(tmp_path) == set()
    server.bodies[at] = BODY
    assert fetch(server, tmp_path)[1] == [] and (tmp_path / "a.nii").read_bytes() == BODY


def test_a_file_in_the_way_is_neither_overwritten_nor_taken_for_osfs(server, tmp_path):
    at = server.put("/labels.xlsx", b"old")
    (tmp_path / "labels.xlsx").write_bytes(b"new")
    with pytest.raises(osf.FetchError, match=r"labels.xlsx is there, but is not what OSF holds \(sha256"):
        fetch(server, tmp_path)
    assert (tmp_path / "labels.xlsx").read_bytes() == b"new" and server.ranges_of(at) == []


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", (waits := []).append)
    at = server.put("/a.nii")
    server.faults[at] = [status(503), status(429, Retry_After="7"), status(429, Retry_After="9999")]
    fetch(server, tmp_path)
    assert waits == [7, osf.LONGEST_WAIT] and (tmp_path / "a.nii").read_bytes() == BODY


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(osf, "BACKOFF", 0)
    nobody = "http://127.0.0.1:9"
    with pytest.raises(osf.FetchError, match=r"127.0.0.1:9/v2.* cannot be reached .*check the network"):
        osf.fetch(tmp_path, bool, api=f"{nobody}/v2", origins=(nobody,))


def test_a_redirect_to_another_allowed_origin_is_followed_with_its_range(server, serve, tmp_path):
    at, other = server.put("/a.nii"), serve()
    other.bodies["/bucket"] = BODY
    server.faults[at] = [status(302, Location=f"{other.origin}/bucket?signature=1")]
    (tmp_path / "a.nii.partial").write_bytes(BODY[:7])
    fetch(server, tmp_path, origins=(other.origin,))
    assert other.asked == [("/bucket", "bytes=7-")] and (tmp_path / "a.nii").read_bytes() == BODY


def test_a_redirect_to_any_other_origin_is_refused_with_both_urls(server, tmp_path):
    at = server.put("/a.nii")
    server.faults[at] = [status(302, Location="http://x.example.org/a?signature=1")]
    text = rf"{server.origin}{at} leads to http://x.example.org/a, which is none of OSF's addresses"
    with pytest.raises(osf.FetchError, match=text) as refused:
        fetch(server, tmp_path)
    assert "signature" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        *["http://osf.io/download/1/", "https://osf.io.example.org/", "https://osf.io@example.org/", None],
        *["https://osf.io\\@example.org/", "https://osf.io:444/", "https://example.org#https://osf.io"],
        *["//osf.io/", "file:///etc/passwd", " https://osf.io/"],
    ],
)
def test_only_osfs_own_addresses_over_https_are_allowed(url):
    with pytest.raises(osf.FetchError, match=r"https://api.osf.io/v2 leads to "):
        osf._require_allowed(url, "https://api.osf.io/v2", osf.ORIGINS)
    for own in ("https://osf.io/download/1/", "HTTPS://Files.DE-1.osf.io/v1?x=@", "https://osf.io"):
        osf._require_allowed(own, osf.API, osf.ORIGINS)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_links_in_the_apis_answers_are_held_to_the_origins_too(server, tmp_path, where):
    if where == "file":
        server.put("/a.nii", download="http://x.example.org/a")
    else:
        server.put_folder("/f/", ".x.example.org/f/")
    with pytest.raises(osf.FetchError, match=r"osfstorage/ leads to http://.*x.example.org/"):
        fetch(server, tmp_path, questions=(questions := []))
    assert questions == []


BAD_NAMES = ["../x", "a/../../x", "a/.. /x", "//etc/x", "a\\x", "C:/x", "a/c:x", "a\nx", "a\x1b[2J", ""]
BAD_NAMES += ["x.partial", ".x.zip.unpacking/y", "x.nii\u202egz"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_dangerous_name_in_the_list_is_refused_by_name(server, tmp_path, name):
    server.put(f"/{name}")
    with pytest.raises(osf.FetchError) as refused:
        fetch(server, tmp_path / "data")
    assert f"has the name {name!r}" in str(refused.value)
    assert not (tmp_path / "data").exists() and str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("name", "pack"), [("a.zip", zipped), ("a.TGZ", tarred), ("a.tar", functools.partial(tarred, mode="w"))]
)
def test_an_archive_is_kept_and_unpacked_beside_itself(server, tmp_path, name, pack):
    top = special("./", tarfile.DIRTYPE) if pack is not zipped else ("./", b"")
    mac = [top, ("__MACOSX/._b", b"1"), ("d/._b.nii", b"1"), ("d/.DS_Store", b"1")]
    server.put(f"/{name}", pack(("./d/b.nii", BODY), ("c.txt", b"c"), *mac))
    fetch(server, tmp_path)
    assert names(tmp_path) == {name, "c.txt", "d/b.nii", f".{name}.unpacked"}
    assert (tmp_path / "d" / "b.nii").read_bytes() == BODY and (tmp_path / "c.txt").read_bytes() == b"c"


BAD_ARCHIVES = {
    "up.zip": (zipped(("a", b"1"), ("../up", b"2")), "'../up', which has a part of dots only"),
    "up.tar": (tarred(("a", b"1"), ("b/../../up", b"2"), mode="w"), "'b/../../up', which has a part of dots"),
    "absolute.zip": (zipped(("/tmp/up", b"1")), "'/tmp/up', which is absolute"),
    "backslash.zip": (zipped(("..\\up", b"1")), r"'..\\up', which has a backslash"),
    "drive.tar.gz": (tarred(("c:up", b"1")), "'c:up', which has a drive letter"),
    "own.zip": (zipped((".own.zip.unpacked", b"{}")), "which ends as files of this program do"),
    "twice.zip": (zipped(("a/B", b"1"), ("A/b", b"2")), "'A/b' and 'a/B', which not every disk"),
    "link.zip": (zipped(("a", b"1"), (zip_link("up"), b"/etc/passwd")), "'up', a link or a device"),
    "link.tar.gz": (tarred(special("up", tarfile.SYMTYPE, "/etc/passwd")), "'up', a link or a device"),
    "hard.tar.gz": (tarred(("a", b"1"), special("up", tarfile.LNKTYPE, "a")), "'up', a link or a device"),
    "fifo.tar": (tarred(special("up", tarfile.FIFOTYPE), mode="w"), "'up', a link or a device"),
    "bomb.zip": (zipped(("a", bytes(3_000_000))), "unpacks to more than 100 times its size"),
    "bomb.tgz": (tarred(("a", bytes(3_000_000))), "unpacks to more than 100 times its size"),
    "many.zip": (zipped(*[(f"{i}", b"") for i in range(51)]), "has more than 50 entries"),
    "large.zip": (zipped(("a", BODY), ("b", BODY)), "524kB at most"),
    "broken.zip": (zipped(("a", BODY))[:-30], "broken.zip cannot be unpacked (File is not a zip file)"),
    "broken.tar.gz": (tarred(("a", BODY))[:100_000], "broken.tar.gz cannot be unpacked ("),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_a_dangerous_or_damaged_archive_is_refused_and_leaves_nothing(server, tmp_path, monkeypatch, name):
    body, text = BAD_ARCHIVES[name]
    monkeypatch.setattr(archive, "MAX_ENTRIES", 50)
    monkeypatch.setattr(archive, "MAX_UNPACKED", 2**19 if name == "large.zip" else 2**30)
    server.put(f"/data/{name}", body)
    with pytest.raises(osf.FetchError) as refused:
        fetch(server, tmp_path)
    assert text in str(refused.value) and name in str(refused.value)
    assert names(tmp_path) == {f"data/{name}"} and not (tmp_path / "up").exists()


def test_what_was_edited_since_unpacking_stays_and_what_is_gone_comes_back(server, tmp_path):
    server.put("/a.zip", zipped(("labels.xlsx", b"old"), ("d/1", b"1")))
    fetch(server, tmp_path)
    (tmp_path / "labels.xlsx").write_bytes(b"corrected")
    (tmp_path / "d" / "1").unlink()
    fetch(server, tmp_path)
    assert (tmp_path / "labels.xlsx").read_bytes() == b"corrected"
    assert (tmp_path / "d" / "1").read_bytes() == b"1"


def test_another_file_in_the_way_of_an_archive_is_not_overwritten(server, tmp_path):
    server.put("/a.zip", zipped(("b", b"1"), ("c", b"2")))
    (tmp_path / "c").write_bytes(b"mine")
    with pytest.raises(osf.FetchError, match=r"/c differs from that in .*a.zip; move it away"):
        fetch(server, tmp_path)
    assert names(tmp_path) == {"a.zip", "c"} and (tmp_path / "c").read_bytes() == b"mine"


@pytest.fixture
def command(server, monkeypatch):
    """`ipmn fetch` from the server instead of OSF."""
    here = functools.partial(osf.fetch, api=f"{server.origin}/v2", origins=(server.origin,), progress=False)
    monkeypatch.setattr(osf, "fetch", here)
    return lambda *arguments: cli.main(["fetch", *map(str, arguments)])


def test_the_command_fetches_and_checks(server, command, phantom_root, tmp_path, capsys):
    packed = shutil.make_archive(tmp_path / "packed", "zip", phantom_root.parent, phantom_root.name)
    server.put("/IPMN.zip", Path(packed).read_bytes())
    assert command(tmp_path / "data", "--yes") == 0
    folder, n = tmp_path / "data" / phantom_root.name, len(data.read(phantom_root))
    printed = capsys.readouterr().out
    assert "license: " in printed and f"{folder}: {n} labelled scans, 0 error(s)" in printed


def test_the_command_downloads_nothing_without_a_yes(server, command, tmp_path, monkeypatch, capsys):
    server.put("/a.txt", b"1")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command(tmp_path / "data") == 1
    assert "ipmn: EOF" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert command(tmp_path / "data") == 1
    assert "ipmn: download cancelled" in capsys.readouterr().err
