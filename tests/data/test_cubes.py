"""Cubes against MONAI and formulas, the cache, and what is said of scans and of all of them together."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from monai.transforms import Resize, ScaleIntensity
from scipy.stats import zscore
from volumes import AFFINE, LOST, save, volume, voxels

from ipmn_core.data import (
    ScanError,
    bounding_box,
    load_cubes,
    load_roi,
    scanner_facts,
    to_cube,
    volume_problems,
)
from ipmn_core.params import Preprocessing

HOW = Preprocessing(32)


def scans_of(folder, n=3):
    rows = []
    for k in range(n):
        image, mask = volume(k)
        files = save(folder, f"i{k}", image), save(folder, f"m{k}", mask)
        rows.append((f"AHN{k:02d}", *files, "AHN", "t1", k))
    return pd.DataFrame(rows, columns=["case_id", "image", "mask", "center", "modality", "label"])


@pytest.mark.parametrize("size", [32, 48])
def test_a_cube_is_monais_scale_and_resize_to_storage_precision(size):
    image, mask = volume()
    roi = np.where(mask, image, 0)[bounding_box(mask)]
    expected = Resize((size,) * 3, mode="area")(ScaleIntensity()(torch.from_numpy(roi)[None]))[0]
    ours = to_cube(roi, size)
    assert ours.dtype == np.float16
    half_a_step = 2**-11  # of float16 at 1
    np.testing.assert_allclose(ours.astype(np.float32), expected.numpy(), atol=half_a_step)


def test_a_z_scored_cube_has_mean_0_and_deviation_1_inside_and_zero_outside():
    image, mask = volume()
    roi = np.where(mask, image, 0)[bounding_box(mask)]
    expected = np.zeros_like(roi)
    expected[roi != 0] = zscore(roi[roi != 0], ddof=0)
    resized = Resize((32,) * 3, mode="area")(torch.from_numpy(expected)[None])[0]
    np.testing.assert_allclose(np.float32(to_cube(roi, 32, "zscore")), resized, atol=4 * 2**-11)  # up to 8
    np.testing.assert_allclose(to_cube(expected, 32, "zscore"), to_cube(expected, 32, "none"), atol=2**-8)
    again = Resize((32,) * 3, mode="area")(torch.from_numpy(roi)[None])[0]
    np.testing.assert_allclose(np.float32(to_cube(roi, 32, "none")), again, rtol=2**-10)  # float16


@pytest.mark.parametrize("change", [{"spacing": 1.5}, {"intensity": "zscore"}, {"orientation": "canonical"}])
def test_a_setting_reaches_the_cubes_and_the_key(tmp_path, change):
    scans, how = scans_of(tmp_path, 1), Preprocessing(32, **change)
    cubes, key = load_cubes(scans, how, tmp_path / "cache")
    other, key_of_other = load_cubes(scans, HOW, tmp_path / "cache")
    assert key != key_of_other and not np.array_equal(cubes, other)
    roi = load_roi(scans.loc[0, "image"], scans.loc[0, "mask"], how=how)
    assert np.array_equal(cubes[0], to_cube(voxels(roi), 32, how.intensity))


def test_an_unusable_scan_is_named_before_anything_is_cached_and_listed_with_its_file(tmp_path):
    scans = scans_of(tmp_path)
    scans.loc[1, "image"] = scans.loc[1, "mask"]
    with pytest.raises(ScanError, match=r"AHN01: .*inside the mask its values are 1 to 1") as error:
        load_cubes(scans, HOW, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    ((severity, *parts),) = volume_problems(scans)
    assert severity == "error" and "AHN01: {} {}; {}".format(*parts) == str(error.value)


def test_what_only_some_settings_refuse_is_a_warning_of_a_check_without_settings(tmp_path):
    scans = scans_of(tmp_path, 1).assign(mask="")
    image, mask = volume()
    save(tmp_path, "i0", (image - 200) * mask)
    assert [row[0] for row in volume_problems(scans)] == ["warning"]
    assert [row[0] for row in volume_problems(scans, HOW)] == ["error"]
    assert volume_problems(scans, Preprocessing(intensity="none")) == []


def test_copies_are_named_with_the_scan_that_they_have_the_voxels_of(tmp_path):
    scans = scans_of(tmp_path, 4)
    image, _ = volume(1)
    scans.loc[3, "image"] = save(tmp_path, "other", image.astype(float))  # other bytes, the same voxels
    ((severity, where, problem, _),) = volume_problems(scans)
    assert (severity, where) == ("warning", scans.loc[3, "image"])
    assert problem == f"copy of another scan: it has the voxels of {scans.loc[1, 'image']}"
    with pytest.warns(UserWarning, match=r"copy of another scan: 1 of 4 scans"):
        load_cubes(scans, HOW, tmp_path / "cache")


def test_stored_axes_are_a_note_if_mixed_and_a_warning_if_they_tell_centers_apart(tmp_path):
    scans = scans_of(tmp_path, 6).assign(center=list("AABBCC"))
    assert set(scanner_facts(scans)["axes"]) == {"LAS"} and volume_problems(scans) == []
    turned = AFFINE @ np.diag([-1, 1, 1, 1])
    for k in (1, 3, 5):
        save(tmp_path, f"i{k}", volume(k)[0], turned)
        save(tmp_path, f"m{k}", volume(k)[1], turned)
    assert scanner_facts(scans)["axes"].tolist() == ["LAS", "RAS"] * 3
    ((severity, _, problem, _),) = volume_problems(scans)
    assert (severity, problem.partition(":")[0]) == ("note", "several stored axes")
    assert "A 1 LAS, 1 RAS; B 1 LAS, 1 RAS" in problem
    scans["center"] = list("ABABAB")
    ((severity, _, problem, _),) = volume_problems(scans)
    assert severity == "warning" and problem == "stored axes tell centers apart: A 3 LAS; B 3 RAS"
    with pytest.warns(UserWarning, match="stored axes tell centers apart: A 3 LAS"):
        load_cubes(scans, HOW, tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_cubes(scans, Preprocessing(32, orientation="canonical"), tmp_path / "cache")


def test_cubes_follow_the_scans_and_do_not_depend_on_the_workers(tmp_path):
    scans = scans_of(tmp_path)
    one, key = load_cubes(scans, HOW, tmp_path / "one", jobs=1)
    two, key2 = load_cubes(scans, HOW, tmp_path / "two", jobs=2)
    assert one.shape == (3, 32, 32, 32) and isinstance(one, np.memmap)
    assert np.array_equal(one, two) and key == key2
    for k in range(3):
        roi = load_roi(scans.loc[k, "image"], scans.loc[k, "mask"])
        assert np.array_equal(one[k], to_cube(voxels(roi), 32))


def test_the_cache_is_used_and_a_changed_file_or_size_renews_it(tmp_path):
    scans, cache = scans_of(tmp_path), tmp_path / "cache"
    first, key = load_cubes(scans, HOW, cache)
    written = [path.stat().st_mtime_ns for path in cache.iterdir()]
    assert load_cubes(scans, HOW, cache)[1] == key
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == written
    save(tmp_path, "i1", volume(9)[0])
    second, key2 = load_cubes(scans, HOW, cache)
    assert key2 != key and not np.array_equal(second[1], first[1])
    assert np.array_equal(second[0], first[0])
    assert load_cubes(scans, Preprocessing(48), cache)[1] != key2


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
    scans.loc[1, "mask"] = save(tmp_path, "moved", volume(1)[1], AFFINE + np.diag([0, 0, 0.9, 0]))
    rows = volume_problems(scans)
    assert [row[:2] for row in rows] == [("warning", image) for image in scans["image"]]
    assert rows[0][2].startswith("spacing unknown: ") and "moved.nii.gz differ" in rows[1][2]
    with pytest.warns(UserWarning) as told:
        cubes, _ = load_cubes(scans, HOW, tmp_path / "cache", jobs=2)
    assert [str(w.message) for w in told] == [
        "spacing unknown: 2 of 3 scans; `ipmn check` names them",
        "image and mask in different places: 1 of 3 scans; `ipmn check` names them",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_cubes(scans, HOW, tmp_path / "cache")  # from the cache: told before
        same, _ = load_cubes(scans_of(sound), HOW, tmp_path / "cache")  # nothing to tell
    assert np.array_equal(cubes, same)
