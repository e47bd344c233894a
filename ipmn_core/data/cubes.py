"""A scan becomes an ROI, the ROI a cube of voxels in [0, 1]; cubes are kept on disk, memory-mapped."""

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import ndimage
from tqdm import tqdm

from ipmn_core import disk
from ipmn_core.data import headers

FILES = ["image", "mask", "case_id"]  # what it takes to read a scan
RECIPE = "mask, tight box, masked voxels, min-max, area resize by axis, float16"  # part of the cache's key


class ScanError(ValueError):
    """A scan that cannot be used, raised with case, file, problem and remedy."""

    def __str__(self) -> str:
        case, where, problem, remedy = self.args
        return f"{case}: {where} {problem}; {remedy}"


def load_image(path: str | Path, case: str) -> nib.Nifti1Image:
    """The volume at `path`, with a new header: affine and shape, none of the text that the file's may hold.

    Raises ScanError unless it is 3D, real and finite.
    """
    try:
        data, affine = headers.read(path)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "download it again, or clear its label to leave the scan out"
        raise ScanError(case, path, f"cannot be read ({reason})", remedy) from error
    if data.ndim != 3 or min(data.shape) < 2 or data.dtype.names or data.dtype.kind not in "iuf":
        problem = f"has shape {data.shape} and type {data.dtype}"
        raise ScanError(
            case, path, problem, "export one 3D volume of real numbers, two slices or more per axis"
        )
    if data.dtype.itemsize >= 8:  # nibabel makes no image of 64-bit integers
        data = data.astype(float, copy=False)
    if not np.isfinite(data).all():
        raise ScanError(case, path, "has voxels that are NaN or infinite", "export it again")
    return nib.Nifti1Image(data, affine)


def load_mask(path: str | Path, shape: tuple[int, ...], case: str) -> np.ndarray:
    """The mask at `path` as a boolean array of `shape`. Raises ScanError if it is not one or is empty."""
    mask = np.asanyarray(load_image(path, case).dataobj)
    if mask.shape != shape:
        raise ScanError(case, path, f"has shape {mask.shape}, its image {shape}", "draw it on this image")
    organ = mask > 0.5
    if np.abs(np.subtract(mask, organ, dtype=np.float32)).max() > 0.01:
        raise ScanError(case, path, "holds values other than 0 and 1", "keep one organ, the pancreas")
    if not organ.any():
        raise ScanError(case, path, "is an empty mask", "draw the pancreas, or leave the case out")
    return organ


def load_roi(image: str | Path, mask: str | Path | None = None, case: str = "") -> nib.Nifti1Image:
    """The clean ROI: image x mask, cut to the mask's tight box; without a mask the image is one already.

    Raises ScanError if image, mask or ROI cannot be used.
    """
    case = case or str(image)
    roi = load_image(image, case)
    if mask:
        roi = crop(roi, load_mask(mask, roi.shape, case))
    check_range(np.asanyarray(roi.dataobj), image, case)
    return roi


def check_range(roi: np.ndarray, image: str | Path, case: str) -> None:
    """Raise ScanError if the ROI of a case, read from `image`, cannot be scaled to 0-1 in float32."""
    with np.errstate(over="ignore"):
        span = np.subtract(*np.float32([roi.max(), roi.min()]))  # as `to_cube` will divide by it
    if not np.finfo(np.float32).tiny <= span < np.inf:
        problem = f"gives an ROI that cannot be scaled, its values are {roi.min():.9g} to {roi.max():.9g}"
        raise ScanError(case, image, problem, "check it and its mask")


def crop(image: nib.Nifti1Image, mask: np.ndarray) -> nib.Nifti1Image:
    """`image` inside `mask`, zero elsewhere, cut to the mask's tight box; the affine's origin moves along."""
    box = bounding_box(mask)
    cut = image.slicer[box]
    return nib.Nifti1Image(np.where(mask[box], np.asanyarray(cut.dataobj), 0), cut.affine)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The tightest box around the true voxels of `mask`, a slice for each axis."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


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
    """Case_id, center, modality, label, in_plane_mm, slice_mm, slices and roi_median of each scan.

    The last is the median stored intensity of the non-zero ROI voxels.
    """
    facts = pd.DataFrame(in_threads(jobs, _facts_of, scans[FILES].to_numpy()))
    return scans[["case_id", "center", "modality", "label"]].reset_index(drop=True).join(facts)


def _facts_of(image, mask, case):
    roi = nib.as_closest_canonical(load_roi(image, mask, case))  # slices along the last axis
    data, zooms = np.asanyarray(roi.dataobj), roi.header.get_zooms()
    median = float(np.median(data[data != 0]))
    return {"in_plane_mm": zooms[0], "slice_mm": zooms[2], "slices": data.shape[2], "roi_median": median}


def load_cubes(scans: pd.DataFrame, size: int, folder: str | Path, jobs: int = 1) -> tuple[np.ndarray, str]:
    """The cubes of all `scans`, (N, S, S, S) float16 in [0, 1], memory-mapped, and their key (SHA-256).

    They come from the cache in `folder`, or are built into it by `jobs` threads. The key is that of recipe,
    size and the files' contents, so a changed file is never served stale. Raises ScanError for the first scan
    that cannot be used, and caches nothing then. Warns of headers that leave something open
    (`headers.remarks`) when it builds.
    """
    files = scans[FILES].to_numpy()
    hashes = list(in_threads(jobs, _hash_of, files[:, :2].reshape(-1, 1)))
    key = hashlib.sha256(json.dumps([RECIPE, size, hashes]).encode()).hexdigest()
    path = Path(folder) / f"cubes{size}_{key[:16]}.npy"
    if not path.exists():
        _build(path, files, size, jobs)
    return np.load(path, mmap_mode="r"), key


def in_threads(jobs, function, rows):
    """An iterator over the results of `function(*row)` for each of `rows`, in order, by `jobs` threads."""
    calls = (delayed(function)(*row) for row in rows)
    return Parallel(n_jobs=jobs, backend="threading", return_as="generator")(calls)


def _hash_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _build(path, files, size, jobs):
    """Write the cubes of `files` to `path`, an .npy file, and warn of doubtful headers."""
    import torch

    def cube_of(image, mask, case):
        return to_cube(np.asanyarray(load_roi(image, mask, case).dataobj), size)

    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"descr": "<f2", "fortran_order": False, "shape": (len(files), size, size, size)}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))  # `jobs` of them share the cores
    try:  # no memory map, which a full disk ends with a SIGBUS
        with disk.atomic(path) as tmp, open(tmp, "wb") as file:
            np.lib.format.write_array_header_1_0(file, layout)
            cubes = in_threads(jobs, cube_of, files)
            for cube in tqdm(cubes, "preprocessing", len(files), unit="scan", mininterval=1):
                file.write(cube.tobytes())
    finally:
        torch.set_num_threads(threads)
    remarks = [remark for image, mask, _ in files for remark in headers.remarks(image, mask)]
    for kind, n in Counter(problem.partition(":")[0] for _, problem, _ in remarks).items():
        warnings.warn(f"{kind}: {n} of {len(files)} scans; `ipmn check` names them", stacklevel=3)
