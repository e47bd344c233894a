"""Cubes against MONAI, unusable scans by name, the cache, and what is said of volumes and headers."""

import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.transforms import CropForeground, Resize, ScaleIntensity

from ipmn_core.data import (
    ScanError,
    bounding_box,
    load_cubes,
    load_image,
    load_roi,
    scanner_facts,
    to_cube,
    volume_problems,
)

AFFINE = np.array([[-1.4, 0, 0, 90], [0, 1.2, 0, -60], [0, 0.1, 6.0, 30], [0, 0, 0, 1]], float)
LOST = np.diag([-1.0, -1, 1, 1])  # as in the data set's AHN05


def volume(seed=0, shape=(24, 20, 8)):
    """An image and a mask that leaves a margin on every side."""
    rng = np.random.default_rng(seed)
    image, mask = rng.gamma(2, 100, shape).astype(np.float32), np.zeros(shape, np.uint8)
    mask[5:17, 4:15, 2:7] = rng.random((12, 11, 5)) < 0.6
    return image, mask


def save(folder, name, data, affine=AFFINE):
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    return str(path)


def scans_of(folder, n=3):
    rows = []
    for k in range(n):
        image, mask = volume(k)
        files = save(folder, f"i{k}", image), save(folder, f"m{k}", mask)
        rows.append((f"AHN{k:02d}", *files, "AHN", "t1", k))
    return pd.DataFrame(rows, columns=["case_id", "image", "mask", "center", "modality", "label"])


def voxels(image):
    return np.asanyarray(image.dataobj)


@pytest.mark.parametrize("size", [32, 48])
def test_a_cube_is_monais_scale_and_resize_to_storage_precision(size):
    image, mask = volume()
    roi = np.where(mask, image, 0)[bounding_box(mask)]
    expected = Resize((size,) * 3, mode="area")(ScaleIntensity()(torch.from_numpy(roi)[None]))[0]
    ours = to_cube(roi, size)
    assert ours.dtype == np.float16
    half_a_step = 2**-11  # of float16 at 1
    np.testing.assert_allclose(ours.astype(np.float32), expected.numpy(), atol=half_a_step)


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


