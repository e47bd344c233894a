"""Read one scan with its mask, check it, and cut its ROI."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from scipy import ndimage

from ipmn_core.data import headers
from ipmn_core.params import Preprocessing

PANCREAS_MM = 10, 250  # plausible length of an ROI; a pancreas is 120 to 150 mm long
UNKNOWN_AXES = "unknown"
MOST_VOXELS = 2**26  # of a resampled ROI


class ScanError(ValueError):
    """A scan that cannot be used, raised with case, file, problem and remedy."""

    def __str__(self) -> str:
        case, where, problem, remedy = self.args
        return f"{case}: {where} {problem}; {remedy}"


@dataclass(frozen=True)
class Scan:
    """A usable scan: `image`, `mask` (X, Y, Z) bool or None, both in the set orientation, and its `roi`.

    `remarks` (severity, where, problem, remedy) list doubts and choices; `axes` are as stored; `digest` is
    the SHA-256 of the image's voxels.
    """

    image: nib.Nifti1Image
    mask: np.ndarray | None
    roi: nib.Nifti1Image
    remarks: list[tuple[str, str, str, str]]
    axes: str
    digest: str


def load_roi(image, mask=None, case="", how: Preprocessing | None = None) -> nib.Nifti1Image:
    """The clean ROI of a scan (see `read_scan`)."""
    return read_scan(image, mask, case, how).roi


def read_scan(
    image: str | Path, mask: str | Path | None = None, case: str = "", how: Preprocessing | None = None
) -> Scan:
    """Read a scan with its mask, check it, and cut its clean ROI: image x mask in the mask's tight box.

    Without a mask the image is already an ROI. If `how` says so, axes are turned and voxels resampled first.
    Without `how`, what only some settings refuse is a warning. Raises ScanError for a scan that cannot be
    used. Cohorts, predictions and the sites of a federation share this check.
    """
    case, settings = case or str(image), how or Preprocessing()
    stored, remarks = _load(image, case)
    lost, organ, whole = _lost(remarks), None, _turned(stored, settings)
    with np.errstate(over="ignore"):
        digest = hashlib.sha256(np.float32(stored.dataobj).tobytes()).hexdigest()
    if mask:
        drawn, more = _load(mask, case)
        if settings.orientation == "canonical" and _lost(remarks + more):
            drawn = nib.Nifti1Image(drawn.dataobj, stored.affine)  # voxel by voxel
        drawn = _turned(drawn, settings)
        organ, chosen = _organ(drawn, whole, mask, case)
        remarks += chosen + [row for row in more if row[2] not in [problem for _, _, problem, _ in remarks]]
        if headers.apart(whole.affine, drawn.affine, whole.shape):
            problem = f"{headers.APART}: its affine and that of {mask} differ"
            remedy = "check that the mask covers the pancreas: it is used voxel by voxel"
            remarks.append(("warning", image, problem, remedy))
    if settings.spacing and lost:
        problem = "cannot be resampled: its header does not tell its spacing"
        raise ScanError(case, image, problem, "export it with its spacing, or set `spacing` to null")
    fine, inside = whole, organ
    if settings.spacing:
        fine, inside = resample(whole, organ, settings.spacing, case, image)
    roi = fine if inside is None else crop(fine, inside)
    found = _doubts_of_values(fine, inside, settings, case, image)
    found += _doubts_of_shape(roi, organ, lost)
    for severity, problem, remedy in found:
        if severity == "error" and how:
            raise ScanError(case, image, problem, remedy)
        remarks.append(("warning", image, problem, remedy))
    axes = UNKNOWN_AXES if lost else headers.axes_of(stored.affine)
    return Scan(whole, organ, roi, remarks, axes, digest)


def _load(path, case):
    """The volume at `path`, with a new header without the file's text, and remarks on the file."""
    try:
        data, affine, doubts = headers.read(path)
    except Exception as error:  # nibabel and zlib each raise their own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "replace it by a complete NIfTI file (.nii or .nii.gz)"
        raise ScanError(case, path, f"cannot be read ({reason})", remedy) from error
    given = data.shape
    if set(given[3:]) == {1}:
        data = data.reshape(given[:3])
    if data.ndim != 3 or min(data.shape) < 2 or data.dtype.names or data.dtype.kind not in "iuf":
        problem = f"has shape {given} and type {data.dtype}"
        remedy = "export one 3D volume of real numbers, two slices or more per axis"
        raise ScanError(case, path, problem, remedy)
    if data.dtype.itemsize >= 8:  # nibabel cannot hold 64-bit integers
        data = data.astype(float, copy=False)
    if not np.isfinite(data).all():
        n = data.size - np.isfinite(data).sum()
        raise ScanError(case, path, f"has {n} voxels that are NaN or infinite", "replace them by numbers")
    remarks = [(severity, str(path), problem, remedy) for severity, problem, remedy in doubts]
    return nib.Nifti1Image(data, affine), remarks


