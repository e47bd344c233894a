"""NIfTI files: voxels, affine, and what a header leaves in doubt.

Text in a header may name a patient. It never leaves this module; only the names of fields that hold some do.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
EXTENSIONS = "extensions"  # besides TEXT_FIELDS: what DICOM converters, AFNI and others append
QUIET = logging.getLogger(__name__)  # nibabel would print every field of a header that it fixes
QUIET.disabled = True


@dataclass(frozen=True)
class Header:
    """Affine (4, 4) of a file in mm, why its spacing is in doubt ("" if it is not), names of what holds text.

    In doubt are a stored zoom that is zero or no number, and unit zooms without turn and origin, which is
    what files have that lost theirs. An affine that cannot be inverted is replaced by the identity.
    """

    path: str
    affine: np.ndarray
    doubt: str
    text: tuple[str, ...]


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, scaled as the header says, and affine (4, 4) of a .nii or .nii.gz file.

    The file is read to its end, where gzip's checksum shows damage that `nibabel.load` does not see. Raises
    the errors of nibabel, gzip and zlib, and OSError if it is no NIfTI or too short for its header.
    """
    with _opened(path) as file:
        header = _stored(file)
        header.check_fix(QUIET)
        packed = isinstance(file, gzip.GzipFile)
        n_bytes = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if n_bytes > os.path.getsize(path) * (1032 if packed else 1):  # gzip packs at most 1032 to 1
            raise OSError(f"its header promises {n_bytes} bytes of voxels; the file is too short for them")
        voxels = header.data_from_fileobj(file)
        while packed and file.read(2**20):
            pass
    return voxels, placing(header.get_best_affine())


def of(*paths: str) -> list[Header]:
    """The headers of those files that have one; an empty path is no file. No voxel is read."""
    headers = []
    for path in filter(None, paths):
        with suppress(Exception), _opened(path) as file:  # `read` says what is wrong
            headers.append(_described(path, _stored(file)))
    return headers


def placing(affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4), or the identity if it cannot be inverted in the single precision of headers."""
    with np.errstate(over="ignore"):
        single = np.float32(affine).astype(float)
    return affine if np.isfinite(single).all() and np.linalg.matrix_rank(single[:3, :3]) == 3 else np.eye(4)


def remarks(headers: list[Header]) -> list[tuple[str, str, str]]:
    """Where, problem and remedy of what the headers of a scan's image and, if given, mask leave open."""
    remarks = []
    if headers and headers[0].doubt:
        remedy = "export it again with its spacing; the cubes do without"
        remarks.append((headers[0].path, f"spacing unknown: its header has {headers[0].doubt}", remedy))
    if len(headers) == 2 and not np.allclose(headers[0].affine, headers[1].affine, atol=1e-3):  # mm
        problem = f"image and mask in different places: its affine and that of {headers[1].path} differ"
        remedy = "see that the mask covers the pancreas: it is taken voxel by voxel"
        remarks.append((headers[0].path, problem, remedy))
    return remarks


def _opened(path):
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def _stored(file):
    """The header at the start of an open file as it is stored, nothing fixed."""
    start = file.read(nib.Nifti2Header.sizeof_hdr)
    file.seek(0)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(start):
            return kind.from_fileobj(file, check=False)
    raise OSError("it is no NIfTI file")


def _described(path, header):
    zooms = tuple(map(float, header["pixdim"][1:4]))
    header.check_fix(QUIET)
    affine, doubt = header.get_best_affine(), ""
    if not all(math.isfinite(mm) and mm for mm in zooms):
        doubt = f"voxels of {' x '.join(f'{mm:g}' for mm in zooms)} mm"
    elif zooms == (1, 1, 1) and np.array_equal(np.abs(affine), np.eye(4)):
        doubt = "voxels of 1 x 1 x 1 mm without turn and origin, as in files that lost them"
    elif placing(affine) is not affine:
        doubt = "an affine that cannot be inverted"
    fields = [
        field for field in TEXT_FIELDS if field in list(header) and header[field].item().strip(b"\0 \t\r\n")
    ]
    return Header(str(path), placing(affine), doubt, (*fields, *[EXTENSIONS] * bool(header.extensions)))
