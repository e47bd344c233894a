"""A federation of two invented hospitals, each with a manifest: two classes, the positive one first."""

import csv

import nibabel as nib
import numpy as np
import pytest
from hospitals import Hospitals, assert_same_bits, profile, serve

from ipmn_core.flower import demo
from ipmn_core.flower.deployment import FederationError

LABELS = {"radiology.north": "MBMBMBBB", "42_hospital": "BBBB"}  # one has no malignant case
MODALITY = "CT + Größe"


def write_manifest(path, scans):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "mask", "label", "center", "modality"), *scans])
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """The rows of each hospital's manifest, with its own name for itself."""
    folder, rng, rows = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0), {}
    for name, labels in LABELS.items():
        rows[name] = []
        for k, letter in enumerate(labels):
            image, mask = rng.normal(500, 60, (9, 8, 7)), np.zeros((9, 8, 7))
            mask[2:7, 2:7, 1:6] = 1
            image[3:6, 3:6, 2:5] += 300 * (letter == "M")
            files = [folder / f"{name}_{k}{kind}.nii.gz" for kind in ("", "_mask")]
            for path, volume in zip(files, (image, mask), strict=True):
                nib.save(nib.Nifti1Image(volume.astype(np.int16), np.diag([1.5, 1.5, 3, 1])), path)
            label = "malignant" if letter == "M" else "benign"
            rows[name].append((*files, label, f"{name.title()} (CT 2)", MODALITY))
    return rows


@pytest.fixture
def p(scans, tmp_path):
    """The server's profile; its own data are all hospitals' rows, for the comparison with one process."""
    rows = [(*row[:3], name, row[4]) for name in scans for row in scans[name]]
    together = write_manifest(tmp_path / "together.csv", rows)
    agreed = {"classes": ["malignant", "benign"], "positive": ["malignant"], "modalities": [MODALITY]}
    agreed["data"] = str(together)
    return lambda **changes: profile(tmp_path / "server", **agreed | changes)


@pytest.fixture
def hospitals(scans, tmp_path):
    """Both hospitals, of which one may have other rows than its own."""

    def opened(**others):
        nodes = {}
        for name, rows in (scans | others).items():
            data = write_manifest(tmp_path / f"{name}.csv", rows)
            nodes[name] = {"site": name, "share": "scores", "data": str(data)}
            nodes[name]["outputs"] = str(tmp_path / "work" / name)
        return Hospitals(nodes)

    return opened


def test_two_hospitals_with_manifests_are_one_process_over_the_joined_one(p, hospitals, tmp_path):
    grid = hospitals()
    there = serve(grid, p(), modality=MODALITY)
    assert_same_bits(there, demo.in_process(p(), tuple(LABELS)), tmp_path / "work")
    assert {message.order["token"] for message in grid.asked}.pop().startswith("binary_CT___Gr__e_fedprox")


def changed(rows, place, values):
    return [(*row[:place], value, *row[place + 1 :]) for row, value in zip(rows, values, strict=True)]


OTHERS = {
    "label 'mild' of 42_hospital_1 is none of malignant, benign": (2, ["benign", "mild"] * 2),
    "holds scans of CT 1, CT 2, but this is the site 42_hospital": (3, ["CT 1", "CT 2"] * 2),
    "holds scans of Radiology.North, but this is the site 42_hospital": (3, ["Radiology.North"] * 4),
    "no labeled scan of CT + Größe; found: MR": (4, ["MR"] * 4),
}


@pytest.mark.parametrize("text", OTHERS)
def test_a_hospital_without_what_was_agreed_on_is_refused_before_training(p, hospitals, scans, text, capfd):
    """The server names the site and what was agreed on; what the site has instead stays in its own log."""
    grid = hospitals(**{"42_hospital": changed(scans["42_hospital"], *OTHERS[text])})
    agreed = r"one center, CT \+ Größe, classes malignant, benign; positive: malignant"
    with pytest.raises(FederationError, match=rf"^42_hospital failed \(query\): its cases .*{agreed}.* log$"):
        serve(grid, p(), modality=MODALITY)
    assert text in capfd.readouterr().err
    assert {message.kind for message in grid.asked} == {"query"}
    for message in grid.left:
        assert not any(name in message.bytes for name in (b"mild", b"CT 1", b"Radiology.North", b"MR"))


def test_classes_that_nobody_agreed_on_are_those_of_the_paper(p, hospitals, capfd):
    with pytest.raises(FederationError, match=r"^\S+ failed .* no risk, low risk, high risk;"):
        serve(hospitals(), p(data="phantom", classes=None, positive=None), modality=MODALITY)
    assert "has the classes benign, malignant (positive: malignant)" in capfd.readouterr().err
