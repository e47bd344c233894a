import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.transforms import CropForeground, Resize, ScaleIntensity

from ipmn_core import preprocess
from ipmn_core.preprocess import ScanError

AFFINE = np.array([[-1.4, 0, 0, 90], [0, 1.2, 0, -60], [0, 0.1, 6.0, 30], [0, 0, 0, 1]], float)


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


def scans_of(folder, n=3, shape=(24, 20, 8)):
    rows = []
    for k in range(n):
        image, mask = volume(k, shape)
        rows.append(
            (f"AHN{k:02d}", save(folder, f"i{k}", image), save(folder, f"m{k}", mask), "AHN", "t1", k)
        )
    return pd.DataFrame(rows, columns=["case_id", "image", "mask", "center", "modality", "label"])


@pytest.mark.parametrize("size", [32, 48])
def test_a_cube_is_monais_scale_and_resize_to_storage_precision(size):
    image, mask = volume()
    roi = np.where(mask, image, 0)[preprocess.bounding_box(mask)]
    expected = Resize((size,) * 3, mode="area")(ScaleIntensity()(torch.from_numpy(roi)[None]))[0]
    ours = preprocess.to_cube(roi, size)
    assert ours.dtype == np.float16
    np.testing.assert_allclose(
        ours.astype(np.float32), expected.numpy(), atol=2**-11
    )  # half a float16 step at 1


def test_the_box_is_monais_tight_foreground_box():
    _, mask = volume()
    cropped = CropForeground(select_fn=lambda x: x > 0, allow_smaller=True)(mask[None])
    assert mask[preprocess.bounding_box(mask)].shape == tuple(cropped.shape[1:])
    assert mask[preprocess.bounding_box(mask)].sum() == mask.sum()


def test_an_roi_saved_as_nifti_lies_where_it_was_in_the_image(tmp_path):
    image, mask = volume()
    roi = preprocess.load_roi(save(tmp_path, "image", image), save(tmp_path, "mask", mask))
    nib.save(roi, tmp_path / "roi.nii.gz")
    back = nib.load(tmp_path / "roi.nii.gz")
    voxel = np.array([3, 2, 1, 1])
    corner = np.array([s.start for s in preprocess.bounding_box(mask)] + [0])
    np.testing.assert_allclose(back.affine @ voxel, AFFINE @ (voxel + corner), atol=1e-4)  # float32 header
    assert np.array_equal(np.asanyarray(back.dataobj) != 0, mask[preprocess.bounding_box(mask)] != 0)


def test_a_clean_roi_is_taken_as_it_is(tmp_path):
    image, _ = volume()
    roi = preprocess.load_roi(save(tmp_path, "roi", image))
    assert np.array_equal(np.asanyarray(roi.dataobj), image)


def broken(kind):
    image, mask = volume()
    if kind == "nan":
        image[0, 0, 0] = np.nan
    elif kind == "infinite":
        image[6, 6, 3] = np.inf
    elif kind == "constant":
        image[:] = 0
    elif kind == "4d":
        image = np.stack([image, image], -1)
    elif kind == "one slice":
        image, mask = image[:, :, :1], mask[:, :, :1]
    elif kind == "other shape":
        mask = mask[:, :, :-1]
    elif kind == "empty":
        mask[:] = 0
    elif kind == "two organs":
        mask[0, 0, 0] = 2
    elif kind == "fractions":
        mask = mask * 0.5
    return image, mask


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "1 voxel.* NaN or infinite"),
        ("infinite", "1 voxel.* NaN or infinite"),
        ("constant", "one single value"),
        ("4d", "expected one 3D volume"),
        ("one slice", "at least two slices"),
        ("other shape", r"mask .*\(24, 20, 7\).*\(24, 20, 8\)"),
        ("empty", "is empty"),
        ("two organs", "other than 0 and 1"),
        ("fractions", "other than 0 and 1"),
    ],
)
def test_an_unusable_scan_is_named_before_anything_is_cached(tmp_path, kind, message):
    scans = scans_of(tmp_path, 2)
    image, mask = broken(kind)
    scans.loc[1, ["image", "mask"]] = save(tmp_path, "bad_i", image), save(tmp_path, "bad_m", mask)
    with pytest.raises(ScanError, match=f"AHN01: .*{message}"):
        preprocess.cubes(scans, 32, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_truncated_file_is_named(tmp_path):
    scans = scans_of(tmp_path, 1)
    with open(scans.loc[0, "image"], "rb+") as file:
        file.truncate(2000)
    with pytest.raises(ScanError, match=r"AHN00: .*i0\.nii\.gz cannot be read"):
        preprocess.cubes(scans, 32, tmp_path / "cache")


def test_nearly_whole_mask_values_are_rounded(tmp_path):
    image, mask = volume()
    exact = preprocess.load_roi(save(tmp_path, "i", image), save(tmp_path, "m", mask))
    near = preprocess.load_roi(save(tmp_path, "i", image), save(tmp_path, "n", mask * np.float32(0.999)))
    assert np.array_equal(np.asanyarray(exact.dataobj), np.asanyarray(near.dataobj))


def test_cubes_follow_the_scans_and_do_not_depend_on_the_workers(tmp_path):
    scans = scans_of(tmp_path)
    one = preprocess.cubes(scans, 32, tmp_path / "one", jobs=1)
    two = preprocess.cubes(scans, 32, tmp_path / "two", jobs=2)
    assert one.array.shape == (3, 32, 32, 32) and isinstance(one.array, np.memmap)
    assert np.array_equal(one.array, two.array) and one.key == two.key
    for k in range(3):
        roi = preprocess.load_roi(scans.loc[k, "image"], scans.loc[k, "mask"])
        assert np.array_equal(one.array[k], preprocess.to_cube(np.asanyarray(roi.dataobj), 32))


def test_the_cache_is_used_and_a_changed_file_or_size_renews_it(tmp_path):
    scans, cache = scans_of(tmp_path), tmp_path / "cache"
    first = preprocess.cubes(scans, 32, cache)
    written = [path.stat().st_mtime_ns for path in cache.iterdir()]
    assert preprocess.cubes(scans, 32, cache).key == first.key
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == written
    save(tmp_path, "i1", volume(9)[0])
    second = preprocess.cubes(scans, 32, cache)
    assert second.key != first.key and not np.array_equal(second.array[1], first.array[1])
    assert np.array_equal(second.array[0], first.array[0])
    assert preprocess.cubes(scans, 48, cache).key != second.key


def test_facts_give_spacing_in_mm_and_the_median_of_the_roi(tmp_path):
    scans = scans_of(tmp_path)
    facts = preprocess.facts(scans)
    image, mask = volume(1)
    assert facts.loc[1, "in_plane_mm"] == pytest.approx(1.4)
    assert facts.loc[1, "slice_mm"] == pytest.approx(6.0)
    assert facts.loc[1, "roi_median"] == pytest.approx(np.median(image[mask == 1]))
