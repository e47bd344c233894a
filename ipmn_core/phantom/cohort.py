"""A synthetic cohort with known truth, written in the data set's own layout.

Findings -> risk -> anatomy -> scan. A patient's latent findings give the probability of each label
(`patients`); `anatomy.py` draws them into one anatomy, which the center's T1 and T2 protocols image.
A switch, off by default, lets the protocol tell the label (`protocols`): a shortcut for probes to catch.
"""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.special import expit
from tqdm.auto import tqdm

from ipmn_core.names import CENTERS, MODALITIES
from ipmn_core.phantom import anatomy

TOTALS = {"t1": 723, "t2": 738}  # scans of the data set, those without a label included
NAMES = {  # how each center names its patients; where two styles are mixed, the second follows the first
    "NYU": ("nyu_{:04d}",),
    "MCF": ("CAD_{}", "MCF_{:02d}"),
    "NU": ("NU_{:02d}", "northwestern_{:04d}"),
    "AHN": ("AHN{:02d}",),
    "MCA": ("mca_{:02d}",),
    "IU": ("IU_{}",),
    "EMC": ("EMC{:03d}", "EMC_01_{:03d}"),
}

# Proportional odds: P(label <= k) = expit(THRESHOLDS[k] - risk). The weights are tuned until the model's own
# AUC for high risk is about 0.85 and the guideline's 0.78-0.80, as published for clinical scores.
WEIGHTS = {"cyst": 1.2, "duct": 1.5, "nodule": 0.9, "mucin": 0.5, "atrophy": 0.5}
THRESHOLDS = (0.8, 4.25)

PATIENT_COLUMNS = [
    *["number", "patient_id", "center", "label_t1", "label_t2", "has_t1", "has_t2"],
    *["cyst_mm", "duct_mm", "nodule_mm", "mucin", "atrophy"],
    *["prob_0", "prob_1", "prob_2", "guideline", "age", "sex", "protocol"],
]


def risk(findings):
    """Linear predictor of the ordinal model, one number a patient."""
    terms = {
        "cyst": np.log1p(findings.cyst_mm / 5),
        "duct": np.log(findings.duct_mm / 2.7),  # 2.7 mm: the normal duct in the body of the pancreas
        "nodule": findings.nodule_mm / 5,
        "mucin": findings.mucin,
        "atrophy": findings.atrophy,
    }
    return sum(WEIGHTS[name] * term for name, term in terms.items())


def guideline(findings):
    """Guideline class of each patient: 0 none, 1 worrisome features, 2 high-risk stigmata.

    Sizes as in the Fukuoka and Kyoto guidelines (Tanaka et al., Pancreatology 2017;17:738; Ohtsuka et al.,
    ibid. 2024;24:255): duct 5-9 mm or cyst >= 30 mm worries; duct >= 10 mm or nodule >= 5 mm is a stigma.
    """
    stigmata = (findings.duct_mm >= 10) | (findings.nodule_mm >= 5)
    worrisome = (findings.duct_mm >= 5) | (findings.cyst_mm >= 30)
    return np.where(stigmata, 2, np.where(worrisome, 1, 0))


def population(rng, n):
    """Findings of n patients, the model's probabilities, guideline class and a label drawn from the model."""
    severity, cyst, duct, nodule, mucin, atrophy = rng.standard_normal((6, n))
    cyst, duct = 0.8 * severity + 0.6 * cyst, 0.8 * severity + 0.6 * duct  # severity drives both
    cyst_mm = np.clip(15 + 14 * cyst, 0, 50)
    cyst_mm[cyst_mm < 4] = 0  # smaller than what a scan resolves: none
    has_nodule = (cyst_mm >= 12) & (rng.random(n) < expit(-1.8 + 1.4 * severity))
    columns = {
        "cyst_mm": cyst_mm,
        "duct_mm": np.clip(2.0 + np.exp(0.5 + 1.05 * duct), 2.2, 17),
        "nodule_mm": has_nodule * np.minimum(5.5 * np.exp(0.35 * nodule), 0.4 * cyst_mm),
        "mucin": expit(-0.8 + 0.6 * severity + 0.8 * mucin),
        "atrophy": expit(-1.4 + 0.8 * duct + 0.6 * atrophy),
    }
    findings = pd.DataFrame(columns).round(2)
    at_most = expit(np.subtract.outer(THRESHOLDS, risk(findings).to_numpy()))  # P(label <= 0), P(label <= 1)
    findings[["prob_0", "prob_1", "prob_2"]] = np.diff(at_most, axis=0, prepend=0, append=1).T
    return findings.assign(guideline=guideline(findings), label=(rng.random(n) > at_most).sum(axis=0))


