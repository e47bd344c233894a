"""Unpack an archive from outside without trust: plain files, harmless names, within bounds, or nothing.

It unpacks into `.NAME.unpacking` beside itself, and `.NAME.unpacked` lists what it held.
"""

from __future__ import annotations

import filecmp
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.auto import tqdm

PIECE = 1 << 16  # bytes
SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
OWN_SUFFIXES = (".partial", ".unpacking", ".unpacked", ".lock")
MAX_ENTRIES, MAX_RATIO, MAX_UNPACKED = 100_000, 100, 200 * 2**30  # of one archive; the last in bytes
UNPACKED_SIZE = 2  # room for unpacking, in sizes of the archive, whose volumes are compressed already
# What an archive raises that is damaged, or packed in a way or with a password that is not known.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
DAMAGE += (EOFError, RuntimeError, ValueError)


class FetchError(RuntimeError):
    """The data set cannot be fetched; the message says what, where and what to do."""


def unpack(archive: Path, progress: bool = True) -> None:
    """Unpack a zip or tar beside itself: all of it, or nothing and a FetchError.

    What it left in an earlier call stays, for it may have been edited since; only what is gone comes back.
    Any other file in the way has to be the same, byte by byte.
    """
    folder, before, temporary = archive.parent, _unpacked_before(archive), _beside(archive, "unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        paths = _extract(archive, temporary, progress)
        for path in paths:
            there = folder / path
            same = there.is_file() and filecmp.cmp(temporary / path, there, shallow=False)
            if os.path.lexists(there) and not same and str(path) not in before:
                raise FetchError(f"{there} differs from that in {archive}; move it away, then run this again")
        _settle(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note = _beside(archive, "unpacked.partial")
    note.write_text(json.dumps({"archive": _identity(archive), "files": [str(path) for path in paths]}))
    os.replace(note, _beside(archive, "unpacked"))


def _beside(archive, suffix):
    return archive.with_name(f".{archive.name}.{suffix}")


def _identity(archive):
    return [archive.stat().st_size, archive.stat().st_mtime_ns]


def _unpacked_before(archive):
    """The paths that came out of this very archive in an earlier call."""
    try:
        noted = json.loads(_beside(archive, "unpacked").read_text())
        return noted["files"] if noted["archive"] == _identity(archive) else []
    except (FileNotFoundError, ValueError):  # no note, no archive, or a note that a power cut left empty
        return []


def is_unpacked(archive: Path) -> bool:
    """Whether all that an archive holds is there since an earlier call."""
    before = _unpacked_before(archive)
    return bool(before) and all((archive.parent / name).exists() for name in before)


def _settle(source, folder):
    """Move all that is not in `folder` yet, whole folders in one step."""
    for entry in source.iterdir():
        if not os.path.lexists(folder / entry.name):
            os.replace(entry, folder / entry.name)
        elif entry.is_dir():
            _settle(entry, folder / entry.name)


def _extract(archive: Path, folder: Path, progress: bool) -> list[PurePosixPath]:
    """The paths of an archive's files, now in `folder`; FetchError for all but plain files within bounds."""
    limit = min(MAX_UNPACKED, MAX_RATIO * archive.stat().st_size)
    room, written, taken, paths = shutil.disk_usage(folder).free, 0, {}, []
    try:
        entries = tqdm(_entries(archive), f"unpacking {archive.name}", disable=not progress)
        for count, (name, is_folder, open_entry) in enumerate(entries, start=1):
            if count > MAX_ENTRIES:
                raise FetchError(f"{archive} has more than {MAX_ENTRIES} entries; not unpacked, report it")
            if is_folder and not PurePosixPath(name).parts:  # "./", with which many a tar begins
                continue
            path = checked_path(name, archive)
            if is_folder or "__MACOSX" in path.parts or path.name.startswith(("._", ".DS_Store")):
                continue
            claim(path, taken, archive)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with open_entry() as source, open(folder / path, "xb") as out:
                while piece := source.read(PIECE):
                    written += len(piece)  # counted as they come, for declared sizes can lie
                    if written > limit:
                        text = f"{MAX_RATIO} times its size, {in_bytes(MAX_UNPACKED)} at most"
                        raise FetchError(f"{archive} unpacks to more than {text}; not unpacked, report it")
                    if written > room:
                        raise FetchError(f"{archive.parent} has too little room to unpack {archive.name}")
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            paths.append(path)
    except FetchError:
        raise
    except DAMAGE as error:
        raise FetchError(f"{archive} cannot be unpacked ({printable(error)}); report it") from error
    return paths


def _entries(archive: Path) -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """Name, whether a folder, and what opens it, of each entry; FetchError for links and devices.

    Neither library extracts anything itself: only checked names are written, and only as plain files.
    """
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the packing system has no such thing
                _require_plain(kind in (0, stat.S_IFREG, stat.S_IFDIR), info.orig_filename, archive)
                yield info.orig_filename, info.is_dir(), partial(content.open, info)  # with its backslashes
    else:
        with tarfile.open(archive) as content:
            for member in content:
                _require_plain(member.isreg() or member.isdir(), member.name, archive)
                yield member.name, member.isdir(), partial(content.extractfile, member)


def _require_plain(plain, name, archive):
    if not plain:
        raise FetchError(f"{archive} has {name!r}, a link or a device; not unpacked, report it")


def checked_path(name: str, where) -> PurePosixPath:
    """A name from outside as a relative path; FetchError if it could lead, or be taken for, elsewhere."""
    path = PurePosixPath(name)
    faults = {
        "is empty": not path.parts,
        "is absolute": path.is_absolute(),
        "has a part of dots only": any(not part.strip(". ") for part in path.parts),
        "has a backslash": "\\" in name,
        "has a drive letter": any(re.match("[A-Za-z]:", part) for part in path.parts),
        "has a control character": any(unicodedata.category(c).startswith("C") for c in name),
        "ends as files of this program do": any(part.lower().endswith(OWN_SUFFIXES) for part in path.parts),
    }
    for fault, found in faults.items():
        if found:
            raise FetchError(f"{where} has the name {name!r}, which {fault}; refused, report it")
    return path


def claim(path: PurePosixPath, taken: dict[str, PurePosixPath | None], where) -> None:
    """Note a file, and its folders as None, in `taken`; FetchError if a disk could take two for one."""
    keys = [unicodedata.normalize("NFC", str(p)).casefold() for p in (path, *path.parents)][:-1]
    clash = [taken[key] or key for i, key in enumerate(keys) if key in taken and (i == 0 or taken[key])]
    if clash:
        names = f"{str(path)!r} and {str(clash[0])!r}"
        raise FetchError(f"{where} has {names}, which not every disk can tell apart; refused, report it")
    taken |= dict.fromkeys(keys[1:]) | {keys[0]: path}


def printable(text: Any) -> str:
    """A text from the network, short and without what a terminal would act upon."""
    return "".join(c for c in str(text) if c.isprintable())[:300]


def in_bytes(n: float) -> str:
    """A number of bytes as people read it."""
    return tqdm.format_sizeof(n, "B")
