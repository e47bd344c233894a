"""Patients of the phantom: findings, labels drawn from a known model, names, counts per center."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from ipmn_core.names import CENTERS, MODALITIES

TOTALS = {"t1": 723, "t2": 738}  # scans of the data set, including those without a label
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
INVENTED = ("Lakeside", "St. Anne's", "Universitätsklinik Süd", "County 12")  # centers by default
AXES = ("RAS", "LPS", "LPI", "PIR", "ASL", "RAI", "IRP")  # along which centers store voxels, on request
PATIENT_COLUMNS = [
    *["number", "patient_id", "center", "label_t1", "label_t2", "has_t1", "has_t2"],
    *["cyst_mm", "duct_mm", "nodule_mm", "mucin", "atrophy"],
    *["prob_0", "prob_1", "prob_2", "guideline", "age", "sex", "protocol"],
]


def risk(findings):
    """Linear predictor of the ordinal model, one number per patient."""
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
    ibid. 2024;24:255): worrisome: duct 5-9 mm or cyst >= 30 mm; stigma: duct >= 10 mm or nodule >= 5 mm.
    """
    stigmata = (findings.duct_mm >= 10) | (findings.nodule_mm >= 5)
    worrisome = (findings.duct_mm >= 5) | (findings.cyst_mm >= 30)
    return np.where(stigmata, 2, np.where(worrisome, 1, 0))


def population(rng, n):
    """Findings of n patients, the model's probabilities, guideline class and a label drawn from the model."""
    severity, cyst, duct, nodule, mucin, atrophy = rng.standard_normal((6, n))
    cyst, duct = 0.8 * severity + 0.6 * cyst, 0.8 * severity + 0.6 * duct  # severity drives both
    cyst_mm = np.clip(15 + 14 * cyst, 0, 50)
    cyst_mm[cyst_mm < 4] = 0  # a scan does not resolve smaller ones
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
    """n shuffled rows of pool, evenly spaced in guideline class and risk, so that the AUC varies little."""
    order = np.lexsort([risk(pool), pool.guideline])
    places = ((np.arange(n) + rng.random()) / n * len(pool)).astype(int)
    return pool.iloc[order[rng.permutation(places)]].reset_index(drop=True)


def cells():
    """Scans to make: center, label (-1: none), t1, t2, patients. Labeled counts are the paper's table 1."""
    table = pd.read_csv(Path(__file__).parents[1] / "paper" / "table1.csv")
    counts = table.set_index(["center", "modality"])[["no_risk", "low_risk", "high_risk"]]
    counts.columns = [0, 1, 2]
    labeled = counts.sum(axis=1)
    for modality, scans in TOTALS.items():
        here = labeled.xs(modality, level="modality")
        shares = (scans - here.sum()) * here.to_numpy() / here.sum()  # largest remainder
        spare = shares.astype(int)
        spare[np.argsort(spare - shares, kind="stable")[: scans - here.sum() - spare.sum()]] += 1
        counts.loc[(slice(None), modality), -1] = spare
    cell = counts.astype(int).rename_axis("label", axis=1).stack().unstack("modality").reset_index()
    return cell.assign(patients=cell[["t1", "t2"]].max(axis=1))  # as many as possible have both scans


def draw_cells(rng):
    """Cell and findings of every patient, unordered; rank numbers the patients of a cell from 0.

    Centers differ in the frequency of labels, not in the findings of a label.
    """
    pool, frames = population(rng, 40_000), []
    for label, group in cells().groupby("label"):
        each = group.loc[group.index.repeat(group.patients)].reset_index(drop=True)
        drawn = stratified(rng, pool if label < 0 else pool[pool.label == label], len(each))
        frames.append(each.join(drawn.drop(columns="label")).assign(rank=each.groupby("center").cumcount()))
    return pd.concat(frames, ignore_index=True)


def protocols(high_risk, seed, shortcut):
    """Protocol of each patient, "standard" or "dedicated"; high_risk (N,) bool, shortcut q from 0 to 1.

    At q = 0 all get the standard protocol. Otherwise the dedicated one is drawn with probability (1 + q) / 2
    at high risk, else (1 - q) / 2. The protocol alone then has an expected AUC of (1 + q) / 2 per center.
    """
    if not 0 <= shortcut <= 1:  # NaN too
        raise ValueError(f"shortcut is {shortcut}: choose a number from 0 (off) to 1 (gives high risk away)")
    chance = np.where(high_risk, 1 + shortcut, 1 - shortcut) / 2 if shortcut else 0
    # No patient has number 0, so this stream differs from [seed] and the patients' [seed, number, ...].
    place = np.random.default_rng([seed, 0, 1]).random(len(high_risk))
    return np.where(place < chance, "dedicated", "standard")


def patients(seed, max_per_cell=None, shortcut=0.0):
    """Findings and truth of every patient, one row each (`PATIENT_COLUMNS`), by center with labels mixed.

    label_t1 and label_t2 are NA without such a scan or label; mucin and atrophy are 0-1; prob_0..prob_2 are
    the model's P(label | findings); guideline is 0-2. max_per_cell keeps that many patients per center and
    class, and at most one unlabeled patient per center. shortcut ties the protocol, and nothing else, to the
    label (`protocols`); prob_0..prob_2 are then not an upper bound. Raises ValueError for a shortcut outside
    0-1.
    """
    rng = np.random.default_rng(seed)
    cohort = draw_cells(rng).sample(frac=1, random_state=rng)
    by_center = {"key": lambda column: column.map(CENTERS.index), "kind": "stable", "ignore_index": True}
    cohort = cohort.sort_values("center", **by_center)
    cohort["number"] = np.arange(1, len(cohort) + 1)  # from 1: the seeds [s] and [s, 0] are the same to numpy
    cohort["patient_id"] = [
        styles[k * len(styles) // n].format(k + 1)
        for styles, n in ((NAMES[c], sum(cohort.center == c)) for c in CENTERS)
        for k in range(n)
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


def patients_of(centers, seed, max_per_cell=None, shortcut=0.0):
    """`patients` of any number of invented centers, and a column `scanner`, a center of the paper.

    Each gets the cases and the scanner of one of the paper's centers, in turn; after seven, new cases are
    drawn. Raises ValueError for names that differ only in case, or are blank or "global".
    """
    names, frames = [center.strip() for center in centers], []
    if not all(names) or len({name.casefold() for name in [*names, "global"]}) <= len(names):
        raise ValueError(f"centers {', '.join(map(repr, names))}: give each its own name, none global")
    for start in range(0, len(names), len(CENTERS)):
        called = dict(zip(CENTERS, names[start : start + len(CENTERS)], strict=False))
        cohort = patients(seed + (start << 32), max_per_cell, shortcut)
        cohort["number"] += 1000 * start  # the number is part of the seed of the images
        cohort["scanner"], cohort["center"] = cohort["center"], cohort["center"].map(called)
        frames.append(cohort.dropna(subset="center"))
    every = pd.concat(frames, ignore_index=True)
    return every.assign(patient_id=[f"case_{number:05d}" for number in every["number"]])
