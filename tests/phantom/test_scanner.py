"""The phantom's images: one patient's anatomy under every center's protocol, and its lesions."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ipmn_core import phantom
from ipmn_core.phantom import anatomy, scanner


@pytest.fixture(scope="module")
def cohort():
    return phantom.patients(0)


@pytest.fixture(scope="module")
def pairs(cohort):
    """Patient, T1 (image, mask), T2 (image, mask): a patient with a cyst and a wide duct from each center."""
    both = cohort[cohort.has_t1 & cohort.has_t2 & (cohort.mucin < 0.4)]
    both = both[(both.cyst_mm > 20) & (both.duct_mm > 4)].groupby("center", sort=False).head(1)
    rows = both.itertuples(index=False)
    return [(row, phantom.volumes(row, 0, "t1"), phantom.volumes(row, 0, "t2")) for row in rows]


@pytest.fixture(scope="module")
def dedicated_pairs(pairs):
    """Two of the patients of `pairs`, scanned by the dedicated protocols."""
    rows = [row._replace(protocol="dedicated") for row, *_ in pairs[:2]]
    return [(row, phantom.volumes(row, 0, "t1"), phantom.volumes(row, 0, "t2")) for row in rows]


def arrays(scan):
    return [np.asarray(volume.dataobj) for volume in scan]


def volume_and_center(mask):
    """Volume in ml and center in mm of a mask."""
    inside = np.asarray(mask.dataobj)
    ml = inside.sum() * np.prod(mask.header.get_zooms()) / 1000
    return ml, nib.affines.apply_affine(mask.affine, np.argwhere(inside)).mean(axis=0)


def test_image_and_mask_share_a_grid_and_the_mask_is_a_pancreas(pairs, dedicated_pairs):
    for _, *scans in pairs + dedicated_pairs:
        for image, mask in scans:
            assert image.shape == mask.shape and np.array_equal(image.affine, mask.affine)
            assert mask.get_data_dtype() == np.uint8 and set(np.unique(mask.dataobj)) == {0, 1}
            assert 20 < volume_and_center(mask)[0] < 250  # normal: about 70 ml; atrophy takes, cysts add


def test_every_center_and_modality_has_its_own_grid_and_protocol(pairs):
    zooms = {tuple(np.round(scan[0].header.get_zooms(), 3)) for _, *scans in pairs for scan in scans}
    assert len(zooms) == len(set(scanner.SCANNERS.values())) == 14
    assert all(0.9 <= z[0] == z[1] <= 1.6 and 3 <= z[2] <= 8 for z in zooms)


def test_a_dedicated_protocol_covers_the_standard_extent_with_finer_voxels():
    for standard in scanner.SCANNERS.values():
        other, voxel = scanner.dedicated(standard), np.array([standard.spacing] * 2 + [standard.thickness])
        finer = voxel * [0.95, 0.95, 0.8]
        assert [other.spacing, other.spacing, other.thickness] == pytest.approx(finer)
        more = other.matrix * finer - standard.matrix * voxel
        assert (more > -1e-9).all() and (more < finer).all()  # mm; by less than a voxel
        assert (finer * (np.array(other.matrix) - 1) <= anatomy.FINE * (np.array(anatomy.SHAPE) - 1)).all()
        assert (other.tr, other.bias, other.scale) == (standard.tr, standard.bias, standard.scale)
        assert other.noise > standard.noise and other.te > standard.te


def test_both_modalities_show_the_same_organ_and_fluid_is_bright_on_t2_alone(pairs):
    for row, t1, t2 in pairs:
        (ml, center), (ml2, center2) = volume_and_center(t1[1]), volume_and_center(t2[1])
        assert ml == pytest.approx(ml2, rel=0.1), row.patient_id  # partial volume at another thickness
        assert np.linalg.norm(center - center2) < 4, row.patient_id  # mm; less than a slice
        (image, mask), (image2, mask2) = arrays(t1), arrays(t2)
        inside, inside2 = image[mask > 0], image2[mask2 > 0]
        # a simple cyst may fill much of an outline: the gland is at the other quartile
        assert np.percentile(inside2, 99.5) > 1.5 * np.percentile(inside2, 25), row.patient_id
        assert np.percentile(inside, 1) < 0.6 * np.percentile(inside, 75), row.patient_id


def test_signals_follow_the_spoiled_echo_equation_at_its_limits():
    no_weighting = scanner.Scanner(1, 1, (8, 8, 8), tr=1e9, te=0, flip=90, noise=0, bias=0, scale=1)
    density = {tissue: values[2] for tissue, values in scanner.TISSUES.items()}
    assert scanner.signals(no_weighting, 0) == pytest.approx(density)  # the largest is 1
    pure, mucinous = (scanner.signals(scanner.SCANNERS["NYU", "t1"], mucin) for mucin in (0, 1))
    assert mucinous["cyst"] > 1.5 * pure["cyst"]  # mucin brightens fluid on T1
    assert mucinous["fluid"] == pure["fluid"]


@pytest.fixture(scope="module")
def lesion_ml(cohort):
    """Lesion volume in ml by findings, of a patient who has none."""
    row = cohort[cohort.has_t1 & cohort.has_t2].iloc[0].copy()
    row["cyst_mm"], row["duct_mm"], row["nodule_mm"], row["atrophy"] = 0, 2.5, 0, 0.1

    def measure(seed=0, **findings):
        part = phantom.lesion(pd.Series({**row, **findings}), seed, "t2")
        return float(np.asarray(part.dataobj).sum() * np.prod(part.header.get_zooms())) / 1000

    measure.row = row
    return measure


def test_the_lesion_is_inside_the_mask_brighter_than_the_rest_on_t2_and_darker_on_t1(pairs, dedicated_pairs):
    for row, *scans in pairs + dedicated_pairs:
        for modality, (image, mask) in zip(("t1", "t2"), scans, strict=True):
            lesion = phantom.lesion(row, 0, modality)
            assert lesion.shape == image.shape and np.array_equal(lesion.affine, image.affine)
            part, inside = np.asarray(lesion.dataobj), np.asarray(mask.dataobj) > 0
            assert part.dtype == np.float32 and part.min() >= 0 and 0.9 < part.max() <= 1 + 1e-6
            assert part[inside].sum() > 0.9 * part.sum(), row.patient_id  # the rest is partial volume
            data = np.asarray(image.dataobj)
            gland = np.percentile(data[inside & (part == 0)], 25 if modality == "t2" else 75)
            ratio = np.median(data[part > 0.9]) / gland
            assert ratio > 2 if modality == "t2" else ratio < 0.8, row.patient_id


def test_a_cysts_volume_is_that_of_a_ball_with_grapes_and_a_normal_duct_has_none(lesion_ml):
    assert lesion_ml() == lesion_ml(duct_mm=4.99) == 0
    for mm in (15, 35):
        volumes = [lesion_ml(seed, cyst_mm=mm) for seed in range(4)]
        ball = np.pi / 6 * mm**3 / 1000
        # between the middle loculus alone (three quarters of the width) and the whole ball with satellites,
        # of which there are 0.8 on average, each of at most 0.4 of the width; the warp is a tenth of it
        assert 0.75**3 * 0.9 * ball < min(volumes) and max(volumes) < 1.2 * ball, mm


def test_a_ducts_volume_is_that_of_its_cones(lesion_ml):
    row = pd.Series({**lesion_ml.row, "duct_mm": 9})
    rng = np.random.default_rng([0, row.number])
    for length in (16, 16, 16, 3.2):  # the fields that `draw` takes from the stream before the gland
        anatomy.smooth_field(rng, anatomy.AXES, length)
    line, _, duct = anatomy.gland(rng, row)
    steps, r = np.linalg.norm(np.diff(line[1:], axis=0), axis=1), duct[1:]
    cones = np.pi / 3 * (steps * (r[1:] ** 2 + r[1:] * r[:-1] + r[:-1] ** 2)).sum() / 1000
    assert lesion_ml(duct_mm=9) == pytest.approx(cones, rel=0.15)  # rounded ends, a coarse fine grid


def test_a_row_of_the_truth_on_disk_redraws_the_stored_image(phantom_root):
    truth = pd.read_csv(phantom_root / "truth.csv")
    row = truth[truth.has_t2 & (truth.cyst_mm > 10)].iloc[0]
    stored = nib.load(phantom_root / "IPMN_images_masks" / "t2" / "images" / f"{row.patient_id}.nii.gz")
    image, _ = phantom.volumes(row, 0, "t2")
    assert np.array_equal(np.asarray(image.dataobj), np.asarray(stored.dataobj))


def shifted(row, shift, **other):
    return pd.Series({**row._asdict(), "scanner_shift": shift, **other})


def test_at_shift_0_all_centers_share_one_scanner_and_at_half_they_have_their_own(pairs):
    for row, *_ in pairs[1:3]:
        for modality in ("t1", "t2"):
            nyu, own = (phantom.volumes(r, 0, modality) for r in (row._replace(center="NYU"), row))
            mine = phantom.volumes(shifted(row, 0.0), 0, modality)
            invented = phantom.volumes(shifted(row, 0.0, center="Lakeside", scanner="EMC"), 0, modality)
            half = phantom.volumes(shifted(row, 0.5), 0, modality)
            for a, b, c in zip(arrays(nyu), arrays(mine), arrays(invented), strict=True):
                assert np.array_equal(a, b) and np.array_equal(a, c)
            for a, b in zip(arrays(own), arrays(half), strict=True):
                assert np.array_equal(a, b)


def test_between_0_and_half_scanners_lie_between_and_fit_the_fine_grid(pairs):
    for row, *_ in pairs:
        for modality in ("t1", "t2"):
            low, middle, high = (scanner.scanner_of(shifted(row, s), modality) for s in (0.0, 0.25, 0.5))
            for name in ("spacing", "thickness", "tr", "te", "flip", "noise", "bias"):
                ends = sorted([getattr(low, name), getattr(high, name)])
                assert ends[0] <= getattr(middle, name) <= ends[1], (row.center, name)
            for fine in (middle, scanner.dedicated(middle)):
                extent = (np.array(fine.matrix) - 1) * [fine.spacing, fine.spacing, fine.thickness]
                assert (extent <= anatomy.FINE * (np.array(anatomy.SHAPE) - 1)).all(), row.center


def test_at_shift_1_three_centers_have_the_opposite_contrast_and_all_the_same_lesions(pairs):
    for row, *scans in pairs:
        far = shifted(row, 1.0)
        for modality, (image, mask) in zip(("t1", "t2"), scans, strict=True):
            lesion = [np.asarray(phantom.lesion(r, 0, modality).dataobj) for r in (row, far)]
            other, wider = phantom.volumes(far, 0, modality)
            assert np.array_equal(image.affine, other.affine) and image.shape == other.shape
            inside, data = np.asarray(mask.dataobj) > 0, np.asarray(other.dataobj)
            # a point spread that is wider than a voxel loses thin parts of outlines
            assert np.asarray(wider.dataobj)[inside].mean() > 0.9
            assert lesion[1].sum() == pytest.approx(lesion[0].sum(), rel=0.05)
            bright = (modality == "t2") != (row.center in ("MCF", "NU", "IU"))
            gland = np.percentile(data[inside & (lesion[1] == 0)], 25 if bright else 75)
            ratio = np.median(data[lesion[1] > 0.8]) / gland
            assert ratio > 1.5 if bright else ratio < 0.8, (row.center, modality, ratio)


def test_contrasts_turn_one_center_after_another_and_gamma_grows(pairs):
    def opposite(row, shift):
        return scanner.scanner_of(shifted(row, shift), "t2").tr < 1000

    rows = [row for row, *_ in pairs]
    assert [sum(opposite(row, shift) for row in rows) for shift in (0, 0.5, 0.6, 0.8, 1)] == [0, 0, 1, 2, 3]
    gammas = [max(scanner.scanner_of(shifted(row, s), "t1").gamma for row in rows) for s in (0.5, 0.75, 1)]
    assert gammas == pytest.approx([1, 3**0.5, 3])


def test_fluid_and_the_glands_brightness_tell_nothing_by_themselves(cohort):
    healthy = cohort[cohort.has_t2 & (cohort.cyst_mm == 0) & (cohort.duct_mm < 4)].head(10)
    bright, glands = [], []
    for row in healthy.itertuples():
        drawn = anatomy.draw(row, 0)
        image, mask = phantom.volumes(row, 0, "t2", drawn)
        data, inside = np.asarray(image.dataobj), np.asarray(mask.dataobj) > 0
        voxel = np.prod(image.header.get_zooms()) / 1000
        bright.append((data[inside] > 0.6 * np.percentile(data, 99.9)).sum() * voxel)
        glands.append(drawn.gland[1])
    assert sum(ml > 0.5 for ml in bright) >= 2 and max(bright) > 2, bright  # ml, of simple cysts
    assert max(glands) / min(glands) > 1.5
