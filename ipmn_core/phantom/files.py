"""Write the phantom in the data set's own layouts, or as a manifest with files."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from nibabel.processing import resample_from_to
from scipy import ndimage
from tqdm.auto import tqdm

from ipmn_core.names import MODALITIES
from ipmn_core.phantom.anatomy import draw
from ipmn_core.phantom.patients import AXES, INVENTED, patients, patients_of
from ipmn_core.phantom.scanner import nifti, volumes

CLASSES = ("benign", "borderline", "malignant")  # of a manifest
FOLDERS = {"manifest": "{kind}/{m}"}  # of images and masks; of the other layouts:
VOLUMES = "IPMN_images_masks/{m}/{kind}"


def save(image, path):
    """Write image as .nii.gz without time and name in the gzip header: equal images give equal files."""
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
            continue
        for kind, volume in (("images", image), ("masks", mask)):
            save(volume, root / FOLDERS.get(layout, VOLUMES).format(m=m, kind=kind) / name)
        if layout == "third":
            save(scaled_roi(image, mask), root / "IPMN_Classification" / m / name)


def scaled_roi(image, mask):
    """The ROI as in today's release: 1 mm, masked, cut to a tight box, z-scored inside, zero outside."""
    zooms = np.array(image.header.get_zooms())
    grid = np.rint(image.shape * zooms).astype(int), image.affine @ np.diag([*1 / zooms, 1])
    inside = resample_from_to(mask, grid, order=0).get_fdata() > 0.5
    voxels = resample_from_to(image, grid, order=1, mode="nearest").get_fdata() * inside
    values = voxels[voxels != 0]
    roi = np.where(voxels != 0, (voxels - values.mean()) / values.std(), 0).astype(np.float32)
    return nifti(roi, grid[1]).slicer[ndimage.find_objects(inside.astype(int))[0]]


def manifest(cohort):
    """The manifest of a cohort: one row per scan, T1 first, blank labels for unlabeled scans."""
    tables = []
    for m in MODALITIES:
        here = cohort[cohort[f"has_{m}"]]
        name, label = f"{m}/" + here.patient_id + ".nii.gz", here[f"label_{m}"].map(dict(enumerate(CLASSES)))
        files = {"image": "images/" + name, "mask": "masks/" + name}
        about = {"label": label, "center": here.center, "modality": m, "patient_id": here.patient_id}
        tables.append(pd.DataFrame(files | about))
    return pd.concat(tables)


def splits(cohort, m):
    """{folder: name and fold of each labeled scan} of today's release: 5 folds over all, 4 per center."""
    known = cohort.dropna(subset=f"label_{m}").sort_values(f"label_{m}", kind="stable")
    folds = {"3-class": np.arange(len(known)) % 5, "2-class": known.groupby("center").cumcount() % 4}
    return {of: pd.DataFrame({"name": known.patient_id, "fold": fold}) for of, fold in folds.items()}


def sheets(cohort, layout):
    """{name: label sheet} of a release's layout."""
    about = {"Patient ID": cohort.patient_id, "Age": cohort.age, "Sex": cohort.sex, "Center": cohort.center}
    label = {"Risk assessment": cohort.label_t1.fillna(cohort.label_t2)}
    file = {m: cohort.patient_id.where(cohort[f"has_{m}"]) for m in MODALITIES}
    if layout == "second":
        columns = {"T1 name": file["t1"], "T2 name": file["t2"], **about, **label}
        return {"IPMN_labels_total": pd.DataFrame(columns)}
    found = {
        f"IPMN_labels_{m}_total": pd.DataFrame({**about, "Modality": m.upper(), **label})[file[m].notna()]
        for m in MODALITIES
    }
    if layout == "third":
        columns = {"Patient ID T1": file["t1"], "Patient ID T2": file["t2"], **about}
        seen = label["Risk assessment"].ne(2) & (cohort.number % 3 == 0)  # without histology
        columns["follow-up information"] = seen.map({True: "no change", False: "surgery"})
        found["IPMN_labels_total"] = pd.DataFrame(columns | label).drop(columns="Patient ID")
    return found


def write_sheets(cohort, layout, root):
    """Make the folder root with truth.csv and the layout's label sheets and splits, or the manifest."""
    folder = root / "IPMN_Classification" if layout == "third" else root
    folder.mkdir(parents=True)
    cohort.to_csv(root / "truth.csv", index=False)
    if layout == "manifest":
        manifest(cohort).to_csv(root / "scans.csv", index=False)
        return
    for name, sheet in sheets(cohort, layout).items():
        sheet.to_excel(folder / f"{name}.xlsx", index=False)
    for m in MODALITIES if layout == "third" else ():
        for of, table in splits(cohort, m).items():
            path = root / "data splits/classification" / of / f"{m}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)


def write(
    root,
    *,
    seed=0,
    layout="second",
    max_per_cell=None,
    shortcut=0.0,
    shift=0.5,
    centers=None,
    axes=False,
    jobs=1,
    progress=True,
):
    """Write the phantom cohort to root, completely or not at all, and return its path.

    `layout` is that of the data set's "first", "second" or "third" release, or "manifest": scans.csv with the
    classes `CLASSES` and `centers` of any name (default: `INVENTED`). truth.csv holds `patients` (see there
    for max_per_cell and shortcut), or `patients_of`. With `axes`, each center stores its voxels along its own
    axes (`AXES`, in turn), which the affine and a column of truth.csv give. `shift` is how much the centers'
    scanners differ (`scanner_of`); it is a column of truth.csv unless 0.5. The files do not depend on jobs
    (processes). Raises FileExistsError if root exists, ValueError for centers in another layout.
    """
    root = Path(root).absolute()  # joblib's processes may have another working directory
    if root.exists():
        raise FileExistsError(f"{root} exists: remove it, or write the phantom to another folder")
    if centers and layout != "manifest":
        raise ValueError(f"layout {layout} has the paper's centers: choose others with the layout manifest")
    invented = [centers or INVENTED] if layout == "manifest" else []
    cohort = (patients_of if invented else patients)(*invented, seed, max_per_cell, shortcut)
    if axes:
        cohort["stored_axes"] = [AXES[k % len(AXES)] for k in pd.factorize(cohort["center"])[0]]
    if shift != 0.5:
        cohort["scanner_shift"] = shift
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        write_sheets(cohort, layout, partial)
        rows = list(cohort.itertuples(index=False))
        rows = tqdm(rows, "phantom", unit="patient", disable=not progress)
        Parallel(jobs, batch_size=8)(delayed(write_patient)(row, seed, layout, partial) for row in rows)
        os.rename(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if jobs != 1:  # idle workers would delay the end of this process by five minutes
            get_reusable_executor().shutdown()
    return root
