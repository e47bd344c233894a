"""The phantom's images: one patient's anatomy under every center's protocol."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ipmn_core import phantom
from ipmn_core.phantom import anatomy


@pytest.fixture(scope="module")
def cohort():
    return phantom.patients(0)


@pytest.fixture(scope="module")
def pairs(cohort):
    """Patient, T1 (image, mask), T2 (image, mask): a patient with a cyst and a wide duct from each center."""
    both = cohort[
        cohort.has_t1 & cohort.has_t2 & (cohort.cyst_mm > 20) & (cohort.duct_mm > 4) & (cohort.mucin < 0.4)
    ]
    rows = both.groupby("center", sort=False).head(1).itertuples(index=False)
    return [(row, phantom.volumes(row, 0, "t1"), phantom.volumes(row, 0, "t2")) for row in rows]


@pytest.fixture(scope="module")
def dedicated_pairs(pairs):
    """The patients of `pairs`, scanned by the dedicated protocols."""
    rows = [row._replace(protocol="dedicated") for row, *_ in pairs]
    return [(row, phantom.volumes(row, 0, "t1"), phantom.volumes(row, 0, "t2")) for row in rows]


def arrays(scan):
    return [np.asarray(volume.dataobj) for volume in scan]


def test_image_and_mask_share_a_grid_and_the_mask_is_a_pancreas(pairs, dedicated_pairs):
    for _, *scans in pairs + dedicated_pairs:
        for image, mask in scans:
            assert image.shape == mask.shape
            assert np.array_equal(image.affine, mask.affine)
            inside = np.asarray(mask.dataobj)
            assert inside.dtype == np.uint8
            assert set(np.unique(inside)) == {0, 1}
            ml = inside.sum() * np.prod(mask.header.get_zooms()) / 1000
            assert 20 < ml < 160  # a normal pancreas has about 70 ml; atrophy takes, cysts add


def test_every_center_and_modality_has_its_own_grid_and_protocol(pairs):
    zooms = {tuple(np.round(scan[0].header.get_zooms(), 3)) for _, *scans in pairs for scan in scans}
    assert len(zooms) == 14
    assert len(set(anatomy.SCANNERS.values())) == 14
    assert all(0.9 <= z[0] == z[1] <= 1.6 and 3 <= z[2] <= 8 for z in zooms)


def test_a_dedicated_protocol_covers_the_standard_extent_with_finer_voxels():
    for standard in anatomy.SCANNERS.values():
        other, voxel = anatomy.dedicated(standard), np.array([standard.spacing] * 2 + [standard.thickness])
        finer = voxel * [0.95, 0.95, 0.8]
        assert [other.spacing, other.spacing, other.thickness] == pytest.approx(finer)
        more = other.matrix * finer - standard.matrix * voxel
        assert (more > -1e-9).all() and (more < finer).all()  # mm; by less than a voxel
        assert (finer * (np.array(other.matrix) - 1) <= anatomy.FINE * (np.array(anatomy.SHAPE) - 1)).all()
        assert (other.tr, other.bias, other.scale) == (standard.tr, standard.bias, standard.scale)
        assert other.noise > standard.noise and other.te > standard.te


def test_the_protocol_shows_in_the_header_and_a_little_in_the_signal(pairs, dedicated_pairs):
    for (row, *scans), (_, *others) in zip(pairs, dedicated_pairs, strict=True):
        for one, two in zip(scans, others, strict=True):
            zooms = np.divide(two[0].header.get_zooms(), one[0].header.get_zooms())
            assert zooms == pytest.approx([0.95, 0.95, 0.8]), row.patient_id
            (image, mask), (image2, mask2) = arrays(one), arrays(two)
            ratio = np.median(image2[mask2 > 0]) / np.median(image[mask > 0])
            assert 0.8 < ratio < 0.99, row.patient_id  # less signal: a later echo, on T1 a larger flip angle


def test_the_protocol_leaves_the_anatomy_alone(pairs, dedicated_pairs):
    for (row, *scans), (_, *others) in zip(pairs, dedicated_pairs, strict=True):
        ml, centre = [], []
        for _, mask in [*scans, *others]:
            inside = np.asarray(mask.dataobj)
            ml.append(inside.sum() * np.prod(mask.header.get_zooms()))
            centre.append(nib.affines.apply_affine(mask.affine, np.argwhere(inside)).mean(axis=0))
        assert ml[2:] == pytest.approx(ml[:2], rel=0.05), row.patient_id  # partial volume of another grid
        assert np.abs(np.subtract(centre[2:], centre[:2])).max() < 1.5, row.patient_id  # mm; about a pixel


def test_fluid_is_bright_on_t2_and_dark_on_t1_against_parenchyma(pairs, dedicated_pairs):
    for row, t1, t2 in pairs + dedicated_pairs:
        (image, mask), (image2, mask2) = arrays(t1), arrays(t2)
        inside, inside2 = image[mask > 0], image2[mask2 > 0]
        assert np.percentile(inside2, 99.5) > 3 * np.median(inside2), row.patient_id
        assert np.percentile(inside, 1) < 0.6 * np.median(inside), row.patient_id


def test_both_modalities_show_the_same_organ_and_findings(pairs):
    for row, t1, t2 in pairs:
        ml, centre, bright = [], [], []
        for image, mask in (t1, t2):
            inside = np.asarray(mask.dataobj)
            ml.append(inside.sum() * np.prod(mask.header.get_zooms()))
            centre.append(nib.affines.apply_affine(mask.affine, np.argwhere(inside)).mean(axis=0))
            bright.append(np.asarray(image.dataobj)[inside > 0] / np.asarray(image.dataobj).max())
        assert ml[0] == pytest.approx(ml[1], rel=0.1), (
            row.patient_id
        )  # partial volume at another slice thickness
        assert np.linalg.norm(centre[0] - centre[1]) < 4, row.patient_id  # mm; less than a slice
        dark_1 = (bright[0] < 0.55 * np.median(bright[0])).mean()
        bright_2 = (bright[1] > 3 * np.median(bright[1])).mean()
        assert dark_1 == pytest.approx(bright_2, rel=0.6), (
            row.patient_id
        )  # fluid fraction by two crude thresholds


def test_more_fluid_is_drawn_for_larger_findings(cohort):
    row = cohort[cohort.has_t2].iloc[0].copy()
    fluid = []
    for cyst, duct in ((0, 2.5), (15, 5), (40, 12)):
        row["cyst_mm"], row["duct_mm"], row["nodule_mm"] = cyst, duct, 0
        image, mask = arrays(phantom.volumes(row, 0, "t2"))
        fluid.append((image[mask > 0] > 0.5 * image[mask > 0].max()).mean())
    assert fluid[0] < 0.6 * fluid[1] < 0.36 * fluid[2]


def test_signals_follow_the_spoiled_echo_equation_at_its_limits():
    scanner = anatomy.Scanner(1, 1, (8, 8, 8), tr=1e9, te=0, flip=90, noise=0, bias=0, scale=1)
    density = {tissue: values[2] for tissue, values in anatomy.TISSUES.items()}
    assert anatomy.signals(scanner, 0) == pytest.approx(
        density
    )  # no weighting: proton density, the largest is 1
    t1 = anatomy.SCANNERS["NYU", "t1"]
    assert (
        anatomy.signals(t1, 1)["cyst"] > 1.5 * anatomy.signals(t1, 0)["cyst"]
    )  # mucin brightens fluid on T1
    assert anatomy.signals(t1, 1)["fluid"] == anatomy.signals(t1, 0)["fluid"]


def test_smooth_fields_have_unit_spread_and_follow_the_place_not_the_grid():
    coarse, fine = [np.arange(0, 200, 4.0)] * 3, [np.arange(0, 200, 2.0)] * 3
    one, two = (anatomy.smooth_field(np.random.default_rng(3), axes, 10) for axes in (coarse, fine))
    assert one.std() == pytest.approx(
        1, abs=0.1
    )  # 21^3 lattice values, smoothed over about 4^3: 150 independent
    assert np.allclose(one, two[::2, ::2, ::2], atol=1e-4)


def ml_of(coverage):
    return float(np.asarray(coverage.dataobj).sum() * np.prod(coverage.header.get_zooms())) / 1000


@pytest.fixture(scope="module")
def plain(cohort):
    """A patient without any finding, to be given some."""
    row = cohort[cohort.has_t1 & cohort.has_t2].iloc[0].copy()
    row["cyst_mm"], row["duct_mm"], row["nodule_mm"], row["atrophy"] = 0, 2.5, 0, 0.1
    return row


def lesion_ml(row, seed=0, **findings):
    changed = row.copy()
    for name, value in findings.items():
        changed[name] = value
    return ml_of(phantom.lesion(changed, seed, "t2"))


def test_the_lesion_lies_on_the_grid_of_the_scan_and_inside_its_mask(pairs, dedicated_pairs):
    for row, *scans in pairs + dedicated_pairs:
        for modality, (image, mask) in zip(("t1", "t2"), scans, strict=True):
            lesion = phantom.lesion(row, 0, modality)
            assert lesion.shape == image.shape and np.array_equal(lesion.affine, image.affine)
            part, inside = np.asarray(lesion.dataobj), np.asarray(mask.dataobj)
            assert part.dtype == np.float32 and part.min() >= 0 and 0.9 < part.max() <= 1 + 1e-6
            assert part[inside > 0].sum() > 0.9 * part.sum(), row.patient_id  # the rest is partial volume


def test_on_t2_the_lesion_is_brighter_than_parenchyma_and_on_t1_darker(pairs):
    for row, *scans in pairs:
        for modality, (image, mask) in zip(("t1", "t2"), scans, strict=True):
            part = np.asarray(phantom.lesion(row, 0, modality).dataobj)
            data, inside = np.asarray(image.dataobj), np.asarray(mask.dataobj) > 0
            ratio = np.median(data[part > 0.9]) / np.median(data[inside & (part == 0)])
            assert ratio > 2 if modality == "t2" else ratio < 0.8, row.patient_id


def test_a_larger_finding_is_a_larger_lesion_and_a_normal_duct_is_none(plain):
    assert lesion_ml(plain) == lesion_ml(plain, duct_mm=4.99) == 0
    cysts = [lesion_ml(plain, cyst_mm=mm) for mm in (8, 15, 25, 40)]
    ducts = [lesion_ml(plain, duct_mm=mm) for mm in (5, 8, 12)]
    assert cysts[0] > 0 and (np.diff(cysts) > 0).all()
    assert ducts[0] > 0 and (np.diff(ducts) > 0).all()
    both = lesion_ml(plain, cyst_mm=25, duct_mm=8)
    assert max(cysts[2], ducts[1]) < both <= cysts[2] + ducts[1]


def test_a_cysts_volume_is_that_of_a_ball_with_grapes(plain):
    for mm in (15, 25, 35):
        volumes = [lesion_ml(plain, seed, cyst_mm=mm) for seed in range(6)]
        ball = np.pi / 6 * mm**3 / 1000
        # between the middle loculus alone (three quarters of the width) and the whole ball with satellites,
        # of which there are 0.8 on average, each of at most 0.4 of the width; the warp is a tenth of it
        assert 0.75**3 * 0.9 * ball < min(volumes) and max(volumes) < 1.2 * ball, mm


def test_a_ducts_volume_is_that_of_its_cones(plain):
    plain = plain.copy()
    plain["duct_mm"] = 9
    rng = np.random.default_rng([0, plain.number])
    for length in (16, 16, 16, 3.2):  # the fields that `draw` takes from the stream before the gland
        anatomy.smooth_field(rng, anatomy.fine_axes(), length)
    line, _, duct = anatomy.gland(rng, plain)
    steps, r = np.linalg.norm(np.diff(line[1:], axis=0), axis=1), duct[1:]
    cones = np.pi / 3 * (steps * (r[1:] ** 2 + r[1:] * r[:-1] + r[:-1] ** 2)).sum() / 1000
    assert lesion_ml(plain) == pytest.approx(cones, rel=0.15)  # the ends are rounded, the fine grid is coarse


def test_the_lesion_is_redrawn_from_the_truth_on_disk(phantom_root):
    truth = pd.read_csv(phantom_root / "truth.csv")
    row = truth[truth.has_t2 & (truth.cyst_mm > 10)].iloc[0]
    stored = nib.load(phantom_root / "IPMN_images_masks" / "t2" / "images" / f"{row.patient_id}.nii.gz")
    lesion = phantom.lesion(row, 0, "t2")
    assert lesion.shape == stored.shape and np.allclose(lesion.affine, stored.affine, atol=1e-4)
    image, _ = phantom.volumes(row, 0, "t2")
    assert np.array_equal(np.asarray(image.dataobj), np.asarray(stored.dataobj))
