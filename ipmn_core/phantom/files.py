"""The phantom on disk, in the data set's own layout."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from ipmn_core.names import MODALITIES
from ipmn_core.phantom import anatomy, scanner
from ipmn_core.phantom.patients import patients


def clean_roi(image, mask):
    """image x mask, cut to the mask's tight bounding box; the affine moves with the cut."""
    inside = np.asanyarray(mask.dataobj)
    box = tuple(slice(a, b + 1) for a, b in zip(*anatomy.extent(inside), strict=True))
    return scanner.nifti(np.asanyarray(image.dataobj) * inside, image.affine).slicer[box]


def save(image, path):
    """Write image as .nii.gz; no time or file name in the gzip header, so equal images are equal files."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        packed.write(image.to_bytes())


def write_patient(patient, seed, layout, root):
    """Write the scans of one row of `patients` under root, whose folders exist."""
    drawn, name = anatomy.draw(patient, seed), f"{patient.patient_id}.nii.gz"
    for m in MODALITIES:
        if not getattr(patient, f"has_{m}"):
            continue
        image, mask = scanner.scan(drawn, patient, m, seed)
        if layout == "first":
            save(clean_roi(image, mask), root / f"{m}_clean_ROI" / name)
        else:
            save(image, root / "IPMN_images_masks" / m / "images" / name)
            save(mask, root / "IPMN_images_masks" / m / "masks" / name)


def write_sheets(cohort, layout, root):
    """Write the label sheets of the layout and truth.csv under root, and make the folders of the scans."""
    about = {"Patient ID": cohort.patient_id, "Age": cohort.age, "Sex": cohort.sex, "Center": cohort.center}
    label = {"Risk assessment": cohort.label_t1.fillna(cohort.label_t2)}
    file = {m: cohort.patient_id.where(cohort[f"has_{m}"]) for m in MODALITIES}
    if layout == "first":
        folders = [f"{m}_clean_ROI" for m in MODALITIES]
        sheets = {
            f"IPMN_labels_{m}_total": pd.DataFrame({**about, "Modality": m.upper(), **label})[file[m].notna()]
            for m in MODALITIES
        }
    else:
        folders = [f"IPMN_images_masks/{m}/{kind}" for m in MODALITIES for kind in ("images", "masks")]
        columns = {"T1 name": file["t1"], "T2 name": file["t2"], **about, **label}
        sheets = {"IPMN_labels_total": pd.DataFrame(columns)}
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for name, sheet in sheets.items():
        sheet.to_excel(root / f"{name}.xlsx", index=False)
    cohort.to_csv(root / "truth.csv", index=False)


def write(root, *, seed=0, layout="second", max_per_cell=None, shortcut=0.0, jobs=1, progress=True):
    """Write the phantom cohort to root, complete or not at all, and return its path.

    layout "second": IPMN_labels_total.xlsx and IPMN_images_masks/{t1,t2}/{images,masks}/NAME.nii.gz; "first":
    one sheet per modality and {t1,t2}_clean_ROI/NAME.nii.gz. truth.csv beside them holds `patients`, which
    explains max_per_cell and shortcut. The files do not depend on jobs (processes). Raises FileExistsError if
    root exists, ValueError for any other layout or shortcut.
    """
    root = Path(root)
    if layout not in ("first", "second"):
        raise ValueError(f"layout is {layout!r}: choose 'first' (clean ROIs) or 'second' (images and masks)")
    if root.exists():
        raise FileExistsError(f"{root} exists: remove it, or write the phantom to another folder")
    cohort = patients(seed, max_per_cell, shortcut)
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        write_sheets(cohort, layout, partial)
        work = Parallel(jobs, return_as="generator_unordered", batch_size=8)(
            delayed(write_patient)(row, seed, layout, partial) for row in cohort.itertuples(index=False)
        )
        for _ in tqdm(work, total=len(cohort), desc="phantom", unit="patient", disable=not progress):
            pass
        os.rename(partial, root)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and root.exists():
            raise FileExistsError(f"{root} was written by another process meanwhile: start again") from error
        raise
    return root


def split(root, target, centers):
    """Copy each center's scans and sheet rows into a folder of its own below target: {center: folder}.

    `root` is a phantom in the second layout. The result is what hospitals have that share no files. Raises
    FileExistsError if a folder already exists.
    """
    sheet = pd.read_excel(Path(root) / "IPMN_labels_total.xlsx")
    folders = {center: Path(target) / center for center in centers}
    for center, folder in folders.items():
        mine = sheet[sheet["Center"] == center]
        for m in MODALITIES:
            for kind in ("images", "masks"):
                place = f"IPMN_images_masks/{m}/{kind}"
                (folder / place).mkdir(parents=True)
                for name in mine[f"{m.upper()} name"].dropna():
                    shutil.copy(Path(root) / place / f"{name}.nii.gz", folder / place)
        mine.to_excel(folder / "IPMN_labels_total.xlsx", index=False)
    return folders
