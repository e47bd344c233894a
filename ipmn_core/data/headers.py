"""NIfTI files: voxels, affine, and what a header leaves in doubt.

Text in a header may name a patient. It never leaves this module.
"""

import gzip
import io
import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np

QUIET = logging.getLogger(__name__)  # nibabel would print every field of a header that it fixes
QUIET.disabled = True


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, scaled as the header says, and affine (4, 4) of a .nii or .nii.gz file.

    The file is read to its end, where gzip's checksum shows damage that `nibabel.load` does not see. Raises
    the errors of nibabel, gzip and zlib, and OSError if it is no NIfTI or too short for its header.
    """
    with _opened(path) as file:
        content = file.read()
    header = _header(content)
    n_bytes = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if n_bytes > len(content):  # nibabel would make room for them
        raise OSError(f"its header promises {n_bytes} bytes of voxels; the file is too short for them")
    return header.data_from_fileobj(io.BytesIO(content)), placing(header.get_best_affine())


def placing(affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4), or the identity if it cannot be inverted in the single precision of headers."""
    with np.errstate(over="ignore"):
        single = np.float32(affine).astype(float)
    return affine if np.isfinite(single).all() and np.linalg.matrix_rank(single[:3, :3]) == 3 else np.eye(4)


def spacing_doubt(path: str | Path) -> str:
    """Why the voxel size of a file is in doubt, "" if it is not."""
    affine = _affine(path)
    if np.array_equal(np.abs(affine), np.eye(4)):
        return "voxels of 1 x 1 x 1 mm without turn and origin, as in files that lost them"
    return "" if placing(affine) is affine else "an affine that cannot be inverted"


def remarks(image: str, mask: str) -> list[tuple[str, str, str]]:
    """Where, problem and remedy of what the headers of a sound image and mask ("": none) leave open."""
    remarks = []
    if doubt := spacing_doubt(image):
        remedy = "export it again with its spacing; the cubes do without"
        remarks.append((image, f"spacing unknown: its header has {doubt}", remedy))
    if mask and not np.allclose(placing(_affine(image)), placing(_affine(mask)), atol=1e-3):  # mm
        problem = f"image and mask in different places: its affine and that of {mask} differ"
        remarks.append((image, problem, "see that the mask covers the pancreas: it is taken voxel by voxel"))
    return remarks


def _opened(path):
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def _affine(path):
    with _opened(path) as file:
        return _header(file.read(nib.Nifti2Header.sizeof_hdr)).get_best_affine()


def _header(content):
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(content):
            header = kind(content[: kind.sizeof_hdr], check=False)
            zooms = np.abs(header["pixdim"][1:4])
            header.check_fix(QUIET)
            header["pixdim"][1:4] = zooms  # nibabel takes a zero one for 1 mm, which hides that it is unknown
            return header
    raise OSError("it is no NIfTI file")
