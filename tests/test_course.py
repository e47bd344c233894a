"""docs/course.md: every answer that is a number, computed again."""

import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ipmn_core import federated, metrics, models
from ipmn_core.data import assign_folds
from ipmn_core.data.cohort import Cohort
from ipmn_core.metrics import audit, inference, tables
from ipmn_core.phantom.scanner import SCANNERS
from ipmn_core.views import by_hand

PAGE = (Path(__file__).parents[1] / "docs" / "course.md").read_text(encoding="utf-8")
patients = import_module("ipmn_core.phantom.patients")  # the package has a function of this name


def says(*texts):
    """Fail unless the page has each of the texts."""
    assert [text for text in texts if text not in PAGE] == []


def phantom():
    """The phantom's cohort, all cases, without images."""
    drawn = patients.patients(seed=0)
    scans = pd.concat(
        drawn.dropna(subset=f"label_{m}").assign(modality=m, label=lambda d, m=m: d[f"label_{m}"].astype(int))
        for m in ("t1", "t2")
    ).reset_index(drop=True)
    return Cohort("phantom", scans.assign(positive=scans["label"] == 2), ("no", "low", "high"), ("high",))


def loss(logits, label):
    return federated.local_objective(torch.tensor([logits]), torch.tensor([label])).item()


def test_chapter_1_counts_slices_folds_and_the_oracle():
    t2 = tables.paper(1).query("modality == 't2'").set_index("center")
    of = {center: (row.total, row.high_risk, row.no_risk) for center, row in t2.iterrows()}
    assert of["NU"] == (187, 16, 44) and of["MCF"] == (130, 63, 25)
    says("NU has 187 scans, 16 of them high risk (9 %); MCF has 130 and 63 (48 %)")
    assert round(100 * 16 / 187) == 9 and round(100 * 63 / 130) == 48
    assert [of[c][2] for c in ("NYU", "NU", "EMC", "MCF", "AHN", "IU", "MCA")] == [48, 44, 38, 25, 1, 3, 0]
    thickness = {center: s.thickness for (center, modality), s in SCANNERS.items() if modality == "t2"}
    assert {c for c, mm in thickness.items() if mm == max(thickness.values()) == 8} == {"MCF", "EMC"}
    cohort = phantom()
    in_folds = {}
    for rule in ("center", "patient"):
        per_patient = assign_folds(cohort, 5, rule).groupby(cohort.scans["patient_id"]).nunique()
        in_folds[rule] = ((per_patient == 2).sum(), len(per_patient))
    assert in_folds == {"center": (35, 667), "patient": (0, 667)}
    scans = cohort.scans[cohort.scans["modality"] == "t2"]
    for where, expected in (("AHN", 0.71), ("MCA", 0.98), ("", 0.86)):
        here = scans[scans["center"].str.startswith(where)]
        both = np.column_stack([1 - here["prob_2"], here["prob_2"]])
        assert round(metrics.auc(here["positive"].to_numpy(int), both), 2) == expected
    assert len(scans) == 655 and of["AHN"][:2] == (18, 4) and of["MCA"][:2] == (23, 16)
    says("35 of 667 patients", "On all 655 scans the oracle's AUC is 0.86", "0.71 at AHN and 0.98 at MCA")


def test_chapter_2_work_losses_and_pairs():
    (work, filters), (less, same) = (models.complexity("shufflenetv2", size=edge) for edge in (96, 48))
    assert filters == same and (round(work, 3), round(less, 3), round(work / less, 1)) == (0.571, 0.076, 7.5)
    assert [round(loss([2.0, 0.5, -1.0], k), 2) for k in range(3)] == [0.24, 1.74, 3.24]
    assert round(math.log(3), 2) == 1.10
    y, auc = np.array([0, 0, 0, 1, 1]), []
    for moved in (0.5, 0.6, 0.7):
        score = np.array([0.1, 0.4, 0.6, moved, 0.9])
        auc.append(round(float(metrics.auc(y, np.column_stack([1 - score, score]))), 2))
    assert auc == [0.83, 0.92, 1.0]
    says("from 0.571 to 0.076 G: a factor of 7.5", "losses 0.24, 1.74, 3.24", "0.83. A tie")


def test_chapter_3_the_equations_and_the_toy():
    assert [round(loss([lead, 0.0], 0), 2) for lead in (-2.0, 0.0, 2.0)] == [2.13, 0.69, 0.13]
    states = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    for n_k, shares in (([150, 16], [0.90, 0.10]), ([1, 1], [0.5, 0.5])):
        average = federated.weighted_average(states, n_k)["w"].tolist()
        assert average == pytest.approx(shares, abs=0.005)
    for heterogeneity, expected in ((1.0, [0.35, 0.99]), (0.0, [0.02, 0.04])):
        toys = by_hand.draw_centers(heterogeneity)
        drift = by_hand.drift(by_hand.paths(toys, mu=0.0, local_steps=20))
        assert drift[drift["round"] == 6]["distance"].to_numpy() == pytest.approx(expected, abs=0.006)
    one_step = [by_hand.paths(toys, mu, local_steps=1)[["w_0", "w_1"]] for mu in (0.0, 1.0)]
    assert np.allclose(*one_step, atol=1e-6)  # float32
    says("2.13, 0.69 (log 2), 0.13", "0.90 and 0.10", "A 0.35 and B 0.99", "A 0.02 and B 0.04")


def test_chapter_4_what_printed_numbers_say():
    row = audit.majority_class().query("center == 'NU' and modality == 't1'").iloc[0]
    assert (row["n"], row["high_risk"], row["beaten_by"]) == (186, 17, 0)
    assert round(row["majority"], 3) == 0.909 and round(row["fedavg"], 3) == 0.903
    assert row["fedavg"] == row[["centralized", "fedavg", "fedprox_0.1", "fedprox_0.3"]].max()
    assert audit.prevalence_auc()["auc"].round(2).tolist() == [0.72, 0.74]
    enough = [np.diff(inference.hanley_mcneil(0.80, n, n)).item() <= 0.1 for n in (150, 151)]
    assert enough == [False, True]
    ahn = audit.intervals().query("center == 'AHN' and method == 'fedavg' and modality == 't2'").iloc[0]
    assert ahn[["auc", "positives", "low", "high"]].astype(float).round(2).tolist() == [0.85, 4, 0.6, 1]
    best = [np.random.default_rng(0).normal(0.70, 0.05, (5000, n)).max(axis=1).mean() for n in (6, 100)]
    assert np.round(best, 2).tolist() == [0.76, 0.83]
    says("0.909, and no method", "has 0.903", "0.72 on T1 and 0.74 on T2", "151 of each")
    says("0.85 (FedAvg, T2) has the interval 0.60 to 1", "0.76 and 0.83")
