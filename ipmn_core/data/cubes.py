"""A scan becomes an ROI, the ROI a cube of voxels in [0, 1]; cubes are kept on disk, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
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

RECIPE = "mask, tight box, masked voxels, min-max, area resize by axis, float16"  # part of the cache's key


class ScanError(ValueError):
    """A scan that cannot be used; its arguments are case, file, problem and remedy, its text one sentence."""

    def __str__(self) -> str:
        case, where, problem, remedy = self.args
        return f"{case}: {where} {problem}; {remedy}"


@dataclass(frozen=True)
class Cubes:
    """`array` (N, S, S, S) float16 in [0, 1], row i for row i of the scans; `key` fingerprints the data."""

    array: np.ndarray
    key: str


def load_image(path: str | Path, case: str, where: str = "") -> nib.Nifti1Image:
    """The 3D volume at `path`, read into memory. Raises ScanError unless it is 3D, real and finite.

    Its header is new: affine and shape, none of the text that the file's may hold. Errors name `where`,
    normally the path.
    """
    where = where or str(path)
    try:
        data, affine = headers.read(path)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "download it again, or clear its label to leave the scan out"
        raise ScanError(case, where, f"cannot be read ({reason})", remedy) from error
    if data.ndim != 3 or min(data.shape) < 2 or data.dtype.names or data.dtype.kind not in "iuf":
        expected = "expected one 3D volume of real numbers, at least two slices per axis"
        problem = f"has shape {data.shape} and type {data.dtype}; {expected}"
        raise ScanError(case, where, problem, "export it again")
    if data.dtype.itemsize >= 8:  # nibabel makes no image of 64-bit integers
        data = data.astype(float, copy=False)
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ScanError(case, where, f"has {bad} voxel(s) that are NaN or infinite", "export it again")
    return nib.Nifti1Image(data, affine)


def load_mask(path: str | Path, shape: tuple[int, ...], case: str) -> np.ndarray:
    """The mask at `path` as a boolean array of `shape`. Raises ScanError if it is not one or is empty."""
    where = f"mask {path}"
    mask = np.asanyarray(load_image(path, case, where).dataobj)
    if mask.shape != shape:
        problem = f"has shape {mask.shape}, its image {shape}"
        raise ScanError(case, where, problem, "they must agree: draw it on this image")
    organ = mask > 0.5
    if np.abs(np.subtract(mask, organ, dtype=np.float32)).max() > 0.01:
        raise ScanError(case, where, "holds values other than 0 and 1", "keep one organ, the pancreas")
    if not organ.any():
        raise ScanError(case, where, "is empty", "draw the pancreas, or leave the case out")
    return organ


def load_roi(image: str | Path, mask: str | Path | None = None, case: str = "") -> nib.Nifti1Image:
    """The clean ROI: image x mask, cut to the mask's tight bounding box, with the affine of the cut.

    Without a mask the image is taken to be a clean ROI already (the data set's first release).
    Raises ScanError on an empty or ill-shaped mask, or on an ROI of one single value.
    """
    case = case or str(image)
    roi = load_image(image, case)
    if mask:
        inside = load_mask(mask, roi.shape, case)
        roi = nib.Nifti1Image(*crop(np.asanyarray(roi.dataobj), roi.affine, inside))
    check_range(np.asanyarray(roi.dataobj), image, mask, case)
    return roi


def check_range(roi: np.ndarray, image: str | Path, mask: str | Path | None, case: str) -> None:
    """Raise ScanError if the ROI of a case, read from `image` and `mask`, cannot be scaled to 0-1."""
    with np.errstate(over="ignore"):
        span = np.subtract(*np.float32([roi.max(), roi.min()]))  # as `to_cube` will divide by it
    if not np.isfinite(span):
        raise ScanError(case, image, f"has values up to {np.abs(roi).max():.3g}", "scale them below 1e38")
    if span < np.finfo(np.float32).tiny:
        problem = f"gives an ROI of one single value, {roi.flat[0]}"
        raise ScanError(case, image, problem, f"check it and its mask {mask}" if mask else "export it again")


def crop(image: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`image` inside `mask`, zero elsewhere, cut to the mask's tight box; the affine's origin moves along."""
    box = bounding_box(mask)
    affine = affine.copy()
    affine[:3, 3] = apply_affine(affine, [side.start for side in box])
    return np.where(mask[box], image[box], 0), affine


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The tightest box around the true voxels of `mask`, a slice for each axis."""
    others = (tuple(b for b in range(mask.ndim) if b != a) for a in range(mask.ndim))
    spans = [np.flatnonzero(mask.any(axis=axes)) for axes in others]  # a fifth of the time of np.nonzero
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
    """What the scanner left in each scan: one row per scan, columns case_id, center, modality, label,
    in_plane_mm, slice_mm, slices, and roi_median, the median stored intensity of the non-zero ROI voxels.
    """
    facts = pd.DataFrame(in_threads(jobs, _facts_of, scans[["image", "mask", "case_id"]]))
    return scans[["case_id", "center", "modality", "label"]].reset_index(drop=True).join(facts)


def _facts_of(image, mask, case):
    roi = nib.as_closest_canonical(load_roi(image, mask, case))  # slices along the last axis
    data, zooms = np.asanyarray(roi.dataobj), roi.header.get_zooms()
    median = float(np.median(data[data != 0]))
    return {"in_plane_mm": zooms[0], "slice_mm": zooms[2], "slices": data.shape[2], "roi_median": median}


def load_cubes(scans: pd.DataFrame, size: int, folder: str | Path, jobs: int = 1) -> Cubes:
    """The cubes of all `scans`, from the cache in `folder` or built into it by `jobs` threads.

    The cache is keyed by recipe, size and the files' contents, so a changed file is never served stale.
    Raises ScanError naming the case for the first scan that cannot be used; nothing is cached then. What else
    the headers leave open (see `check.volume_problems`) is counted in a warning when the cubes are built.
    """
    rows = scans[["image", "mask", "case_id"]]
    files = [[path] for path in rows[["image", "mask"]].to_numpy().ravel()]
    content = [RECIPE, size, list(in_threads(jobs, _hash_of, files))]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = Path(folder) / f"cubes{size}_{key[:16]}.npy"
    if not path.exists():
        _build(path, rows, size, jobs)
    return Cubes(np.load(path, mmap_mode="r"), key)


def in_threads(jobs, function, rows):
    """An iterator over the results of `function(*row)` for each of `rows`, in order, by `jobs` threads."""
    rows = rows.itertuples(index=False, name=None) if isinstance(rows, pd.DataFrame) else rows
    calls = (delayed(function)(*row) for row in rows)
    return Parallel(n_jobs=jobs, backend="threading", return_as="generator")(calls)


def _hash_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _build(path, rows, size, jobs):
    """Write the cubes of `rows` (image, mask, case) to `path`, an .npy file, and warn of doubtful headers."""
    import torch

    def cube_of(image, mask, case):
        return to_cube(np.asanyarray(load_roi(image, mask, case).dataobj), size)

    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"descr": "<f2", "fortran_order": False, "shape": (len(rows), size, size, size)}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))  # `jobs` of them share the cores
    try:  # no memory map, which a full disk ends with a SIGBUS
        with disk.atomic(path) as tmp, open(tmp, "wb") as file:
            np.lib.format.write_array_header_1_0(file, layout)
            cubes = in_threads(jobs, cube_of, rows)
            for cube in tqdm(cubes, "preprocessing", len(rows), unit="scan", mininterval=1):
                file.write(cube.tobytes())
    finally:
        torch.set_num_threads(threads)
    remarks = [r for scan in rows.itertuples() for r in headers.remarks(scan.image, scan.mask)]
    for kind, n in Counter(problem.partition(":")[0] for _, problem, _ in remarks).items():
        first = next(where for where, problem, _ in remarks if problem.startswith(kind))
        text = f"{kind}: {n} of {len(rows)} scans, the first {first}; `ipmn check` names them all"
        warnings.warn(text, stacklevel=3)
