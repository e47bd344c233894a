"""The real data set from OSF: listed, asked about, downloaded with checksums, unpacked; resumable throughout.

Nothing half is ever under a final name: a file grows as `NAME.partial`. The same call goes on after any
interruption. Nothing that comes over the network is trusted before it is checked: links, names, sizes,
contents.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from tqdm.auto import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from ipmn_core.data import archive, releases
from ipmn_core.data.archive import FetchError, in_bytes, printable

NODE, API = "74vfs", "https://api.osf.io/v2"
# All that OSF's links and redirects lead to: its API, download links, file servers by region, their bucket.
SERVERS = ("api", "files", "files.us", "files.ca-1", "files.de-1", "files.au-1")
ORIGINS = ("https://osf.io", "https://storage.googleapis.com", *(f"https://{s}.osf.io" for s in SERVERS))
TIMEOUT = (10, 60)  # seconds to connect, seconds between two pieces of an answer
TRIES, BREAKS, REDIRECTS = 5, 20, 10  # how often a request is repeated, a body resumed, a redirect followed
BACKOFF, LONGEST_WAIT = 1.0, 120  # seconds: the first wait, which doubles, and the longest
BUSY = (429, 500, 502, 503, 504)
PIECE = 1 << 16  # bytes; what a broken connection loses at most


@dataclass(frozen=True)
class Remote:
    """A file on OSF; `algorithm` is "sha256", "md5" or, where OSF gives no checksum, ""."""

    path: PurePosixPath
    size: int  # bytes
    url: str
    algorithm: str
    checksum: str


def fetch(
    root: Path,
    ask: Callable[[str], bool],
    node: str = NODE,
    api: str = API,
    origins: tuple[str, ...] = ORIGINS,
    progress: bool = True,
) -> tuple[Path, list[str]]:
    """The folder under `root` that holds the label sheets, and the files that no checksum could verify.

    `ask` is given sizes, license and free space with the question whether to download; it is not asked if
    nothing is missing. Archives are kept, and unpacked beside themselves. Raises FetchError.
    """
    root = Path(root)
    with _session() as session:
        get = partial(_get, session, origins)
        files = _listing(get, f"{api}/nodes/{node}/files/osfstorage/", origins)
        checked = tqdm(files, "checking what is there", leave=False, disable=not progress)
        missing = [file for file in checked if not _is_there(file, root / file.path)]
        archives = [file for file in files if file.path.name.lower().endswith(archive.SUFFIXES)]
        packed = [file for file in archives if not archive.is_unpacked(root / file.path)]
        to_come = sum(file.size for file in missing)
        free = _require_room(root, to_come + archive.UNPACKED_SIZE * sum(file.size for file in packed))
        if missing:
            facts = [
                f"OSF node {node}: {len(files)} files, {in_bytes(sum(file.size for file in files))}",
                f"still to download: {in_bytes(to_come)} of {len(missing)} files",
                f"free there: {in_bytes(free)}",
                f"license: {_license(get, f'{api}/nodes/{node}/?embed=license')}",
                *[f"cannot be verified, OSF gives no checksum: {f.path}" for f in files if not f.algorithm],
            ]
            if not ask("\n".join([*facts, f"Download to {root}?"])):
                raise FetchError("download cancelled")
        options = {"unit": "B", "unit_scale": True, "disable": not (progress and missing)}
        with tqdm(desc="downloading", total=to_come, **options) as bar:
            for file in missing:
                _download(get, file, root / file.path, bar)
        for file in packed:
            archive.unpack(root / file.path, progress)
    return _cohort_folder(root), [str(file.path) for file in files if not file.algorithm]


def _session() -> requests.Session:
    """A session that tries again, after growing waits or those of Retry-After, where a server is busy."""
    retry = Retry(
        TRIES,
        backoff_factor=BACKOFF,
        backoff_max=LONGEST_WAIT,
        retry_after_max=LONGEST_WAIT,
        status_forcelist=BUSY,
        allowed_methods=["GET"],
        raise_on_status=False,  # the last answer comes back, and `_get` says what it was
    )
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # sizes, ranges and checksums are those of the file
    for scheme in ("https://", "http://"):  # which of them may be asked, `origins` decides
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _get(session, origins, url: str, source="ipmn fetch", ok=(200,), **options) -> requests.Response:
    """The answer, its body still to be read; every redirect on the way has to stay within the origins."""
    for _ in range(REDIRECTS + 1):
        _require_allowed(url, source, origins)
        try:
            response = session.get(url, timeout=TIMEOUT, allow_redirects=False, stream=True, **options)
        except (requests.RequestException, HTTPError) as error:
            raise _broken(url, error) from error
        if not response.is_redirect:
            break
        response.close()
        url, source = urljoin(url, response.headers["location"]), url
    else:
        raise FetchError(f"{_shown(url)}: more than {REDIRECTS} redirects; try again later")
    if response.status_code in ok:
        return response
    response.close()
    remedy = f"see https://osf.io/{NODE} whether the data set is still public"
    if response.status_code in BUSY:
        remedy = f"still so after {TRIES} more tries; run the same command later, it goes on where it stopped"
        if wait := response.headers.get("Retry-After"):
            remedy = f"it asks to wait {printable(wait)} s; {remedy}"
    raise FetchError(f"{_shown(url)} answers with status {response.status_code}; {remedy}")


def _require_allowed(url, source, origins):
    """Raise FetchError unless a URL's scheme, host and port, as they are written, are one of the origins."""
    origin = re.match(r"[a-z]+://[^/?#\\@\s]+(?=[/?#]|$)", str(url), flags=re.IGNORECASE)
    if not origin or origin.group().lower() not in origins:
        raise FetchError(
            f"{_shown(source)} leads to {_shown(url)}, which is none of OSF's addresses known here "
            f"({', '.join(origins)}); not followed. Report it, OSF may have moved"
        )


