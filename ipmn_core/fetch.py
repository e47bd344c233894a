"""Download the real data set from the Hugging Face hub: list it, ask, download, verify.

`huggingface_hub` transfers, retries and shows progress. It compares only sizes; this module also checksums.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from glob import escape
from itertools import product
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm
from huggingface_hub.utils.sha import git_hash

from ipmn_core.data import case_name
from ipmn_core.disk import digest

REPO, LICENSE = "phy710/Cyst-X", "CC-BY-NC-4.0"
PAGE = f"https://huggingface.co/datasets/{REPO}"
# Part -> pattern of its paths; the group is a volume's modality, or "" for a file of both.
PARTS = {
    "images": r"IPMN_images_masks/(t[12])/.+\.nii(?:\.gz)?",
    "roi": r"IPMN_Classification/(t[12])/.+\.nii(?:\.gz)?",
    "labels": r"IPMN_Classification/[^/]+\.xlsx()",
    "splits": r"data splits/classification/.+\.csv()",
}
DEFAULT = ("images", "labels", "splits")  # the paper's protocol crops the ROI from images and masks


class FetchError(RuntimeError):
    """The data set cannot be fetched; the message says what, where and what to do."""


def fetch(
    root: Path,
    ask: Callable[[str], bool],
    parts: Sequence[str] = DEFAULT,
    modality: str | None = None,
    cases: int | None = None,
    endpoint: str | None = None,
) -> int:
    """Download the chosen parts to `root` in the release's layout; return their number of files.

    `modality` (t1 or t2) and `cases` (the number of first names per modality) choose volumes. If a file is
    missing, `ask` gets license, sizes and free disk space, and returns whether to download. Raises
    FetchError; the same call then downloads the files that are still missing.
    """
    with _explained(root):
        info = HfApi(endpoint=endpoint).dataset_info(REPO, timeout=60)
        at = {"repo_id": REPO, "repo_type": "dataset", "revision": info.sha}
        tree = HfApi(endpoint=endpoint).list_repo_tree(**at, recursive=True)
        listing = {file.path: file for file in tree if isinstance(file, RepoFile)}
    chosen = _chosen(listing, parts, modality, cases)
    _require_own(root, listing)
    checked = {*chosen, *(path for path in listing if re.fullmatch(PARTS["labels"], path))}
    there = [listing[path] for path in sorted(checked) if (root / path).exists()]
    if wrong := _differing(root, there, "checking present files"):
        text = "differ from the hub's: changed here, damaged, updated there, or of another data set"
        raise FetchError(f"{root}: {_some(wrong)} {text}. Move them away to fetch them again")
    missing = [listing[path] for path in chosen if not (root / path).exists()]
    if not missing:
        return len(chosen)
    if not ask(_question(root, info, parts, [listing[path] for path in chosen], missing)):
        raise FetchError("download canceled")
    with _explained(root):
        names = [escape(file.path) for file in missing]
        snapshot_download(**at, local_dir=root, allow_patterns=names, endpoint=endpoint)
    if wrong := _differing(root, missing, "verifying"):
        for path in wrong:
            (root / path).unlink(missing_ok=True)
        raise FetchError(f"{root}: {_some(wrong)} arrived damaged; run the same command again")
    return len(chosen)


def _question(root, info, parts, chosen, missing):
    """The question whether to download, with license and sizes; FetchError if the disk is too full."""
    total, to_come = (sum(file.size for file in files) for files in (chosen, missing))
    free = shutil.disk_usage(next(p for p in (root, *root.absolute().parents) if p.exists())).free
    if to_come > free:
        remedy = "free disk space, choose another folder, or fetch less (--only, --modality, --cases)"
        raise FetchError(f"{root}: {_size(free)} free, {_size(to_come)} to download; {remedy}")
    license = getattr(info.card_data, "license", None) or f"{LICENSE} (the hub does not say)"
    return (
        f"{PAGE}, revision {info.sha[:12]}\nlicense: {_printable(license)}\n"
        f"{', '.join(parts)}: {len(chosen)} files, {_size(total)}\n"
        f"to download: {len(missing)} files, {_size(to_come)}; free: {_size(free)}\nDownload to {root}?"
    )


def _chosen(listing, parts, modality, cases):
    """The chosen paths; FetchError for a part without files and for a name that may leave the folder."""
    if cases is not None and cases < 1:
        raise FetchError(f"--cases {cases}: give a number from 1")
    found = {}
    for path, part in product(listing, parts):
        if (match := re.fullmatch(PARTS[part], path)) and match[1] in ("", modality or match[1]):
            found[path] = match[1], case_name(path.split("/")[-1]).casefold()
    for part in parts:
        if not any(re.fullmatch(PARTS[part], path) for path in found):
            raise FetchError(f"{PAGE} lists no {part} {modality or ''}: check there if the layout changed")
    for path in found:
        if re.search(r"(^|/)\.{0,2}(/|$)|[\\:]", path) or not path.isprintable():
            raise FetchError(f"the hub lists {path!r}, a path that may leave the folder: report it")
    volumes = {m: dict.fromkeys(name for k, name in found.values() if k == m) for m in ("t1", "t2")}
    first = {m: list(names)[:cases] for m, names in volumes.items()}
    return [path for path, (m, name) in found.items() if not m or name in first[m]]


def _require_own(root, listing):
    """Raise FetchError if a folder has volumes or sheets of another data set, or only other files."""
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    there = [p.as_posix() for p in paths if not any(part.startswith((".", "~")) for part in p.parts)]
    others = sorted(set(there) - listing.keys())
    data = [name for name in others if name.lower().endswith((".nii", ".nii.gz", ".xlsx"))]
    if data or (others and len(others) == len(there)):
        text = f"is not part of {REPO}: give a new folder, or that of an earlier fetch"
        raise FetchError(f"{root} has another data set: {_some(data or others)} {text}")


def _differing(root, files, why):
    """Paths of files that differ from the hub's checksum (sha256 for large files, else git's)."""

    def differs(file):
        path = root / file.path
        if not path.is_file():
            return True
        return digest(path) != file.lfs.sha256 if file.lfs else git_hash(path.read_bytes()) != file.blob_id

    return [file.path for file in tqdm(files, why, leave=False, disable=None) if differs(file)]


@contextmanager
def _explained(root):
    """A block in which any library's error becomes a FetchError."""
    try:
        yield
    except Exception as error:
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status, remedy = getattr(response, "status_code", None), f"see {PAGE}"
        if status in (401, 403):
            text = f"{REPO} is gated, private or gone (status {status})"
            remedy = f"accept its terms at {PAGE} and log in with `hf auth login`"
        elif status == 404:
            text = f"the hub no longer has {_printable(unquote(response.url.path))}"
        elif getattr(error, "errno", None):
            text = f"{root} cannot be written: {error.strerror}"
            remedy = "free disk space, or choose another folder"
        else:
            text = f"the connection to the hub failed ({type(error).__name__}: {_printable(error)})"
            remedy = "check the network (HTTPS_PROXY names a proxy)"
        text = f"{text}; {remedy}, then run the same command again: downloaded files are kept"
        raise FetchError(text) from error


def _some(paths):
    return ", ".join(map(repr, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _size(n):
    return tqdm.format_sizeof(n, "B")


def _printable(text):
    """A text from the network, shortened, on one line, without control characters."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:300]