def _lost(remarks):
    return any(problem.startswith(headers.UNKNOWN) for _, _, problem, _ in remarks)


def _turned(image, how):
    return nib.as_closest_canonical(image) if how.orientation == "canonical" else image


def _organ(drawn, image, path, case):
    """The voxels (X, Y, Z) bool that the mask from `path` marks, and a remark if their value is not 1."""
    mask = np.asanyarray(drawn.dataobj)
    if mask.shape != image.shape:
        problem = f"has shape {mask.shape}, its image {image.shape}"
        remedy = "draw it on this image, or resample it to the image's grid (nearest voxel)"
        raise ScanError(case, path, problem, remedy)
    value = float(mask.max())
    organ = mask > value / 2
    if not mask.any():
        raise ScanError(case, path, "is an empty mask", "draw the pancreas")
    with np.errstate(all="ignore"):
        is_one = value > 0 and np.abs(mask / np.float32(value) - organ).max() <= 0.01
    if not is_one:
        raise ScanError(case, path, "has several values besides 0", "keep one organ, the pancreas")
    problem = f"value of the mask: its voxels of {value:.6g} are used as the pancreas"
    return organ, [] if abs(value - 1) <= 0.01 else [("warning", path, problem, "check that they are")]


def _doubts_of_values(image, inside, how, case, path):
    """Doubts about the voxels `inside` an ROI (None: the non-zero ones); errors are what its settings refuse.

    Raises ScanError for voxels that cannot be those of an image.
    """
    voxels, where = np.asanyarray(image.dataobj), "inside the mask"
    if inside is None:
        inside, where = voxels != 0, "in its non-zero voxels"
    values = voxels[inside]
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    with np.errstate(all="ignore"):
        span = np.subtract(*np.float32([high, low]))  # the divisor in `to_cube`
    if not np.finfo(np.float32).tiny <= span < np.inf:
        problem = f"cannot be scaled, {where} its values are {low:.9g} to {high:.9g}"
        raise ScanError(case, path, problem, "check that it is this case's image, not blank and not a mask")
    if ((values == low) | (values == high)).all():
        problem = f"is not an image, {where} it has only the values {low:.9g} and {high:.9g}"
        raise ScanError(case, path, problem, "give the image, not a mask")
    doubts, minmax = [], how.intensity == "minmax"
    if minmax and low < 0 and where == "inside the mask":
        problem = "negative values inside the mask: min-max makes the zero outside gray"
        doubts.append(("warning", problem, "set `intensity` to zscore"))
    elif minmax and low < 0 and values.size < 0.95 * voxels.size:
        problem = "already scaled: an ROI with negative values inside and zero outside, as after a z-score"
        doubts.append(("error", problem, "set `intensity` to none, or to zscore if it is not z-scored"))
    if minmax and np.percentile(values, 99.9) - low < 0.1 * (high - low):
        problem = f"a few voxels far brighter than all others: {high:.6g}, 99.9 % are below a tenth of it"
        doubts.append(("warning", problem, "check for an artifact: min-max darkens the other voxels"))
    if how.intensity == "none" and max(-low, high) > np.finfo(np.float16).max:
        problem = f"too large for cubes (float16): values from {low:.6g} to {high:.6g}"
        doubts.append(("error", problem, "set `intensity` to minmax or zscore"))
    return doubts


