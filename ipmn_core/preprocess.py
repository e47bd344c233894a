"""A scan becomes an ROI, the ROI a cube of voxels in [0, 1]; cubes are kept on disk, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nibabel.affines import apply_affine
from tqdm import tqdm

RECIPE = "mask, tight box, masked voxels, min-max, area resize by axis, float16"  # part of the cache's key


class ScanError(ValueError):
    """A scan cannot be used; the message names the case, the file and the remedy."""


@dataclass(frozen=True)
class Cubes:
    """`array` (N, S, S, S) float16 in [0, 1], row i for row i of the scans; `key` fingerprints the data."""

    array: np.ndarray
    key: str


def load_image(path: str | Path, case: str) -> nib.Nifti1Image:
    """The 3D volume at `path`, read into memory. Raises ScanError unless it is 3D, real and finite."""
    return nib.Nifti1Image(*_read(path, case))


def _read(path: str | Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of `load_image`; an image object around them would take as long as reading a mask."""
    try:
        image = nib.load(path)
        data = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kinds
        raise ScanError(f"{case}: {path} cannot be read ({error}); fetch or export it again") from error
    if data.ndim != 3 or data.dtype.names:
        raise ScanError(
            f"{case}: {path} has shape {data.shape} and type {data.dtype}; expected one 3D volume"
        )
    if min(data.shape) < 2:
        raise ScanError(f"{case}: {path} has shape {data.shape}; a volume needs at least two slices an axis")
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ScanError(f"{case}: {path} has {bad} voxel(s) that are NaN or infinite; export it again")
    return data, image.affine


def load_roi(image: str | Path, mask: str | Path | None = None, case: str = "") -> nib.Nifti1Image:
    """The clean ROI: image x mask, cut to the mask's tight bounding box, with the affine of the cut.

    Without a mask the image is taken to be a clean ROI already (the data set's first release).
    Raises ScanError on an empty or ill-shaped mask, or on an ROI of one single value.
    """
    return nib.Nifti1Image(*_read_roi(image, mask, case or str(image)))


def _read_roi(image: str | Path, mask: str | Path | None, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of `load_roi`."""
    roi, affine = _read(image, case)
    if mask:
        roi, affine = crop(roi, affine, load_mask(mask, roi.shape, case))
    if roi.min() == roi.max():
        raise ScanError(f"{case}: the ROI holds one single value, {roi.flat[0]}; check {image} and {mask}")
    return roi, affine


def load_mask(path: str | Path, shape: tuple[int, ...], case: str) -> np.ndarray:
    """The mask at `path` as a boolean array of `shape`. Raises ScanError if it is not one or is empty."""
    mask, _ = _read(path, case)
    if mask.shape != shape:
        raise ScanError(f"{case}: mask {path} has shape {mask.shape}, its image {shape}; they must agree")
    organ = mask > 0.5
    if np.abs(np.subtract(mask, organ, dtype=np.float32)).max() > 0.01:
        raise ScanError(f"{case}: mask {path} holds values other than 0 and 1; keep one organ, the pancreas")
    if not organ.any():
        raise ScanError(f"{case}: mask {path} is empty; draw the pancreas or leave the case out")
    return organ


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


def facts(scans: pd.DataFrame, jobs: int = 1) -> pd.DataFrame:
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


def cubes(scans: pd.DataFrame, size: int, folder: str | Path, jobs: int = 1) -> Cubes:
    """The cubes of all `scans`, from the cache in `folder` or built into it by `jobs` threads.

    The cache is keyed by recipe, size and the files' contents, so a changed file is never served stale.
    Raises ScanError naming the case for the first scan that cannot be used; nothing is cached then.
    """
    folder = Path(folder)
    rows = list(scans[["image", "mask", "case_id"]].itertuples(index=False, name=None))
    key = fingerprint(rows, size, jobs)
    path = folder / f"cubes{size}_{key[:16]}.npy"
    if not path.exists():
        _build(path, rows, size, jobs)
    return Cubes(np.load(path, mmap_mode="r"), key)


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
    partial = path.with_suffix(f".{os.getpid()}.partial")
    array = np.lib.format.open_memmap(
        partial, mode="w+", dtype=np.float16, shape=(len(rows), size, size, size)
    )
    try:
        ready = Parallel(n_jobs=jobs, backend="threading", return_as="generator")(
            delayed(_cube_of)(*row, size) for row in rows
        )
        for i, cube in enumerate(tqdm(ready, "preprocessing", total=len(rows), unit="scan", mininterval=1)):
            array[i] = cube
        array.flush()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        torch.set_num_threads(threads)


def _cube_of(image: str, mask: str, case: str, size: int) -> np.ndarray:
    return to_cube(_read_roi(image, mask, case)[0], size)
