"""Small trained runs of a network that learns quickly, and scans, for the tests of `predict` and `bundle`."""

import functools
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from torch import nn

from ipmn_core import data, models, params, runs
from ipmn_core.names import LABELS, TASKS

PROFILE = {
    **{"profile": "t", "size": 32, "modalities": ["t2"], "multiclass_folds": 2, "binary_folds": 2},
    **{"multiclass_models": ["quick"], "binary_model": "quick", "arms": ["centralized", "local_only"]},
    **{"epochs": 2, "rounds": 2, "inner_validation": 0.3, "threads": 1, "device": "cpu"},
    **{"classes": dict(zip("012", LABELS, strict=True))},
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
    image = image + 300 * label * (rng.random(image.shape) < 0.5)
    for path, voxels in zip(paths, (image, mask), strict=True):
        nib.save(nib.Nifti1Image(voxels, affine), path)
    return paths


@functools.cache
def trained_profile(folder):
    """A profile whose runs of both tasks are trained, on 12 scans of each of two centers."""
    folder.mkdir()
    names = [(center, k, f"{center}{k:02d}") for center in ("NYU", "AHN") for k in range(12)]
    rows = [(*write_scan(folder, name, k % 3), k % 3, center, "t2") for center, k, name in names]
    table = pd.DataFrame(rows, columns=["image", "mask", "label", "center", "modality"])
    table.to_csv(folder / "scans.csv", index=False)
    p = params.validate({**PROFILE, "outputs": str(folder), "data": str(folder / "scans.csv")}, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        runs.train(p, TASKS, data.load_cohort(p))
    return p


def train_small(folder):
    """The runs' folder and the scans of `trained_profile`."""
    p = trained_profile(folder)
    return p.folder / "runs", data.open_cohort(p).scans


def change_settings(folder, **settings):
    record = json.loads((folder / "run.json").read_text())
    record["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(record))
    return folder
