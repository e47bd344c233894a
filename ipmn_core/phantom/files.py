"""The phantom on disk, in the data set's own layout."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import ndimage
from tqdm.auto import tqdm

from ipmn_core.names import MODALITIES
from ipmn_core.phantom.anatomy import draw
from ipmn_core.phantom.patients import patients
from ipmn_core.phantom.scanner import nifti, volumes


def save(image, path):
    """Write image as .nii.gz; no time or file name in the gzip header, so equal images are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        packed.write(image.to_bytes())


def write_patient(patient, seed, layout, root):
    """Write the scans of one row of `patients` under root."""
    drawn, name = draw(patient, seed), f"{patient.patient_id}.nii.gz"
    for m in MODALITIES:
        if not getattr(patient, f"has_{m}"):
            continue
        image, mask = volumes(patient, seed, m, drawn)
        if layout == "first":
            inside = np.asanyarray(mask.dataobj)
            roi = nifti(np.asanyarray(image.dataobj) * inside, image.affine)
            save(roi.slicer[ndimage.find_objects(inside)[0]], root / f"{m}_clean_ROI" / name)
        else:
            save(image, root / f"IPMN_images_masks/{m}/images" / name)
            save(mask, root / f"IPMN_images_masks/{m}/masks" / name)


def write_sheets(cohort, layout, root):
    """Make the folder root, with the label sheets of the layout and truth.csv."""
    about = {"Patient ID": cohort.patient_id, "Age": cohort.age, "Sex": cohort.sex, "Center": cohort.center}
    label = {"Risk assessment": cohort.label_t1.fillna(cohort.label_t2)}
    file = {m: cohort.patient_id.where(cohort[f"has_{m}"]) for m in MODALITIES}
    if layout == "first":
        sheets = {
            f"IPMN_labels_{m}_total": pd.DataFrame({**about, "Modality": m.upper(), **label})[file[m].notna()]
            for m in MODALITIES
        }
    else:
        columns = {"T1 name": file["t1"], "T2 name": file["t2"], **about, **label}
        sheets = {"IPMN_labels_total": pd.DataFrame(columns)}
    root.mkdir(parents=True)
    for name, sheet in sheets.items():
        sheet.to_excel(root / f"{name}.xlsx", index=False)
    cohort.to_csv(root / "truth.csv", index=False)


def write(root, *, seed=0, layout="second", max_per_cell=None, shortcut=0.0, jobs=1, progress=True):
    """Write the phantom cohort to root, complete or not at all, and return its path.

    `layout` is that of the data set's "first" or "second" release; truth.csv beside the sheets holds
    `patients`, which explains max_per_cell and shortcut. The files do not depend on jobs (processes). Raises
    FileExistsError if root exists.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists: remove it, or write the phantom to another folder")
    cohort = patients(seed, max_per_cell, shortcut)
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        write_sheets(cohort, layout, partial)
        rows = list(cohort.itertuples(index=False))
        rows = tqdm(rows, "phantom", unit="patient", disable=not progress)
        Parallel(jobs, batch_size=8)(delayed(write_patient)(row, seed, layout, partial) for row in rows)
        os.rename(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root
