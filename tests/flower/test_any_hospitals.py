"""A federation of two invented hospitals, each with a manifest: two classes, the positive one first."""

import pandas as pd
import pytest
from hospitals import Hospitals, assert_same_bits, profile, serve
from small_runs import write_scan

from ipmn_core.flower import demo
from ipmn_core.flower.deployment import FederationError

LABELS = {"radiology.north": ["malignant", "benign"] * 3 + ["benign"] * 2}
LABELS["42_hospital"] = ["benign"] * 4  # no malignant case
MODALITY = "CT + Größe"


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Each hospital's manifest, with its own name for itself."""
    folder, found = tmp_path_factory.mktemp("volumes"), {}
    for name, labels in LABELS.items():
        files = [write_scan(folder, f"{name}_{k}", label == "malignant") for k, label in enumerate(labels)]
        found[name] = pd.DataFrame(files, columns=["image", "mask"]).assign(
            label=labels, center=f"{name.title()} (CT 2)", modality=MODALITY
        )
    return found


@pytest.fixture
def p(scans, tmp_path):
    """The server's profile; its own data are all hospitals' rows, for the comparison with one process."""
    together = pd.concat([rows.assign(center=name) for name, rows in scans.items()])
    together.to_csv(tmp_path / "together.csv", index=False)
    agreed = {"classes": ["malignant", "benign"], "positive": ["malignant"], "modalities": [MODALITY]}
    agreed["data"] = str(tmp_path / "together.csv")
    return lambda **changes: profile(tmp_path / "server", **agreed | changes)


@pytest.fixture
def hospitals(scans, tmp_path):
    """Both hospitals, of which one may have other rows than its own."""

    def opened(**others):
        nodes = {}
        for name, rows in (scans | others).items():
            nodes[name] = {"site": name, "share": "scores", "data": str(tmp_path / f"{name}.csv")}
            nodes[name]["outputs"] = str(tmp_path / "work" / name)
            rows.to_csv(nodes[name]["data"], index=False)
        return Hospitals(nodes)

    return opened


def test_two_hospitals_with_manifests_are_one_process_over_the_joined_one(p, hospitals, tmp_path):
    grid = hospitals()
    there = serve(grid, p(), modality=MODALITY)
    assert_same_bits(there, demo.in_process(p(), tuple(LABELS)), tmp_path / "work")
    assert {message.order["token"] for message in grid.asked}.pop().startswith("binary_CT___Gr__e_fedprox")


OTHERS = {
    "label 'mild' of 42_hospital_1 is none of malignant, benign": {"label": ["benign", "mild"] * 2},
    "holds scans of CT 1, CT 2, but this is the site 42_hospital": {"center": ["CT 1", "CT 2"] * 2},
    "holds scans of Radiology.North, but this is the site 42_hospital": {"center": "Radiology.North"},
    "no labeled scan of CT + Größe; found: MR": {"modality": "MR"},
}


@pytest.mark.parametrize("text", OTHERS)
def test_a_hospital_without_what_was_agreed_on_is_refused_before_training(p, hospitals, scans, text, capfd):
    """The server names the site and what was agreed on; what the site has instead stays in its own log."""
    grid = hospitals(**{"42_hospital": scans["42_hospital"].assign(**OTHERS[text])})
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
