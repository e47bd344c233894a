"""Read NIfTI files: voxels, affine, and doubts about the file.

A doubt is (severity, problem, remedy); a problem starts with its kind and a colon. Header text may name a
patient, so it never leaves this module.
"""

import io
import logging
import math
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

QUIET = logging.getLogger(__name__)  # nibabel prints every header field that it fixes
QUIET.disabled = True
GZIP = b"\x1f\x8b"
UNKNOWN, APART = "spacing unknown", "image and mask in different places"  # kinds of doubts


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """Scaled voxels, affine (4, 4) and doubts of a NIfTI file, gzipped or not.

    Reads the file to its end, because gzip's checksum shows damage that `nibabel.load` does not see. Raises
    the errors of nibabel and zlib, and OSError if the file is not NIfTI or too short for its header.
    """
    content, behind, doubts = Path(path).read_bytes(), 0, []
    if packed := content.startswith(GZIP):
        content, behind = _unpacked(content)
    if packed != str(path).lower().endswith(".gz"):
        kind = "a gzipped file" if packed else "a file that is not gzipped"
        doubts.append(("note", f"name and content differ: {kind}, read as such", "rename it"))
    if behind:
        problem = f"bytes after the end of the gzipped file: {behind}, not read"
        doubts.append(("warning", problem, "see that it was copied correctly"))
    header = _header(content)
    n_bytes = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if n_bytes > len(content):  # nibabel would allocate them
        raise OSError(f"its header promises {n_bytes} bytes of voxels; the file is too short for them")
    affine, of_place = place(header)
    return header.data_from_fileobj(io.BytesIO(content)), affine, doubts + of_place


def header_of(path: str | Path) -> nib.Nifti1Header:
    """The header of a NIfTI file, gzipped or not, without its voxels. Raises OSError for another file."""
    with open(path, "rb") as file:
        content = file.read(2**14)
    if content.startswith(GZIP):
        content = zlib.decompressobj(31).decompress(content, nib.Nifti2Header.sizeof_hdr)
    return _header(content)


def place(header: nib.Nifti1Header) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """Affine (4, 4) of a header (the identity if it cannot be inverted), and doubts about it."""
    header.quaternion_threshold = -np.inf  # scale a quaternion longer than 1; nibabel would refuse the file
    with np.errstate(all="ignore"):
        given, quaternion = header.get_best_affine(), header.get_qform()
    turn = np.float64([header[f"quatern_{axis}"] for axis in "bcd"])
    by_quaternion, by_matrix = header["qform_code"] > 0, header["sform_code"] > 0
    affine, problem, remedy = placing(given), "", "the axes may be wrong: compare with another viewer"
    if affine is not given or np.array_equal(np.abs(affine), np.eye(4)):
        why = "voxels of 1 x 1 x 1 mm without rotation and origin, as in files that lost them"
        why = why if affine is given else "an affine that cannot be inverted"
        problem, remedy = f"{UNKNOWN}: its header has {why}", "export it again with its spacing"
    elif not by_quaternion and not by_matrix:
        problem = "axes unknown: its header has neither qform nor sform"
    elif not by_matrix and turn @ turn > 1 + 3 * np.finfo(np.float32).eps:
        problem = (
            f"axes in doubt: the quaternion of its header has the length {np.sqrt(turn @ turn):.8g}, not 1"
        )
    elif by_quaternion and by_matrix and apart(affine, quaternion, header.get_data_shape()):
        problem = "axes in doubt: qform and sform of its header differ; the sform is used"
    return affine, [("warning", problem, remedy)] if problem else []


def placing(affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4), or the identity if it cannot be inverted in float32, the precision of headers."""
    with np.errstate(over="ignore"):
        single = np.float32(affine).astype(float)
    return affine if np.isfinite(single).all() and np.linalg.matrix_rank(single[:3, :3]) == 3 else np.eye(4)


def apart(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether two affines place a corner of a volume more than half a voxel apart."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*shape, 1, 1)[:3]])).reshape(3, 8)
    corners = np.vstack([corners, np.ones(8)])
    moved = np.abs(np.linalg.solve(affine, other) @ corners - corners).max()
    return not moved <= 0.501  # also if it is NaN; some tools shift by half a voxel


def axes_of(affine: np.ndarray) -> str:
    """Where the voxels' axes point, for instance LPS: to the patient's left, back and head."""
    return "".join(nib.aff2axcodes(affine))


def _unpacked(content):
    """The content of a gzip file, with verified checksums, and the number of bytes after its end."""
    parts = []
    while content.startswith(GZIP):
        part = zlib.decompressobj(31)  # with gzip's header and checksum
        parts.append(part.decompress(content))
        if not part.eof:
            raise OSError("it ends too early")
        content = part.unused_data
    return b"".join(parts), len(content.strip(b"\0"))


def _header(content):
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(content):
            header = kind(content[: kind.sizeof_hdr], check=False)
            zooms = np.abs(header["pixdim"][1:4])
            header.check_fix(QUIET)
            header["pixdim"][1:4] = zooms  # nibabel turns 0 into 1 mm, which hides an unknown spacing
            return header
    is_dicom = content[128:132] == b"DICM"
    raise OSError("it is a DICOM file: convert the series to NIfTI" if is_dicom else "it is no NIfTI file")
