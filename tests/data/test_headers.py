"""What is read of a NIfTI file: nibabel's voxels, damage, and what the header leaves open."""

import gzip
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
from volumes import AFFINE, LOST

from ipmn_core.data import headers

PIXDIM, SROW = 76, 280  # their places in a NIfTI-1 header


def content(affine=AFFINE, dtype="f4", kind=nib.Nifti1Image, endian="<"):
    """A volume's bytes."""
    data = np.arange(4 * 3 * 2).reshape(4, 3, 2).astype(dtype)
    header = kind.header_class(endianness=endian)
    header.set_data_dtype(dtype)
    return kind(data, affine, header).to_bytes()


def saved(path, raw):
    path.write_bytes(gzip.compress(raw) if path.name.lower().endswith("gz") else raw)
    return path


def with_zooms(raw, *zooms):
    return raw[: PIXDIM + 4] + struct.pack("<3f", *zooms) + raw[PIXDIM + 16 :]


def without_sform(raw):
    return raw[:254] + struct.pack("<h", 0) + raw[256:]


def with_first_row(raw, *row):
    return raw[:SROW] + struct.pack("<4f", *row) + raw[SROW + 16 :]


@pytest.mark.parametrize("name", ["a.nii", "A.NII.GZ"])
@pytest.mark.parametrize(
    "options",
    [
        *({"dtype": dtype} for dtype in ("u1", "i2", "u4", "i8", "f4", "f8")),
        {"kind": nib.Nifti2Image},
        {"endian": ">", "dtype": "i2"},
    ],
)
@pytest.mark.parametrize("scaling", [(np.nan, np.nan), (0.5, -3), (0, 7)])
def test_voxels_and_affine_are_those_of_nibabel(tmp_path, name, options, scaling):
    raw = bytearray(content(**options))
    if options.get("kind") is nib.Nifti2Image:
        raw[176:192] = struct.pack("<2d", *scaling)
    else:
        raw[112:120] = struct.pack(options.get("endian", "<") + "2f", *scaling)
    path = saved(tmp_path / name, bytes(raw))
    voxels, affine, doubts = headers.read(path)
    expected = nib.load(path)
    theirs = np.asanyarray(expected.dataobj)
    assert voxels.dtype == theirs.dtype and np.array_equal(voxels, theirs)
    assert np.array_equal(affine, expected.affine)
    assert doubts == []


def test_damage_that_only_the_checksum_sees_is_seen(tmp_path):
    noise = np.random.default_rng(0).random((20, 20, 20))  # more than what nibabel reads to know the format
    path = saved(tmp_path / "a.nii.gz", nib.Nifti1Image(noise, AFFINE).to_bytes())
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # the checksum itself
    path.write_bytes(raw)
    np.asanyarray(nib.load(path).dataobj)  # as always
    with pytest.raises(zlib.error, match="data check"):
        headers.read(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_no_room_is_made_for_voxels_that_the_file_cannot_hold(tmp_path, name):
    raw = bytearray(content())
    raw[42:48] = struct.pack("<3h", 3000, 3000, 3000)  # 100 GB in float32
    with pytest.raises(OSError, match="promises 108000000000 bytes of voxels"):
        headers.read(saved(tmp_path / name, bytes(raw)))


def with_qform(raw, *quaternion, forms=(1, 0)):
    return raw[:252] + struct.pack("<2h", *forms) + struct.pack("<3f", *quaternion) + raw[268:]


UNKNOWN = "spacing unknown: its header has an affine that cannot be inverted"


@pytest.mark.parametrize(
    ("raw", "doubt"),
    [
        (content(LOST), "spacing unknown: its header has voxels of 1 x 1 x 1 mm without rotation and origin"),
        (content(LOST + np.array([[0, 0, 0, 80]] + [[0] * 4] * 3)), ""),  # one millimeter with an origin
        (without_sform(with_zooms(content(), 0, 1.2, 6)), UNKNOWN),
        (without_sform(with_zooms(content(), 1.4, 1.2, np.nan)), UNKNOWN),
        (with_zooms(content(), -1.4, 1.2, 6), ""),
        (with_first_row(content(), 0, 0, 0, 0), UNKNOWN),
        (with_first_row(content(), np.nan, 0, 0, 0), UNKNOWN),
        (with_qform(content(), 0, 0, 1), ""),
        (with_qform(content(), 0, 0, 1.0000005), "has the length 1.0000005, not 1"),
        (with_qform(content(), 0, 5, 0), "has the length 5, not 1"),
        (with_qform(content(), 3e38, 3e38, 0), "has the length 4.2"),
        (with_qform(content(), np.nan, 0, 0), "cannot be inverted"),
        (with_qform(content(), 0, 0, 5, forms=(1, 2)), "qform and sform of its header differ"),
        (with_qform(content(), 0, 0, 5, forms=(0, 2)), ""),
        (without_sform(content()), "neither qform nor sform"),
        (with_qform(content(), 0, 0, 1, forms=(77, -3)), "neither qform nor sform"),
    ],
)
def test_no_affine_keeps_voxels_from_being_read_and_one_that_is_in_doubt_says_why(tmp_path, raw, doubt):
    voxels, affine, doubts = headers.read(saved(tmp_path / "a.nii", raw))
    assert np.array_equal(voxels.ravel(), np.arange(24))
    nib.Nifti1Image(voxels, affine)  # raises for an affine that cannot be inverted
    assert doubt in "".join(problem for _, problem, _ in doubts) and len(doubts) == bool(doubt)


def test_files_are_read_by_their_content_whatever_their_name(tmp_path):
    plain, packed = content(), gzip.compress(content())
    files = {
        "a.nii.gz": (plain, ["note name and content differ: a file that is not gzipped, read as such"]),
        "b.nii": (packed, ["note name and content differ: a gzipped file, read as such"]),
        "c.nii.gz": (packed + bytes(512), []),  # padded, as on tapes
        "d.nii.gz": (packed + b"more", ["warning bytes after the end of the gzipped file: 4, not read"]),
        "e.nii.gz": (gzip.compress(plain[:400]) + gzip.compress(plain[400:]), []),
    }
    for name, (raw, expected) in files.items():
        (tmp_path / name).write_bytes(raw)
        voxels, affine, doubts = headers.read(tmp_path / name)
        assert np.array_equal(voxels.ravel(), np.arange(24)) and np.allclose(affine, AFFINE)
        assert [f"{severity} {problem}" for severity, problem, _ in doubts] == expected
        assert headers.header_of(tmp_path / name).get_data_shape() == (4, 3, 2)
    (tmp_path / "f.nii").write_bytes(bytes(128) + b"DICM" + bytes(900))
    with pytest.raises(OSError, match="it is a DICOM file: convert the series"):
        headers.read(tmp_path / "f.nii")


@pytest.mark.parametrize(
    ("change", "is_apart"),
    [
        (np.zeros((4, 4)), False),
        (AFFINE.astype(np.float32) - AFFINE, False),
        (np.outer(AFFINE[:, 2] / 2, [0, 0, 0, 1]), False),  # half a slice
        (np.outer(AFFINE[:, 2] * 0.6, [0, 0, 0, 1]), True),
        (np.diag([0, 0.02, 0, 0]), False),  # at the 30th voxel half of one
        (np.diag([0, 0.03, 0, 0]), True),
        (np.diag([np.nan, 0, 0, 0]), True),
    ],
)
def test_image_and_mask_are_apart_beyond_half_a_voxel_anywhere(change, is_apart):
    assert headers.apart(AFFINE, AFFINE + change, (40, 30, 8)) == is_apart