def stratified(rng, pool, n):
    """n rows of pool, evenly spaced along guideline class and risk, shuffled.

    Unlike a simple sample's, every seed's AUC is then that of the population, without a scatter of 0.02.
    """
    order = np.lexsort([risk(pool), pool.guideline])
    places = ((np.arange(n) + rng.random()) / n * len(pool)).astype(int)
    return pool.iloc[order[rng.permutation(places)]].reset_index(drop=True)


def apportion(total, sizes):
    """Whole numbers that sum to total, in proportion to sizes (largest remainder)."""
    shares = total * np.asarray(sizes) / np.sum(sizes)
    counts = shares.astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts


def cells():
    """Scans to make: center, label (-1: none), t1, t2, patients. Labelled counts are the paper's table 1."""
    table = pd.read_csv(Path(__file__).parents[1] / "paper" / "table1.csv")
    counts = table.set_index(["center", "modality"])[["no_risk", "low_risk", "high_risk"]]
    counts.columns = [0, 1, 2]
    labelled = counts.sum(axis=1)
    for modality, scans in TOTALS.items():
        here = labelled.xs(modality, level="modality")
        counts.loc[(slice(None), modality), -1] = apportion(scans - here.sum(), here)
    cell = counts.astype(int).rename_axis("label", axis=1).stack().unstack("modality").reset_index()
    return cell.assign(patients=cell[["t1", "t2"]].max(axis=1))  # as many as can be have both scans


def draw_cells(rng):
    """Every patient of the cohort, unordered: cell and findings; rank numbers the patients of a cell from 0.

    Centers differ in how common each label is, not in what a label looks like.
    """
    pool, frames = population(rng, 40_000), []
    for label, group in cells().groupby("label"):
        each = group.loc[group.index.repeat(group.patients)].reset_index(drop=True)
        drawn = stratified(rng, pool if label < 0 else pool[pool.label == label], len(each))
        frames.append(each.join(drawn.drop(columns="label")).assign(rank=each.groupby("center").cumcount()))
    return pd.concat(frames, ignore_index=True)


def protocols(high_risk, seed, shortcut):
    """Protocol of each patient, "standard" or "dedicated"; high_risk (N,) bool, shortcut q from 0 to 1.

    Off at q = 0: all are scanned by the center's standard protocol. Above, the dedicated one is drawn for
    each patient with probability (1 + q) / 2 at high risk, else (1 - q) / 2. The known truth: within every
    center, and pooled, the protocol alone has an expected AUC of (1 + q) / 2 for high risk. (A q of almost 0
    is not "off": half of the patients get the dedicated protocol, whatever their label.) ValueError for any
    other q.
    """
    if not 0 <= shortcut <= 1:  # NaN too
        raise ValueError(f"shortcut is {shortcut}: choose a number from 0 (off) to 1 (gives high risk away)")
    chance = np.where(high_risk, 1 + shortcut, 1 - shortcut) / 2 if shortcut else 0
    # No patient has number 0: a stream apart from the cohort's [seed] and the patients' [seed, number, ...].
    place = np.random.default_rng([seed, 0, 1]).random(len(high_risk))
    return np.where(place < chance, "dedicated", "standard")


