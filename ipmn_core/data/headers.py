"""NIfTI files: voxels, affine, and what a header leaves in doubt.

Text in a header may name a patient. It never leaves this module; only the names of fields that hold some do.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np

TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
EXTENSIONS = "extensions"  # besides TEXT_FIELDS: what DICOM converters, AFNI and others append
QUIET = logging.getLogger(__name__)  # nibabel would print every field of a header that it fixes
QUIET.disabled = True


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, scaled as the header says, and affine (4, 4) of a .nii or .nii.gz file.

    The file is read to its end, where gzip's checksum shows damage that `nibabel.load` does not see. Raises
    the errors of nibabel, gzip and zlib, and OSError if it is no NIfTI or too short for its header.
    """
    with _opened(path) as file:
        header, _ = _header_of(file)
        packed = isinstance(file, gzip.GzipFile)
        n_bytes = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if n_bytes > os.path.getsize(path) * (1032 if packed else 1):  # gzip packs at most 1032 to 1
            raise OSError(f"its header promises {n_bytes} bytes of voxels; the file is too short for them")
        voxels = header.data_from_fileobj(file)
        while packed and file.read(2**20):
            pass
    return voxels, placing(header.get_best_affine())


def placing(affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4), or the identity if it cannot be inverted in the single precision of headers."""
    with np.errstate(over="ignore"):
        single = np.float32(affine).astype(float)
    return affine if np.isfinite(single).all() and np.linalg.matrix_rank(single[:3, :3]) == 3 else np.eye(4)


def spacing_doubt(path: str | Path) -> str:
    """Why the voxel size of a file is in doubt, "" if it is not: a stored zoom that is zero or no number, an
    affine that cannot be inverted, or unit zooms without turn and origin, as in files that lost theirs.
    """
    header, zooms = _header(path)
    affine = header.get_best_affine()
    if not all(math.isfinite(mm) and mm for mm in zooms):
        return f"voxels of {' x '.join(f'{mm:g}' for mm in zooms)} mm"
    if zooms == (1, 1, 1) and np.array_equal(np.abs(affine), np.eye(4)):
        return "voxels of 1 x 1 x 1 mm without turn and origin, as in files that lost them"
    return "" if placing(affine) is affine else "an affine that cannot be inverted"


def text_fields(path: str | Path) -> set[str]:
    """Names of the header fields of a file, "extensions" included, that hold text."""
    header, _ = _header(path)
    fields = set(TEXT_FIELDS).intersection(header)  # NIfTI-2 lacks two
    fields = {field for field in fields if header[field].item().strip(b"\0 \t\r\n")}
    return fields | ({EXTENSIONS} if header.extensions else set())


def remarks(image: str, mask: str) -> list[tuple[str, str, str]]:
    """Where, problem and remedy of what the headers of a sound image and mask ("": none) leave open."""
    remarks = []
    if doubt := spacing_doubt(image):
        remedy = "export it again with its spacing; the cubes do without"
        remarks.append((image, f"spacing unknown: its header has {doubt}", remedy))
    affines = [placing(_header(path)[0].get_best_affine()) for path in (image, mask or image)]
    if not np.allclose(*affines, atol=1e-3):  # mm
        problem = f"image and mask in different places: its affine and that of {mask} differ"
        remarks.append((image, problem, "see that the mask covers the pancreas: it is taken voxel by voxel"))
    return remarks


def _opened(path):
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def _header(path):
    """The header of a file and its zooms as stored, which may be zero or no numbers."""
    with _opened(path) as file:
        return _header_of(file)


def _header_of(file):
    start = file.read(nib.Nifti2Header.sizeof_hdr)
    file.seek(0)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(start):
            header = kind.from_fileobj(file, check=False)
            zooms = tuple(map(float, header["pixdim"][1:4]))
            header.check_fix(QUIET)
            return header, zooms
    raise OSError("it is no NIfTI file")
