"""Predictions made for the tests."""

import numpy as np
import pandas as pd

from ipmn_core import metrics
from ipmn_core.names import CENTERS


def rows(y, prob, center="NYU", task="binary", modality="t2", arm="fedavg", fold=0, epoch=1):
    """Predictions of one epoch; `prob` (N,) of class 1 or (N, K), `center` and `fold` one or one per case."""
    prob = np.asarray(prob, dtype=float)
    prob = np.column_stack([1 - prob, prob]) if prob.ndim == 1 else prob
    frame = pd.DataFrame({"case_id": [f"case_{i}" for i in range(len(y))], "center": center, "fold": fold})
    names = {"task": task, "modality": modality, "arm": arm, "seed": 0, "epoch": epoch}
    return frame.assign(**names, y_true=np.asarray(y), **{f"prob_{k}": p for k, p in enumerate(prob.T)})


def random_run(n_classes, epochs=3, n=60, folds=1, seed=0, **names):
    """Predictions at random, of one decimal: plenty of ties."""
    rng = np.random.default_rng(seed)
    run = {"task": "binary" if n_classes == 2 else "multiclass", "fold": rng.integers(0, folds, n)} | names
    y, center = rng.integers(0, n_classes, n), rng.choice(CENTERS[:4], n)
    draws = [rng.dirichlet(np.ones(n_classes), n).round(1) for _ in range(epochs)]
    return pd.concat([rows(y, p, center, epoch=e, **run) for e, p in enumerate(draws, 1)], ignore_index=True)


def global_auc(fold):
    """AUC of one fold's test cases, scores pooled over centers."""
    return metrics.auc(*metrics.y_and_prob(fold))