def _broken(url, error):
    """A FetchError for what broke on the way, the network's own words in it."""
    return FetchError(
        f"{_shown(url)} cannot be reached or broke off ({printable(error)}); check the network (HTTPS_PROXY "
        "names a proxy), then run the same command again: it goes on where it stopped"
    )


def _shown(url):
    """A URL for people: without its query, which may hold a signature."""
    return printable(str(url).split("?")[0])


def _json(get, url, source="ipmn fetch"):
    try:
        with get(url, source) as response:
            return response.json()
    except (requests.RequestException, HTTPError) as error:
        raise _broken(url, error) from error


def _license(get, url):
    """The license as OSF states it, or that it states none."""
    try:
        return printable(_json(get, url)["data"]["embeds"]["license"]["data"]["attributes"]["name"])
    except (KeyError, TypeError):  # left out, or an error embedded in its place
        return "license not stated; CC-BY-NC is expected, to be confirmed"


def _listing(get, url: str, origins) -> list[Remote]:
    """All files of a storage, folder by folder; FetchError if it has none, or a link or name to refuse."""
    pages, seen, files, taken = [(_long_page(url), "ipmn fetch")], set(), [], {}
    while pages:
        url, source = pages.pop(0)
        if url in seen or len(seen) > archive.MAX_ENTRIES:
            raise FetchError(f"{_shown(url)}: OSF's list of files runs in a circle; try again later")
        seen.add(url)
        page = _json(get, url, source)
        try:
            for entry in page["data"]:
                if entry["attributes"]["kind"] == "folder":
                    pages.append(
                        (_long_page(entry["relationships"]["files"]["links"]["related"]["href"]), url)
                    )
                    continue
                file = _remote(entry, f"OSF's list {_shown(url)}")
                _require_allowed(file.url, url, origins)
                archive.claim(file.path, taken, f"OSF's list {_shown(url)}")
                files.append(file)
            if page["links"].get("next"):
                pages.append((page["links"]["next"], url))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = f"not the answer that OSF documents ({type(error).__name__}: {printable(error)})"
            raise FetchError(f"{_shown(url)}: {text}; report it") from error
    if not files:
        raise FetchError(f"{_shown(url)} lists no file; see https://osf.io/{NODE} whether the data set moved")
    return files


def _long_page(url):
    """A list's URL for 100 entries a page, not 10: OSF serves few pages an hour to those not logged in."""
    return f"{url}{'&' if '?' in url else '?'}page[size]=100"


