"""Tiny cohorts: releases and manifests on disk, and tables of scans without files."""

import gzip

import nibabel
import numpy as np
import pandas as pd

from ipmn_core import data
from ipmn_core.data import releases
from ipmn_core.metrics import tables
from ipmn_core.params import Params

PAPER_TABLE1 = tables.paper(1)
COUNTS = PAPER_TABLE1[["center", "modality", "no_risk", "low_risk", "high_risk"]]
FIRST_HEADERS = ["Patient ID", "Age", "Sex", "Center", "Scanner", "Risk assessment"]
SECOND_HEADERS = ["T1", "T2", "Age", "Sex", "Center", "Scanner", "IPMN risk"]
THIRD_HEADERS = ["Patient ID T1", "Patient ID  T2", "Age", "Sex", "Center", "follow-up information", "Risk"]
MANIFEST = ("image", "label", "center")
VOLUME = gzip.compress(nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)).to_bytes())


def save_volume(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(VOLUME)


def save_sheet(path, headers, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([headers, *rows], dtype=object).to_excel(path, header=False, index=False)


def save_scans(folder, names):
    """A folder with a volume for each name that can be a file's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in {data.case_name(name) for name in names if name}:
        if name and "/" not in name:
            save_volume(folder / f"{name}.nii.gz")


def first_release(root, t1=(), t2=(), headers=FIRST_HEADERS):
    """A first release with rows (name, label) in each sheet and a file for each name."""
    for modality, rows in (("t1", t1), ("t2", t2)):
        rows = [(name, 60, "F", "", "", label) for name, label in rows]
        headers_here = headers if modality == "t1" else FIRST_HEADERS
        save_sheet(root / f"IPMN_labels_{modality}_total.xlsx", headers_here, rows)
        save_scans(root / f"{modality}_clean_ROI", [row[0] for row in rows])
    return root


def second_release(root, rows, headers=SECOND_HEADERS):
    """A second release with sheet rows (t1 name, t2 name, label) and an image and a mask for each name."""
    rows = [(t1, t2, 60, "F", "", "", label) for t1, t2, label in rows]
    save_sheet(root / "IPMN_labels_total.xlsx", headers, rows)
    for i, modality in enumerate(("t1", "t2")):
        for kind in ("images", "masks"):
            save_scans(root / f"IPMN_images_masks/{modality}/{kind}", [row[i] for row in rows])
    return root


def third_release(root, rows, sheets=("t1", "t2", "both"), roi=True, volumes=True, splits=None):
    """A third release with rows (t1 name, t2 name, label, follow-up) and its parts.

    `splits`: {"2-class/t1.csv": text of the file}.
    """
    labels = root / "IPMN_Classification"
    for i, m in enumerate(("t1", "t2")):
        if m in sheets:
            mine = [(row[i], 60, "F", "", "", row[2]) for row in rows if row[i]]
            save_sheet(labels / f"IPMN_labels_{m}_total.xlsx", FIRST_HEADERS, mine)
        names = [row[i] for row in rows]
        if roi:
            save_scans(labels / m, names)
        if volumes:
            for kind in ("images", "masks"):
                save_scans(root / f"IPMN_images_masks/{m}/{kind}", names)
    if "both" in sheets:
        both = [(t1, t2, 60, "F", "", follow, label) for t1, t2, label, follow in rows]
        save_sheet(labels / "IPMN_labels_total.xlsx", THIRD_HEADERS, both)
    for name, content in (splits or {}).items():
        path = root / "data splits/classification" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def manifest(folder, rows, columns=MANIFEST, separator=",", encoding="utf-8", name="scans.csv"):
    """A manifest of rows whose first cell names an image, which is written too."""
    for row in rows:
        save_volume(folder / f"{row[0]}.nii.gz")
    lines = [columns, *((f"{row[0]}.nii.gz", *row[1:]) for row in rows)]
    (folder / name).write_bytes("\n".join(separator.join(line) for line in lines).encode(encoding))
    return folder / name


def problems_of(root, severity="error", **settings):
    """Where, problem and remedy of each problem of one severity, as one text each; every one has a remedy."""
    problems = data.inspect(root, Params(**settings))[1]
    assert problems["remedy"].str.len().gt(0).all()
    rows = problems[problems["severity"] == severity]
    return [f"{row.where} | {row.problem} | {row.remedy}" for row in rows.itertuples()]


def only_error(root, *parts, **settings):
    """Asserts that a cohort has one error, which names every part."""
    (error,) = problems_of(root, **settings)
    for part in parts:
        assert str(part) in error


def scans_of(counts, paired=False):
    """Scans without files from rows (center, modality, no, low, high), labels in an irregular order."""
    rows = []
    for center, modality, *n in counts:
        labels = np.random.default_rng(len(rows)).permutation(np.repeat([0, 1, 2], n))
        for i, label in enumerate(labels):
            name = f"{center}_{i}" if paired else f"{center}_{modality}_{i}"
            rows.append((name, name.lower(), center, modality, label, "", "", f"{name}.nii.gz", ""))
    scans = pd.DataFrame(rows, columns=releases.SCAN_COLUMNS)
    return scans.sort_values("modality", kind="stable", ignore_index=True)


def paper_scans(paired=False):
    return scans_of(COUNTS.itertuples(index=False), paired)
