"""A scan becomes an ROI, the ROI a cube of voxels in [0, 1]; cubes are kept on disk, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nibabel.affines import apply_affine
from tqdm import tqdm

from ipmn_core import disk
from ipmn_core.data import headers
from ipmn_core.data.cohort import PROBLEM_COLUMNS, Cohort, open_cohort, subset
from ipmn_core.data.headers import Header

RECIPE = "mask, tight box, masked voxels, min-max, area resize by axis, float16"  # part of the cache's key
SPACING = "spacing unknown"
PLACES = "image and mask in different places"


class ScanError(ValueError):
    """A scan cannot be used; its arguments are case, file, problem and remedy, its text all in a sentence."""

    def __str__(self) -> str:
        case, where, problem, remedy = self.args
        return f"{case}: {where} {problem}; {remedy}"


@dataclass(frozen=True)
class Cubes:
    """`array` (N, S, S, S) float16 in [0, 1], row i for row i of the scans; `key` fingerprints the data."""

    array: np.ndarray
    key: str


def load_image(path: str | Path, case: str) -> nib.Nifti1Image:
    """The 3D volume at `path`, read into memory. Raises ScanError unless it is 3D, real and finite.

    Its header is new: affine and shape, none of the text that the file's may hold.
    """
    said = []
    return nib.Nifti1Image(_read(path, case, said), said[0].affine)


def _read(path: str | Path, case: str, said: list[Header], where: str = "") -> np.ndarray:
    """The voxels of `load_image`; `said` gets the header, even if they are refused."""
    where = where or str(path)
    try:
        data, header = headers.read(path)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "download it again, or clear its label to leave the scan out"
        raise ScanError(case, where, f"cannot be read ({reason})", remedy) from error
    said.append(header)
    kind = f"has shape {data.shape} and type {data.dtype}"
    if data.ndim != 3 or data.dtype.names or data.dtype.kind not in "iuf":
        raise ScanError(case, where, f"{kind}; expected one 3D volume of real numbers", "export it again")
    if min(data.shape) < 2:
        raise ScanError(case, where, f"{kind}; a volume needs at least two slices an axis", "export it again")
    if data.dtype.itemsize >= 8:  # nibabel makes no image of 64-bit integers
        data = data.astype(float, copy=False)
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ScanError(case, where, f"has {bad} voxel(s) that are NaN or infinite", "export it again")
    return data


def load_roi(image: str | Path, mask: str | Path | None = None, case: str = "") -> nib.Nifti1Image:
    """The clean ROI: image x mask, cut to the mask's tight bounding box, with the affine of the cut.

    Without a mask the image is taken to be a clean ROI already (the data set's first release).
    Raises ScanError on an empty or ill-shaped mask, or on an ROI of one single value.
    """
    return nib.Nifti1Image(*_read_roi(image, mask, case or str(image), []))


def _read_roi(
    image: str | Path, mask: str | Path | None, case: str, said: list[Header]
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of `load_roi`; `said` gets the headers of image and mask, even if it then raises."""
    roi = _read(image, case, said)
    affine = said[0].affine
    if mask:
        roi, affine = crop(roi, affine, _read_mask(mask, roi.shape, case, said))
    check_range(roi, image, mask, case)
    return roi, affine


def check_range(roi: np.ndarray, image: str | Path, mask: str | Path | None, case: str) -> None:
    """Raises ScanError if the ROI of a case, read from `image` and `mask`, cannot be scaled to 0-1."""
    with np.errstate(over="ignore"):
        span = np.subtract(*np.float32([roi.max(), roi.min()]))  # as `to_cube` will divide by it
    if not np.isfinite(span):
        raise ScanError(case, image, f"has values up to {np.abs(roi).max():.3g}", "scale them below 1e38")
    if span < np.finfo(np.float32).tiny:
        problem = f"gives an ROI of one single value, {roi.flat[0]}"
        raise ScanError(case, image, problem, f"check it and its mask {mask}" if mask else "export it again")


def load_mask(path: str | Path, shape: tuple[int, ...], case: str) -> np.ndarray:
    """The mask at `path` as a boolean array of `shape`. Raises ScanError if it is not one or is empty."""
    return _read_mask(path, shape, case, [])


def _read_mask(path: str | Path, shape: tuple[int, ...], case: str, said: list[Header]) -> np.ndarray:
    where = f"mask {path}"
    mask = _read(path, case, said, where)
    if mask.shape != shape:
        problem = f"has shape {mask.shape}, its image {shape}"
        raise ScanError(case, where, problem, "they must agree: draw it on this image")
    organ = mask > 0.5
    if np.abs(np.subtract(mask, organ, dtype=np.float32)).max() > 0.01:
        raise ScanError(case, where, "holds values other than 0 and 1", "keep one organ, the pancreas")
    if not organ.any():
        raise ScanError(case, where, "is empty", "draw the pancreas, or leave the case out")
    return organ


def volume_problems(scans: pd.DataFrame, progress: bool = False, jobs: int = -1) -> pd.DataFrame:
    """What is wrong with the volumes of `scans`, read by the code that training reads them with.

    Columns `cohort.PROBLEM_COLUMNS`. Errors: what training refuses. Warnings: spacing unknown, image and mask
    in different places, header extensions. Notes: text in header fields, counted by folder, never repeated.
    """
    rows = list(scans[["image", "mask", "case_id"]].itertuples(index=False, name=None))
    judging = Parallel(n_jobs=jobs, backend="threading", return_as="generator")(
        delayed(_judged)(*row) for row in rows
    )
    judged = list(tqdm(judging, "reading volumes", len(rows), unit="scan", disable=not progress))
    problems = [("error", *error.args[1:]) for _, error in judged if error]
    problems += [("warning", *remark) for said, _ in judged for remark in _remarks(said)]
    problems += _texts([header for said, _ in judged for header in said])
    return pd.DataFrame(problems, columns=PROBLEM_COLUMNS).astype(str)


def _judged(image: str, mask: str, case: str) -> tuple[list[Header], ScanError | None]:
    """The headers of a scan, as far as it was read, and the error that training would end with, if any."""
    said = []
    try:
        _read_roi(image, mask, case, said)
    except ScanError as error:
        return said, error.with_traceback(None)  # its frames would keep the voxels
    return said, None


def _remarks(said: list[Header]) -> list[tuple[str, str, str]]:
    """Where, problem and remedy of what the headers of a scan's image, and mask, leave open."""
    remarks = []
    if said and said[0].doubt:
        remedy = "export it again with its spacing; the cubes do without"
        remarks.append((said[0].path, f"{SPACING}: its header has {said[0].doubt}", remedy))
    if len(said) == 2 and headers.apart(*said):
        remedy = "see that the mask lies on the pancreas: it is taken voxel by voxel"
        remarks.append((said[0].path, f"{PLACES}: its affine and that of {said[1].path} differ", remedy))
    return remarks


def _texts(said: list[Header]) -> list[tuple[str, str, str, str]]:
    """A note, and a warning for extensions, for each folder with files whose headers hold text."""
    problems, folders = [], defaultdict(list)
    for header in said:
        folders[str(Path(header.path).parent)].append(header.text)
    remedy = "nothing here copies or prints it; clear it before you pass files on"
    for folder, texts in folders.items():
        fields = [field for field in headers.TEXT_FIELDS if any(field in text for text in texts)]
        n_fields = sum(not set(fields).isdisjoint(text) for text in texts)
        n_extended = sum(headers.EXTENSIONS in text for text in texts)
        if n_extended:
            problem = f"{n_extended} of {len(texts)} files have header extensions: they may hold patient data"
            problems.append(("warning", folder, problem, remedy))
        if n_fields:
            problem = f"{n_fields} of {len(texts)} files have text in their header ({', '.join(fields)})"
            problems.append(("note", folder, f"{problem}: it may hold patient data", remedy))
    return problems


def crop(image: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`image` inside `mask`, zero elsewhere, cut to the mask's tight box; the affine's origin moves along."""
    box = bounding_box(mask)
    affine = affine.copy()
    affine[:3, 3] = apply_affine(affine, [side.start for side in box])
    return np.where(mask[box], image[box], 0), affine


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The tightest box around the true voxels of `mask`, a slice for each axis."""
    spans = [
        np.flatnonzero(mask.any(axis=tuple(b for b in range(mask.ndim) if b != a))) for a in range(mask.ndim)
    ]
    return tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)


def to_cube(roi: np.ndarray, size: int) -> np.ndarray:
    """The ROI min-max scaled to [0, 1] and resized by area to (size, size, size), float16.

    MONAI's `ScaleIntensity` and `Resize(mode="area")` (paper, section 3). A box's mean is the mean of means
    along its axes, so each axis is averaged by itself: a tenth of the time, the same to float32's last bits.
    """
    import torch

    x = torch.from_numpy(np.ascontiguousarray(roi, dtype=np.float32))
    low, high = x.aminmax()
    x = (x - low) / (high - low)
    for length in x.shape:  # each product takes the first axis away and appends it, resized
        x = torch.tensordot(x, torch.from_numpy(area_weights(length, size)), ([0], [1]))
    return x.half().numpy()


def area_weights(length: int, size: int) -> np.ndarray:
    """How an area resize averages `length` voxels into `size`, (size, length) float32, rows that sum to 1."""
    cell = np.arange(size)[:, None]
    start, end = cell * length // size, -(-(cell + 1) * length // size)
    voxel = np.arange(length)
    return np.float32((start <= voxel) & (voxel < end)) / np.float32(end - start)


def scanner_facts(scans: pd.DataFrame, jobs: int = 1) -> pd.DataFrame:
    """What the scanner left in each scan: one row a scan, columns case_id, center, modality, label,
    in_plane_mm, slice_mm, slices, and roi_median, the median stored intensity of the non-zero ROI voxels.
    """
    rows = Parallel(n_jobs=jobs, backend="threading")(delayed(_facts_of)(s) for s in scans.itertuples())
    return scans[["case_id", "center", "modality", "label"]].reset_index(drop=True).join(pd.DataFrame(rows))


def _facts_of(scan) -> dict[str, float]:
    roi = nib.as_closest_canonical(
        load_roi(scan.image, scan.mask, scan.case_id)
    )  # slices along the last axis
    data, zooms = np.asanyarray(roi.dataobj), roi.header.get_zooms()
    median = float(np.median(data[data != 0]))
    return {"in_plane_mm": zooms[0], "slice_mm": zooms[2], "slices": data.shape[2], "roi_median": median}


def load_cubes(scans: pd.DataFrame, size: int, folder: str | Path, jobs: int = 1) -> Cubes:
    """The cubes of all `scans`, from the cache in `folder` or built into it by `jobs` threads.

    The cache is keyed by recipe, size and the files' contents, so a changed file is never served stale.
    Raises ScanError naming the case for the first scan that cannot be used; nothing is cached then. What else
    the headers leave open (see `volume_problems`) is counted in a warning when the cubes are built.
    """
    folder = Path(folder)
    rows = list(scans[["image", "mask", "case_id"]].itertuples(index=False, name=None))
    key = fingerprint(rows, size, jobs)
    path = folder / f"cubes{size}_{key[:16]}.npy"
    if not path.exists():
        _build(path, rows, size, jobs)
    return Cubes(np.load(path, mmap_mode="r"), key)


def load_cohort(p) -> Cohort:
    """The cases that a profile trains on: its cohort, cut to `max_per_cell`, with cubes from the cache.

    Raises CohortError, or ScanError naming the first case that cannot be used.
    """
    scans = subset(open_cohort(p), p.max_per_cell)
    made = load_cubes(scans, p.size, p.folder.parent / "cache", p.jobs)
    rows = scans[["case_id", "patient_id", "center", "modality", "label"]].to_csv(index=False)
    return Cohort(scans, made.array, hashlib.sha256((made.key + rows).encode()).hexdigest())


def fingerprint(rows: list[tuple[str, str, str]], size: int, jobs: int = 1) -> str:
    """A SHA-256 over the recipe, the size and the contents of every image and mask, in order."""
    files = [path for image, mask, _ in rows for path in (image, mask)]
    hashes = Parallel(n_jobs=jobs, backend="threading")(delayed(_file_hash)(path) for path in files)
    return hashlib.sha256(json.dumps([RECIPE, size, hashes]).encode()).hexdigest()


def _file_hash(path: str) -> str:
    if not path:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(path: Path, rows: list[tuple[str, str, str]], size: int, jobs: int) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))  # `jobs` of them share the cores
    path.parent.mkdir(parents=True, exist_ok=True)
    remarks = []
    try:
        ready = Parallel(n_jobs=jobs, backend="threading", return_as="generator")(
            delayed(_cube_of)(*row, size) for row in rows
        )
        ready = tqdm(ready, "preprocessing", total=len(rows), unit="scan", mininterval=1)
        disk.write(path, lambda tmp: _write(tmp, ready, (len(rows), size, size, size), remarks))
    finally:
        torch.set_num_threads(threads)
    for kind, n in Counter(problem.partition(":")[0] for _, problem, _ in remarks).items():
        first = next(where for where, problem, _ in remarks if problem.startswith(kind))
        text = f"{kind}: {n} of {len(rows)} scans, the first {first}; `ipmn check` names them all"
        warnings.warn(text, stacklevel=3)


def _write(path: Path, ready, shape: tuple[int, ...], remarks: list) -> None:
    """Cube after cube into an .npy file; not through a memory map, which a full disk ends with a SIGBUS."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for cube, said in ready:
            file.write(cube.tobytes())
            remarks += _remarks(said)


def _cube_of(image: str, mask: str, case: str, size: int) -> tuple[np.ndarray, list[Header]]:
    said = []
    return to_cube(_read_roi(image, mask, case, said)[0], size), said