def patients(seed, max_per_cell=None, shortcut=0.0):
    """Latent findings and truth of every patient, one row each, in sheet order: by center, labels mixed.

    Columns: number, patient_id, center, label_t1, label_t2 (Int64; NA: no such scan, or no label), has_t1,
    has_t2, cyst_mm, duct_mm, nodule_mm, mucin and atrophy (0-1), prob_0..prob_2 (the model's
    P(label | findings)), guideline (0-2), age, sex, protocol. max_per_cell keeps that many patients of each
    center and class, and at most one without a label of each center.

    shortcut ties protocol to label as in `protocols`, where patients without a label count as not of high
    risk. A patient has one label, whichever scans exist, so T1 and T2 share the protocol. No other column
    depends on it: where it is on, prob_0..prob_2 leave out what the protocol tells, and are no upper bound.
    ValueError for a shortcut outside 0-1.
    """
    rng = np.random.default_rng(seed)
    cohort = draw_cells(rng).sample(frac=1, random_state=rng)
    cohort = cohort.sort_values(
        "center", key=lambda c: c.map(CENTERS.index), kind="stable", ignore_index=True
    )
    cohort["number"] = np.arange(1, len(cohort) + 1)  # from 1: the seeds [s] and [s, 0] are the same to numpy
    cohort["patient_id"] = [
        name for center in CENTERS for name in names(center, sum(cohort.center == center))
    ]
    for m in MODALITIES:
        cohort[f"has_{m}"] = cohort["rank"] < cohort[m]
        cohort[f"label_{m}"] = cohort.label.where(cohort[f"has_{m}"] & (cohort.label >= 0)).astype("Int64")
    cohort["age"] = rng.normal(67, 10, len(cohort)).clip(30, 90).astype(int)
    cohort["sex"] = rng.choice(["F", "M"], len(cohort))
    cohort["protocol"] = protocols(cohort.label == 2, seed, shortcut)
    if max_per_cell is not None:
        cohort = cohort[cohort["rank"] < np.where(cohort.label < 0, 1, max_per_cell)]
    return cohort[PATIENT_COLUMNS].reset_index(drop=True)


def names(center, n):
    """n patient names in the center's own style."""
    styles = NAMES[center]
    return [styles[k * len(styles) // n].format(k + 1) for k in range(n)]


def volumes(patient, seed, modality):
    """Image and mask (nib.Nifti1Image, one grid, mask uint8 0/1) of one row of `patients`, for t1 or t2."""
    return anatomy.scan(anatomy.draw(patient, seed), patient, modality, seed)


def lesion(patient, seed, modality):
    """Where the findings of one row of `patients` (or of truth.csv) are drawn: coverage 0-1, float32.

    A nib.Nifti1Image on the grid of `volumes`. Lesion: the cyst's loculi, the mural nodule, and the main duct
    where it is dilated, 5 mm or more (`anatomy.findings`); a normal duct is none, so there may be no lesion.
    `seed` is that of the cohort. Nothing on disk is read or changed.
    """
    return anatomy.lesion(anatomy.draw(patient, seed), patient, modality, seed)


def clean_roi(image, mask):
    """image x mask, cut to the mask's tight bounding box; the affine moves with the cut."""
    inside = np.asanyarray(mask.dataobj)
    box = tuple(slice(a, b + 1) for a, b in zip(*anatomy.extent(inside), strict=True))
    return anatomy.nifti(np.asanyarray(image.dataobj) * inside, image.affine).slicer[box]


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
        image, mask = anatomy.scan(drawn, patient, m, seed)
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
    """Path of the phantom cohort, written under root whole or not at all.

    layout "second": IPMN_labels_total.xlsx and IPMN_images_masks/{t1,t2}/{images,masks}/NAME.nii.gz; "first":
    one sheet a modality and {t1,t2}_clean_ROI/NAME.nii.gz. truth.csv beside them holds `patients`;
    max_per_cell shortens the cohort as it does there, and shortcut (0 to 1, off at 0) ties the protocol to
    the label: within every center it alone then has an expected AUC of (1 + shortcut) / 2 for high risk. The
    files do not depend on jobs (processes). FileExistsError if root exists, ValueError for any other layout
    or shortcut.
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
    """{center: its folder} below target: of each of `centers` the sheet's rows and the scans, no one else's.

    `root` is a phantom in the second layout. What hospitals have that share no files. FileExistsError if a
    folder is there already.
    """
    sheet = pd.read_excel(Path(root) / "IPMN_labels_total.xlsx")
    folders = {}
    for center in centers:
        folder = folders[center] = Path(target) / center
        mine = sheet[sheet["Center"] == center]
        for m in MODALITIES:
            for kind in ("images", "masks"):
                place = f"IPMN_images_masks/{m}/{kind}"
                (folder / place).mkdir(parents=True)
                for name in mine[f"{m.upper()} name"].dropna():
                    shutil.copy(Path(root) / place / f"{name}.nii.gz", folder / place)
        mine.to_excel(folder / "IPMN_labels_total.xlsx", index=False)
    return folders
