"""A small profile and cohort of a tiny network, which the tests of this folder share."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from made_up import paper_cohort

from ipmn_core import models, params
from ipmn_core.data import Cohort

PROFILE = {
    **{"profile": "t", "size": 32, "modalities": ["t1"], "multiclass_folds": 2, "binary_folds": 2},
    **{"multiclass_models": ["tiny"], "binary_model": "tiny", "arms": ["centralized"]},
    **{"epochs": 3, "rounds": 3, "threads": 1, "device": "cpu", "checkpoint_seconds": 0.0},
}


def profile(folder, **changes):
    return params.validate({"outputs": str(folder), **PROFILE, **changes}, "test")


def small_cohort():
    """Eight cases of three centers and two modalities; bright cubes are high risk."""
    cells = [(m, c, k) for m in ("t1", "t2") for c in ("NYU", "AHN", "EMC") for k in range(8)]
    rows = [(f"{c}{k}", f"{c}{k}", c, m, k % 3) for m, c, k in cells]
    scans = pd.DataFrame(rows, columns=["case_id", "patient_id", "center", "modality", "label"])
    cubes = np.random.default_rng(0).random((len(scans), 32, 32, 32)).astype(np.float16)
    cubes[scans["label"] == 2] += 0.1
    return paper_cohort(scans, cubes, "data-1")


@dataclass(frozen=True)
class Carried(Cohort):
    """A cohort that takes the tiny network to worker processes, and kills the one that reads `deadly`."""

    tiny: Callable | None = None
    deadly: str = ""
    home: int = 0

    def of(self, modality):
        models.MODELS.setdefault("tiny", self.tiny)
        if modality == self.deadly and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().of(modality)