def _doubts_of_shape(roi, organ, lost):
    """Doubts about an ROI's size (unless its spacing is `lost`) and about its mask's pieces."""
    doubts, longest = [], float(np.max(np.multiply(roi.shape, roi.header.get_zooms())))
    if not lost and not PANCREAS_MM[0] <= longest <= PANCREAS_MM[1]:
        problem = f"size of the ROI: it is {longest:.3g} mm long, a pancreas 120 to 150 mm"
        doubts.append(("warning", problem, "check mask and voxel size"))
    if min(roi.shape) < 2:
        doubts.append(("warning", "one slice: the ROI is one voxel thin", "draw the mask on all slices"))
    if organ is not None:
        cut = organ[bounding_box(organ)]
        pieces, n = ndimage.label(cut, np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())
        stray = np.flatnonzero(sizes < 0.01 * cut.sum())
        kept = cut & ~np.isin(pieces, stray) if n > 1 else cut
        if math.prod(kept[bounding_box(kept)].shape) < 0.7 * cut.size:
            problem = f"stray voxels: {cut.sum() - kept.sum()} voxels of the mask, far from the others"
            doubts.append(("warning", problem + ", enlarge the ROI", "erase them if they are not pancreas"))
    return doubts


def resample(image, mask, spacing: float, case: str = "", path: str | Path = ""):
    """Image (linear) and `mask` (nearest, or None) in voxels of `spacing` mm, cut to what the mask needs.

    The rule of the newer release of the data set (Cyst-X): size round(old size x old spacing / new spacing);
    the first voxel keeps its place. Departs from the paper: it resamples nothing. Raises ScanError if the
    result is too large.
    """
    step = spacing / voxel_sizes(image.affine)
    if np.allclose(step, 1, rtol=1e-4):
        return image, mask
    shape = [max(1, round(n / s)) for n, s in zip(image.shape, step, strict=True)]
    at = [np.arange(min(n, MOST_VOXELS)) for n in shape]
    if mask is not None:
        near = [np.floor(k * s + 0.5).astype(int) for k, s in zip(at, step, strict=True)]
        sides = zip(at, near, step, bounding_box(mask), mask.shape, strict=True)
        keep = [(i >= b.start) & (i < b.stop) & (k * s < n - 1 + 1e-9) for k, i, s, b, n in sides]
        at, near = ([a[k] for a, k in zip(every, keep, strict=True)] for every in (at, near))
    size = [len(k) for k in at]
    fits = max(shape) <= MOST_VOXELS and 0 < math.prod(size) <= MOST_VOXELS
    if fits and mask is not None:
        mask = mask[np.ix_(*near)]
    if not fits or (mask is not None and not mask.any()):
        problem = f"gives an ROI of {' x '.join(map(str, size))} voxels of {spacing:g} mm"
        raise ScanError(case, path, problem, "check the spacing in its header, and its mask")
    first = np.array([k[0] for k in at])
    mode = "constant" if mask is None else "nearest"
    voxels, affine = np.asanyarray(image.dataobj), image.affine @ np.diag([*step, 1])
    fine = ndimage.affine_transform(np.float32(voxels), step, first * step, size, order=1, mode=mode)
    return nib.Nifti1Image(fine, affine @ from_matvec(np.eye(3), first)), mask


def crop(image: nib.Nifti1Image, mask: np.ndarray) -> nib.Nifti1Image:
    """`image` inside `mask`, zero elsewhere, cut to the mask's tight box, with the affine of the box."""
    box = bounding_box(mask)
    cut = image.slicer[box]
    return nib.Nifti1Image(np.where(mask[box], np.asanyarray(cut.dataobj), 0), cut.affine)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The tightest box around the true voxels of `mask`: one slice per axis."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]
