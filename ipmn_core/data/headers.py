"""What a NIfTI file says beside its voxels: where they lie, how large they are, and text of any kind.

The text itself never leaves this module, for it may name a patient: only the names of the fields with some.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
EXTENSIONS = "extensions"  # beside TEXT_FIELDS: what DICOM converters, AFNI and others append
SMALLEST_GZIP = 1 / 1032  # no deflate stream is shorter than this share of its content
QUIET = logging.getLogger(__name__)  # nibabel reports here, file by file, what it mends in a header
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False


@dataclass(frozen=True)
class Header:
    """The affine (4, 4) of a file, in mm; why its spacing is in doubt, "" if it is not; the fields with text.

    In doubt are a zoom, as stored, that is zero or no number, and unit zooms without turn and origin, which
    is what stands where they were lost. An affine that cannot be inverted is replaced by the identity.
    """

    path: str
    affine: np.ndarray
    doubt: str
    text: tuple[str, ...]


def read(path: str | Path) -> tuple[np.ndarray, Header]:
    """Voxels, scaled as the header says, and header of a .nii or .nii.gz file, read once and to its end.

    So a damaged byte is seen by gzip's checksum, which `nibabel.load` never comes to. Raises what nibabel,
    gzip and zlib do, and OSError if the file is no NIfTI or too short for its header.
    """
    packed = str(path).lower().endswith(".gz")
    with gzip.open(path) if packed else open(path, "rb") as file:
        header = _raw(file)
        zooms = tuple(map(float, header["pixdim"][1:4]))
        header.check_fix(QUIET)
        n_bytes = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if n_bytes * (SMALLEST_GZIP if packed else 1) > os.path.getsize(path):  # before room is made for them
            raise OSError(f"its header promises {n_bytes} bytes of voxels; the file is too short for them")
        voxels = header.data_from_fileobj(file)
        while packed and file.read(2**20):  # to the end, where gzip's checksum is
            pass
    text = [field for field in TEXT_FIELDS if field in header.keys() and _holds_text(header[field])]  # noqa: SIM118
    text += [EXTENSIONS] * bool(header.extensions)
    affine = header.get_best_affine()
    return voxels, Header(str(path), placing(affine), _doubt(zooms, affine), tuple(text))


def placing(affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4) of a file, or the identity where that cannot be inverted."""
    return affine if _invertible(affine) else np.eye(4)


def apart(a: Header, b: Header) -> bool:
    """Whether two headers put their voxels in different places, beyond float32's rounding of millimeters."""
    return not np.allclose(a.affine, b.affine, atol=1e-3)


def _raw(file):
    """The header at the start of an open file as it stands there, nothing mended."""
    start = file.read(nib.Nifti2Header.sizeof_hdr)
    file.seek(0)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(start):
            return kind.from_fileobj(file, check=False)
    raise OSError("it is no NIfTI file")


def _holds_text(field: np.ndarray) -> bool:
    return bool(field.item().strip(b"\0 \t\r\n"))


def _doubt(zooms: tuple[float, ...], affine: np.ndarray) -> str:
    if not all(math.isfinite(mm) and mm for mm in zooms):
        return f"voxels of {' x '.join(f'{mm:g}' for mm in zooms)} mm"
    if zooms == (1, 1, 1) and np.array_equal(np.abs(affine), np.eye(4)):
        return "voxels of 1 x 1 x 1 mm without turn and origin, as where they were lost"
    return "" if _invertible(affine) else "an affine that cannot be inverted"


def _invertible(affine: np.ndarray) -> bool:
    """Whether an affine gives every voxel its own place, in the single precision of headers."""
    with np.errstate(over="ignore"):
        turned = np.float32(affine).astype(float)
    return bool(np.isfinite(turned).all()) and np.linalg.matrix_rank(turned[:3, :3]) == 3
