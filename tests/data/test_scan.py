"""One scan with its mask: what is refused and what is said, turning, resampling, the ROI."""

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import CropForeground
from nibabel.processing import resample_from_to
from volumes import AFFINE, LOST, save, volume, voxels

from ipmn_core.data import ScanError, bounding_box, load_roi, read_scan
from ipmn_core.params import Preprocessing

CANONICAL, FINE = Preprocessing(orientation="canonical"), Preprocessing(spacing=1.1)


def judged(folder, image, mask=None, how=None, affine=AFFINE, of_mask=AFFINE):
    """The remarks on a scan, one text each, of which none is without a remedy."""
    files = save(folder, "i", image, affine), None if mask is None else save(folder, "m", mask, of_mask)
    scan = read_scan(*files, "AHN01", how)
    assert all(remedy for *_, remedy in scan.remarks)
    return [f"{severity}: {problem}" for severity, _, problem, _ in scan.remarks]


BROKEN = {  # kind: (changed image and mask, message)
    "nan": (lambda i, m: (np.where(i == i[0, 0, 0], np.nan, i), m), "1 voxels that are NaN or infinite"),
    "infinite mask": (lambda i, m: (i, np.where(m, np.float32(np.inf), 0)), "m.nii.gz has .* infinite"),
    "blank": (lambda i, m: (i * 0, m), "inside the mask its values are 0 to 0"),
    "constant": (lambda i, m: (i * 0 + 7, m), "inside the mask its values are 7 to 7"),
    "constant inside": (lambda i, m: (np.where(m, 7, i), m), "inside the mask its values are 7 to 7"),
    "the mask": (lambda i, m: (m, m), "inside the mask its values are 1 to 1; check that it is this"),
    "two values": (lambda i, m: (np.float32(i > 200), m), "it has only the values 0 and 1; give the image"),
    "blank roi": (lambda i, m: (m * 0, None), "in its non-zero voxels its values are 0 to 0"),
    "silhouette": (lambda i, m: (m * np.int16(40), None), "in its non-zero voxels its values are 40 to 40"),
    "two labels": (lambda i, m: (m + (i > 200), None), "only the values 1 and 2"),
    "4d": (lambda i, m: (np.stack([i, i], -1), m), r"has shape \(24, 20, 8, 2\) .* one 3D volume"),
    "2d": (lambda i, m: (i[:, :, 4], m), "one 3D volume"),
    "one slice": (lambda i, m: (i[:, :, :1], m[:, :, :1]), "two slices or more"),
    "other shape": (lambda i, m: (i, m[:, :, :-1]), r"m.nii.gz .*\(24, 20, 7\).*\(24, 20, 8\); draw it on"),
    "half resolution": (lambda i, m: (i, m[::2, ::2]), "resample it to the image's grid"),
    "empty": (lambda i, m: (i, m * 0), "is an empty mask; draw the pancreas"),
    "two organs": (lambda i, m: (i, m + (i == i[0, 0, 0]) * np.uint8(2)), "several values besides 0"),
    "soft mask": (lambda i, m: (i, m * np.linspace(0.1, 1, 8, dtype="f4")), "several values besides 0"),
    "negative mask": (lambda i, m: (i, -np.int16(m)), "several values besides 0"),
    "complex": (lambda i, m: (i * 1j, m), "complex64; export one 3D volume of real numbers"),
    "color": (lambda i, m: (np.zeros(i.shape, [(c, "u1") for c in "RGB"]), m), "of real numbers"),
    "beyond float32": (lambda i, m: (i * np.float64(1e300), m), r"values are .*e\+30"),
    "constant in float32": (lambda i, m: (1e6 + i * np.float64(1e-9), m * 0 + 1), "are 1000000 to 1000000"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_scan_is_refused_with_case_file_and_remedy(tmp_path, kind):
    image, mask = BROKEN[kind][0](*volume())
    for how in (None, Preprocessing(), Preprocessing(intensity="zscore")):
        with pytest.raises(ScanError, match=rf"^AHN01: {tmp_path}.*{BROKEN[kind][1]}"):
            judged(tmp_path, image, mask, how)


def scaled(factor):
    """The affines of an image and a mask in another unit."""
    return dict.fromkeys(["affine", "of_mask"], np.diag([factor, factor, factor, 1]) @ AFFINE)


def moved(*voxels):
    """The affine of a mask moved by some voxels."""
    return AFFINE + np.outer(AFFINE @ (*voxels, 0), [0, 0, 0, 1])


def stray(image, mask):
    mask = mask.copy()
    mask[0, 0, 0] = 1
    return image, mask


DOUBTFUL = {  # kind: (changed image and mask, affines, remarks)
    "sound": (lambda i, m: (i, m), {}, []),
    "singleton axes": (lambda i, m: (i[..., None, None], m[..., None]), {}, []),
    "half a voxel": (lambda i, m: (i, m), {"of_mask": moved(0, 0, 0.5)}, []),
    "a voxel": (lambda i, m: (i, m), {"of_mask": moved(0, 1, 0)}, ["image and mask in different places"]),
    "mask lost": (lambda i, m: (i, m), {"of_mask": LOST}, ["spacing unknown", "image and mask in different"]),
    "both lost": (lambda i, m: (i, m), {"affine": LOST, "of_mask": LOST}, ["spacing unknown"]),
    "nearly one": (lambda i, m: (i, m * np.float32(0.999)), {}, []),
    "255": (lambda i, m: (i, m * np.uint8(255)), {}, ["value of the mask: its voxels of 255 are"]),
    "label 2": (lambda i, m: (i, m * 2.0), {}, ["value of the mask: its voxels of 2 are"]),
    "1/255": (lambda i, m: (i, m / np.float32(255)), {}, ["value of the mask: its voxels of 0.00392157"]),
    "stray voxel": (stray, {}, ["stray voxels: 1 voxels of the mask"]),
    "one slice": (lambda i, m: (i, m * (np.arange(8) == 4)), {}, ["one slice: "]),
    "hot voxel": (lambda i, m: (np.where(i == i[6, 5, 3], 1e6, i), m | 1), {}, ["a few voxels far brighter"]),
    "mm as m": (lambda i, m: (i, m), scaled(1e-3), ["size of the ROI"]),
    "mm as um": (lambda i, m: (i, m), scaled(1e3), ["size of the ROI"]),
    "negative": (lambda i, m: (i - 1000, m), {}, ["negative values inside the mask: min-max makes"]),
    "z-scored": (lambda i, m: ((i - 200) * m, None), {}, ["already scaled: an ROI with negative values"]),
    "whole, negative": (lambda i, m: (i - 1000, None), {}, []),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", DOUBTFUL)
def test_what_is_in_doubt_is_said_and_used(tmp_path, kind):
    change, affines, expected = DOUBTFUL[kind]
    remarks = judged(tmp_path, *change(*volume()), **affines)
    assert len(remarks) == len(expected)
    for remark, start in zip(remarks, expected, strict=True):
        assert remark.startswith(f"warning: {start}")


def test_a_mask_of_another_value_and_an_image_with_more_axes_give_the_same_roi(tmp_path):
    image, mask = volume()
    exact = load_roi(save(tmp_path, "i", image), save(tmp_path, "m", mask))
    for k, factor in enumerate([*np.float32([0.999, 1.001, 255, 1 / 255]), np.uint8(2)]):
        near = load_roi(save(tmp_path, "j", image[..., None]), save(tmp_path, f"m{k}", mask * factor))
        assert np.array_equal(voxels(exact), voxels(near))


def test_values_that_an_intensity_cannot_scale_are_refused_with_those_that_can(tmp_path):
    image, mask = volume()
    z = np.where(mask, (image - image[mask == 1].mean()) / image[mask == 1].std(), 0)
    for roi, wrong, told, right in (
        (z, "minmax", "already scaled: .*; set `intensity` to none, or to zscore", ("none", "zscore")),
        (image * 1000, "none", "too large .*; set `intensity` to minmax or zscore", ("minmax", "zscore")),
    ):
        path = save(tmp_path, "roi", roi)
        with pytest.raises(ScanError, match=told):
            read_scan(path, None, "AHN01", Preprocessing(intensity=wrong))
        for intensity in right:
            assert read_scan(path, None, "AHN01", Preprocessing(intensity=intensity)).remarks == []


def test_the_box_is_monais_tight_foreground_box():
    _, mask = volume()
    cropped = CropForeground(select_fn=lambda x: x > 0, allow_smaller=True)(mask[None])
    assert mask[bounding_box(mask)].shape == tuple(cropped.shape[1:])
    assert mask[bounding_box(mask)].sum() == mask.sum()


def test_an_roi_saved_as_nifti_is_where_it_was_in_the_image(tmp_path):
    image, mask = volume()
    roi = load_roi(save(tmp_path, "image", image), save(tmp_path, "mask", mask))
    nib.save(roi, tmp_path / "roi.nii.gz")
    back = nib.load(tmp_path / "roi.nii.gz")
    voxel = np.array([3, 2, 1, 1])
    corner = np.array([s.start for s in bounding_box(mask)] + [0])
    np.testing.assert_allclose(back.affine @ voxel, AFFINE @ (voxel + corner), atol=1e-4)  # float32 header
    assert np.array_equal(voxels(back) != 0, mask[bounding_box(mask)] != 0)
    assert np.array_equal(voxels(load_roi(tmp_path / "image.nii.gz")), image)  # a clean ROI is taken as it is


@pytest.mark.parametrize("dtype", ["<i8", ">u8", "<f8"])
def test_a_volume_of_eight_bytes_a_voxel_is_read_as_any_other(tmp_path, dtype):
    expected = np.arange(24 * 20 * 8).reshape(24, 20, 8)
    nib.save(nib.Nifti1Image(expected, AFFINE, dtype=np.dtype(dtype)), tmp_path / "i.nii.gz")
    assert np.array_equal(voxels(load_roi(tmp_path / "i.nii.gz")), expected)


@pytest.mark.parametrize("spacing", [0.7, 1.1, 3.3])
@pytest.mark.parametrize("masked", [True, False])
def test_voxels_of_another_spacing_are_those_of_the_rule_written_out(tmp_path, spacing, masked):
    """Size round(old x spacing / new), columns of the affine rescaled, image linear and mask nearest."""
    image, mask = volume(shape=(40, 35, 12))
    files = save(tmp_path, "i", image), save(tmp_path, "m", mask)
    old = nib.load(files[0])
    zooms = np.linalg.norm(old.affine[:3, :3], axis=0)
    shape = [round(n * mm / spacing) for n, mm in zip(image.shape, zooms, strict=True)]
    affine = old.affine @ np.diag([*(spacing / zooms), 1])
    fine = resample_from_to(nib.Nifti1Image(image, old.affine), (shape, affine), order=1)
    where = np.asanyarray(resample_from_to(nib.load(files[1]), (shape, affine), order=0).dataobj)
    expected, first = voxels(fine), np.zeros(3)
    if masked:
        box = bounding_box(where)
        expected, first = (expected * where)[box], [side.start for side in box]
    roi = load_roi(files[0], files[1] if masked else None, how=Preprocessing(spacing=spacing))
    assert roi.shape == expected.shape
    # scipy returns float32; on the image's faces the rule's matrices may round to places outside, which are 0
    inner = ... if masked else (slice(1, -1),) * 3
    np.testing.assert_allclose(voxels(roi)[inner], expected[inner], rtol=1e-6, atol=1e-4)
    assert masked or np.array_equal(voxels(roi)[0, 0, 0], image[0, 0, 0])
    np.testing.assert_allclose(roi.affine @ (0, 0, 0, 1), affine @ (*first, 1), atol=1e-4)  # float32
    np.testing.assert_allclose(roi.header.get_zooms(), spacing, rtol=1e-6)


def test_voxels_that_have_the_spacing_already_stay_as_they_are(tmp_path):
    image, mask = volume()
    affine = AFFINE @ np.diag([1 / 1.4, 1 / np.hypot(1.2, 0.1), 1 / 6, 1])
    files = save(tmp_path, "i", image, affine), save(tmp_path, "m", mask, affine)
    roi = load_roi(*files, how=Preprocessing(spacing=1.0))
    assert np.array_equal(voxels(roi), voxels(load_roi(*files)))


def test_a_spacing_that_is_unknown_or_absurd_cannot_be_changed(tmp_path):
    image, mask = volume()
    with pytest.raises(ScanError, match=r"does not tell its spacing; export it .* set `spacing` to null"):
        judged(tmp_path, image, mask, FINE, LOST, LOST)
    huge = np.diag([1e4, 1e4, 1e4, 1])
    with pytest.raises(ScanError, match=r"gives an ROI of .* voxels of 1.1 mm; check the spacing"):
        judged(tmp_path, image, mask, FINE, huge, huge)
    dots = np.zeros_like(mask)
    dots[0, 1, 1] = dots[8, 0, 0] = 1  # between the voxels of 10 mm
    for thin in (dots, dots[::-1]):
        with pytest.raises(ScanError, match=r"gives an ROI of .* voxels of 10 mm"):
            judged(tmp_path, image, thin, Preprocessing(spacing=10.0))


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR"])
def test_a_turned_scan_gives_the_canonical_roi_whatever_its_stored_axes(tmp_path, codes):
    image, mask = volume()
    expected = nib.as_closest_canonical(load_roi(save(tmp_path, "i", image), save(tmp_path, "m", mask)))
    files = []
    for name, data in (("j", image), ("n", mask)):
        stored = nib.Nifti1Image(data, AFFINE)
        to = nib.orientations.axcodes2ornt(codes)
        turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), to)
        nib.save(stored.as_reoriented(turn), tmp_path / f"{name}.nii.gz")
        files.append(tmp_path / f"{name}.nii.gz")
    as_stored, turned = read_scan(*files), read_scan(*files, how=CANONICAL)
    assert as_stored.axes == turned.axes == codes
    assert nib.aff2axcodes(as_stored.roi.affine) == tuple(codes)
    assert np.array_equal(voxels(turned.roi), voxels(expected))
    np.testing.assert_allclose(turned.roi.affine, expected.affine, atol=1e-4)  # float32 headers
    # a mask stored from another side belongs to its place once both are turned, and only then
    mixed = read_scan(files[0], tmp_path / "m.nii.gz", how=CANONICAL)
    assert np.array_equal(voxels(mixed.roi), voxels(expected)) and mixed.remarks == []
    if codes == "LPI":  # AFFINE is LAS
        ((_, _, problem, _),) = read_scan(files[0], tmp_path / "m.nii.gz").remarks
        assert problem.startswith("image and mask in different places: ")


def test_a_mask_that_lost_its_place_is_turned_with_its_image(tmp_path):
    image, mask = volume()
    files = save(tmp_path, "i", image), save(tmp_path, "m", mask, np.eye(4))
    turned = read_scan(*files, how=CANONICAL)
    assert np.array_equal(voxels(turned.roi), voxels(nib.as_closest_canonical(load_roi(*files))))
    assert turned.remarks[0][1:3][0] == files[1]
