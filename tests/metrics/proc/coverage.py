"""Print how often 95 % intervals hold the truth; `inference.bootstrap_auc` quotes it. Minutes, no test.

2,000 cohorts with the counts of the paper's T2, or at most 5 cases of a center and label, in 4 folds; scores
are normal, of one AUC everywhere. Run from the project's folder: python tests/metrics/proc/coverage.py
"""

import numpy as np
import pandas as pd
from made_up import paper_cohort
from scipy.stats import norm

from ipmn_core import data
from ipmn_core.metrics import inference, tables

AUC, COHORTS, RESAMPLES = 0.76, 2000, 500


def test_cases(most):
    """Test cases of the binary task, dealt to folds as the package does."""
    rows = []
    for cell in tables.paper(1).query("modality == 't2'").itertuples():
        counts = enumerate((cell.no_risk, cell.low_risk, cell.high_risk))
        labels = [label for label, n in counts for _ in range(min(n, most))]
        rows += [(cell.center, label) for label in labels]
    cases = pd.DataFrame(rows, columns=["center", "label"]).assign(modality="t2")
    cases["patient_id"] = [f"patient_{i}" for i in cases.index]
    cases["fold"] = data.assign_folds(paper_cohort(cases), 4, "center", "binary")
    names = [f"case_{i}" for i in range(len(cases))]
    return cases.assign(case_id=names, y_true=(cases["label"] == 2) * 1, task="binary", arm="a", epoch=1)


for most in (10**6, 5):
    cases, rng, held = test_cases(most), np.random.default_rng(0), []
    for k in range(COHORTS):
        score = rng.normal(np.sqrt(2) * norm.ppf(AUC) * cases["y_true"])
        drawn = cases.assign(prob_0=1 - norm.cdf(score), prob_1=norm.cdf(score))
        for name in ("global", "NYU", "AHN"):
            here = drawn if name == "global" else drawn[drawn["center"] == name]
            low, high = inference.bootstrap_auc(here, RESAMPLES, seed=k)
            held.append((name, low <= AUC <= high))
    coverage = pd.DataFrame(held, columns=["center", "held"]).groupby("center", sort=False).mean()
    print(f"{len(cases)} cases\n{coverage.round(3).to_string()}", flush=True)
