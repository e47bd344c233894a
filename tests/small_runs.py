"""Small trained runs of a network that learns quickly, and scans, for the tests of `predict` and `bundle`."""

import functools
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from made_up import paper_cohort
from torch import nn

from ipmn_core import models, params, runs
from ipmn_core.data import load_cubes

PROFILE = {
    **{"profile": "t", "size": 32, "modalities": ["t2"], "multiclass_folds": 2, "binary_folds": 2},
    **{"multiclass_models": ["quick"], "binary_model": "quick", "arms": ["centralized", "local_only"]},
    **{"epochs": 2, "rounds": 2, "inner_validation": 0.3, "threads": 1, "device": "cpu"},
}
AFFINE = np.array([[-1.4, 0, 0, 90], [0, 1.2, 0, -60], [0, 0, 6.0, 30], [0, 0, 0, 1]], float)


def quick(n_classes):
    """A network of 300 weights that two epochs teach to tell cases apart: batch norm forgets its start."""
    features = nn.Conv3d(1, 8, 3, 2), nn.BatchNorm3d(8, momentum=1.0), nn.ReLU()
    return nn.Sequential(*features, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, n_classes))


def write_scan(folder, name, label=0, affine=AFFINE):
    """The files of an image, brighter with higher risk, and its mask."""
    rng = np.random.default_rng(list(name.encode()))
    image, mask = rng.gamma(2, 100, (24, 20, 8)).astype(np.float32), np.zeros((24, 20, 8), np.uint8)
    mask[5:17, 4:15, 2:7] = rng.random((12, 11, 5)) < 0.6
    mask[5:17, 4:15, 5] = 1  # the widest slice
    paths = [str(folder / f"{name}{suffix}.nii.gz") for suffix in ("", "_mask")]
    for path, data in zip(paths, (image + 300 * label * (rng.random(image.shape) < 0.5), mask), strict=True):
        nib.save(nib.Nifti1Image(data, affine), path)
    return paths


@functools.cache
def train_small(folder):
    """The runs' folder and the scans (12 of each of two centers) that they were trained and tested on."""
    rows = []
    folder.mkdir()
    for center in ("NYU", "AHN"):
        for k in range(12):
            name = f"{center}{k:02d}"
            rows.append((name, name, center, "t2", k % 3, *write_scan(folder, name, k % 3)))
    columns = ["case_id", "patient_id", "center", "modality", "label", "image", "mask"]
    scans = pd.DataFrame(rows, columns=columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        p = params.validate({"outputs": str(folder), **PROFILE}, "test")
        runs.train(
            p,
            ["binary", "multiclass"],
            paper_cohort(scans, *load_cubes(scans, p.preprocessing, folder / "cache")),
        )
    return p.folder / "runs", scans


def change_settings(folder, **settings):
    record = json.loads((folder / "run.json").read_text())
    record["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(record))
    return folder
