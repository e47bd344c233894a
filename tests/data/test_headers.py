"""What is read of a NIfTI file: nibabel's voxels, damage, and what the header leaves open."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from ipmn_core.data import headers

AFFINE = np.array([[-1.4, 0, 0, 90], [0, 1.2, 0, -60], [0, 0.1, 6.0, 30], [0, 0, 0, 1]], float)
LOST = np.diag([-1.0, -1, 1, 1])  # as in the data set's AHN05
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
    voxels, affine = headers.read(path)
    expected = nib.load(path)
    theirs = np.asanyarray(expected.dataobj)
    assert voxels.dtype == theirs.dtype and np.array_equal(voxels, theirs)
    assert np.array_equal(affine, expected.affine)
    assert headers.spacing_doubt(path) == ""


def test_damage_that_only_the_checksum_sees_is_seen(tmp_path):
    noise = np.random.default_rng(0).random((20, 20, 20))  # more than what nibabel reads to know the format
    path = saved(tmp_path / "a.nii.gz", nib.Nifti1Image(noise, AFFINE).to_bytes())
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # the checksum itself
    path.write_bytes(raw)
    np.asanyarray(nib.load(path).dataobj)  # as always
    with pytest.raises(OSError, match="CRC"):
        headers.read(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_no_room_is_made_for_voxels_that_the_file_cannot_hold(tmp_path, name):
    raw = bytearray(content())
    raw[42:48] = struct.pack("<3h", 3000, 3000, 3000)  # 100 GB in float32
    with pytest.raises(OSError, match="promises 108000000000 bytes of voxels"):
        headers.read(saved(tmp_path / name, bytes(raw)))


@pytest.mark.parametrize(
    ("raw", "doubt"),
    [
        (content(LOST), "1 x 1 x 1 mm without turn and origin"),
        *(
            (without_sform(with_zooms(content(), *mm)), "inverted")
            for mm in ((0, 1.2, 6), (1.4, 1.2, np.nan))
        ),
        (with_first_row(content(), 0, 0, 0, 0), "cannot be inverted"),
        (with_first_row(content(), np.nan, 0, 0, 0), "cannot be inverted"),
        (content(LOST + np.array([[0, 0, 0, 80]] + [[0] * 4] * 3)), ""),  # one millimeter with an origin
        (with_zooms(content(), -1.4, 1.2, 6), ""),
    ],
)
def test_a_spacing_that_is_in_doubt_says_why(tmp_path, raw, doubt):
    path = saved(tmp_path / "a.nii.gz", raw)
    assert doubt in headers.spacing_doubt(path) and bool(doubt) == bool(headers.spacing_doubt(path))
    nib.Nifti1Image(*headers.read(path))  # raises for an affine that cannot be inverted


def test_image_and_mask_are_apart_beyond_the_rounding_of_float32(tmp_path):
    affines = AFFINE, AFFINE.astype(np.float32).astype(float), AFFINE + np.diag([0, 0.01, 0, 0])
    one, two, other = (str(saved(tmp_path / f"{k}.nii", content(a))) for k, a in enumerate(affines))
    assert headers.remarks(one, two) == headers.remarks(one, "") == []
    ((where, problem, _),) = headers.remarks(one, other)
    assert where == one and problem.startswith("image and mask in different places: ")