def _remote(entry, where):
    """A file from its entry in OSF's list; what is raised besides FetchError tells a wrong entry."""
    attributes = entry["attributes"]
    path = archive.checked_path(attributes["materialized_path"].removeprefix("/"), where)
    size, hashes = attributes["size"], (attributes.get("extra") or {}).get("hashes") or {}
    if attributes["kind"] != "file" or type(size) is not int or size < 0:
        raise ValueError(f"{path} is a {attributes['kind']!r} of {size!r} bytes")
    for algorithm, digits in (("sha256", 64), ("md5", 32)):
        checksum = str(hashes.get(algorithm)).lower()
        if re.fullmatch(f"[0-9a-f]{{{digits}}}", checksum):
            return Remote(path, size, entry["links"]["download"], algorithm, checksum)
    return Remote(path, size, entry["links"]["download"], "", "")


def _is_there(file, target):
    """Whether a whole file is in its place; FetchError if it is another, for it may be the user's."""
    if not os.path.lexists(target):
        return False
    if fault := _fault(file, target):
        text = f"{target} is there, but is not what OSF holds ({fault}): changed here, or renewed there"
        raise FetchError(f"{text}. Move it away to fetch it again")
    return True


def _fault(file, path):
    """What is wrong with a file on disk, expected and found; "" if it is OSF's, as far as can be told."""
    if not path.is_file():
        return "not a file"
    if (size := path.stat().st_size) != file.size:
        return f"{file.size} bytes expected, {size} found"
    if not file.algorithm:
        return ""
    with open(path, "rb") as content:
        found = hashlib.file_digest(content, file.algorithm).hexdigest()
    return "" if found == file.checksum else f"{file.algorithm} {file.checksum} expected, {found} found"


def _require_room(root, needed):
    """Free bytes where `root` is or will be; FetchError if they are fewer than needed."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        text = f"{there} has {in_bytes(free)} free; download and unpacking need about {in_bytes(needed)}"
        raise FetchError(f"{text}: make room, or choose another folder")
    return free


def _download(get, file: Remote, target: Path, bar) -> None:
    """Put a file in its place, verified; go on with what an earlier call left of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part, reason = target.with_name(f"{target.name}.partial"), "its body ends early"
    part.touch()
    bar.update(part.stat().st_size)
    for attempt in range(BREAKS + 1):
        if (have := part.stat().st_size) >= file.size:
            break
        if attempt == BREAKS:
            raise _broken(file.url, reason)
        if attempt:
            time.sleep(min(BACKOFF * 2**attempt, LONGEST_WAIT))
        try:
            if not _receive(get, file, part, have, bar):
                break
        except (requests.RequestException, HTTPError) as error:
            reason = error
    if fault := _fault(file, part):
        part.unlink()
        text = f"{file.path}: {fault}; the download was damaged and is deleted. Run the same command again"
        raise FetchError(
            f"{text}; if it comes to the same, see https://osf.io/{NODE} whether the file changed"
        )
    with open(part, "r+b") as content:
        os.fsync(content.fileno())
    os.replace(part, target)


def _receive(get, file, part, have, bar):
    """Append what the server sends to a file of `have` bytes; False if the server has no more than those."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    with get(file.url, "OSF's list of files", ok=(200, 206, 416), headers=headers) as response:
        if response.status_code == 416:
            return False
        resumed, answer = response.status_code == 206, response.headers.get("Content-Range", "")
        if resumed and not re.fullmatch(rf"bytes {have}-\d+/({file.size}|\*)", answer):
            text = f"{_shown(file.url)} answers {printable(answer)!r} to a request for bytes {have}-"
            raise FetchError(f"{text} of {file.size}; delete {part}, then run the same command again")
        if not resumed:  # a server that knows no ranges sends all of it
            bar.update(-have)
            have = 0
        with open(part, "ab" if resumed else "wb") as out:
            for piece in response.iter_content(PIECE):
                out.write(piece)
                bar.update(len(piece))
                have += len(piece)
                if have > file.size:  # the size is found wrong before the disk is full
                    break
    return True


def _cohort_folder(root):
    """The folder nearest to `root` that holds a label sheet; `root` if none does."""
    sheets = [sheet for release in releases.SHEETS.values() for sheet in release]
    folders = {path.parent for sheet in sheets for path in root.rglob(sheet)}
    return min(folders, key=lambda folder: (len(folder.parts), str(folder)), default=root)