BROKEN = {  # kind: (changed image and mask, message)
    "nan": (lambda i, m: (np.where(i == i[0, 0, 0], np.nan, i), m), "NaN or infinite"),
    "constant": (lambda i, m: (i * 0, m), "values are 0 to 0"),
    "4d": (lambda i, m: (np.stack([i, i], -1), m), "one 3D volume"),
    "one slice": (lambda i, m: (i[:, :, :1], m[:, :, :1]), "two slices or more"),
    "other shape": (lambda i, m: (i, m[:, :, :-1]), r"bad_m.*\(24, 20, 7\).*\(24, 20, 8\)"),
    "empty": (lambda i, m: (i, m * 0), "is an empty mask"),
    "two organs": (lambda i, m: (i, m + (i == i[0, 0, 0]) * np.uint8(2)), "other than 0 and 1"),
    "zero and two": (lambda i, m: (i, m * 2), "other than 0 and 1"),
    "complex": (lambda i, m: (i * 1j, m), "complex64; export one 3D volume of real numbers"),
    "color": (lambda i, m: (np.zeros(i.shape, [(c, "u1") for c in "RGB"]), m), "of real numbers"),
    "beyond float32": (lambda i, m: (i * np.float64(1e300), m), r"values are .*e\+30"),
    "constant in float32": (lambda i, m: (1e6 + i * np.float64(1e-9), m * 0 + 1), "are 1000000 to 1000000"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unusable_scan_is_named_before_anything_is_cached_and_listed_with_its_file(tmp_path, kind):
    scans = scans_of(tmp_path)
    image, mask = BROKEN[kind][0](*volume())
    scans.loc[1, ["image", "mask"]] = save(tmp_path, "bad_i", image), save(tmp_path, "bad_m", mask)
    with pytest.raises(ScanError, match=f"AHN01: .*{BROKEN[kind][1]}") as error:
        load_cubes(scans, 32, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    ((severity, *parts),) = volume_problems(scans)
    assert severity == "error" and "AHN01: {} {}; {}".format(*parts) == str(error.value)


def test_nearly_whole_mask_values_are_rounded(tmp_path):
    image, mask = volume()
    exact = load_roi(save(tmp_path, "i", image), save(tmp_path, "m", mask))
    for k, factor in enumerate(np.float32([0.999, 1.001])):
        near = load_roi(tmp_path / "i.nii.gz", save(tmp_path, f"m{k}", mask * factor))
        assert np.array_equal(voxels(exact), voxels(near))


def test_cubes_follow_the_scans_and_do_not_depend_on_the_workers(tmp_path):
    scans = scans_of(tmp_path)
    one, key = load_cubes(scans, 32, tmp_path / "one", jobs=1)
    two, key2 = load_cubes(scans, 32, tmp_path / "two", jobs=2)
    assert one.shape == (3, 32, 32, 32) and isinstance(one, np.memmap)
    assert np.array_equal(one, two) and key == key2
    for k in range(3):
        roi = load_roi(scans.loc[k, "image"], scans.loc[k, "mask"])
        assert np.array_equal(one[k], to_cube(voxels(roi), 32))


def test_the_cache_is_used_and_a_changed_file_or_size_renews_it(tmp_path):
    scans, cache = scans_of(tmp_path), tmp_path / "cache"
    first, key = load_cubes(scans, 32, cache)
    written = [path.stat().st_mtime_ns for path in cache.iterdir()]
    assert load_cubes(scans, 32, cache)[1] == key
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == written
    save(tmp_path, "i1", volume(9)[0])
    second, key2 = load_cubes(scans, 32, cache)
    assert key2 != key and not np.array_equal(second[1], first[1])
    assert np.array_equal(second[0], first[0])
    assert load_cubes(scans, 48, cache)[1] != key2


def test_facts_give_spacing_in_mm_and_the_median_of_the_roi(tmp_path):
    facts = scanner_facts(scans_of(tmp_path))
    image, mask = volume(1)
    assert facts.loc[1, ["in_plane_mm", "slice_mm"]].tolist() == pytest.approx([1.4, 6.0])
    assert facts.loc[1, "roi_median"] == pytest.approx(np.median(image[mask == 1]))


def test_a_doubtful_header_is_a_warning_told_once_when_cubes_are_built_and_used_voxel_by_voxel(tmp_path):
    scans, sound = scans_of(tmp_path), tmp_path / "sound"
    sound.mkdir()
    assert volume_problems(scans) == volume_problems(scans.head(0)) == []
    for k in (0, 2):
        image, mask = volume(k)
        scans.loc[k, "image"] = save(tmp_path, f"i{k}", image, LOST)
        scans.loc[k, "mask"] = save(tmp_path, f"m{k}", mask, LOST)
    scans.loc[1, "mask"] = save(tmp_path, "moved", volume(1)[1], AFFINE + np.diag([0, 0, 0.5, 0]))
    rows = volume_problems(scans)
    assert [row[:2] for row in rows] == [("warning", image) for image in scans["image"]]
    assert rows[0][2].startswith("spacing unknown: ") and "moved.nii.gz differ" in rows[1][2]
    with pytest.warns(UserWarning) as told:
        cubes, _ = load_cubes(scans, 32, tmp_path / "cache", jobs=2)
    assert [str(w.message) for w in told] == [
        "spacing unknown: 2 of 3 scans; `ipmn check` names them",
        "image and mask in different places: 1 of 3 scans; `ipmn check` names them",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_cubes(scans, 32, tmp_path / "cache")  # from the cache: told before
        same, _ = load_cubes(scans_of(sound), 32, tmp_path / "cache")  # nothing to tell
    assert np.array_equal(cubes, same)


@pytest.mark.parametrize("dtype", ["<i8", ">u8", "<f8"])
def test_a_volume_of_eight_bytes_a_voxel_is_read_as_any_other(tmp_path, dtype):
    expected = np.arange(24 * 20 * 8).reshape(24, 20, 8)
    nib.save(nib.Nifti1Image(expected, AFFINE, dtype=np.dtype(dtype)), tmp_path / "i.nii.gz")
    assert np.array_equal(voxels(load_image(tmp_path / "i.nii.gz", "")), expected)
    assert np.array_equal(voxels(load_roi(tmp_path / "i.nii.gz")), expected)
