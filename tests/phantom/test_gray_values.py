"""Gray values alone do not give the phantom's answer: on T2 a histogram stays well below the oracle."""

import pytest

from ipmn_core import data, metrics, params
from ipmn_core.metrics import truth
from ipmn_core.runs import probes


@pytest.mark.slow
def test_a_forest_on_the_histogram_stays_below_the_oracle(tmp_path):
    values = {"outputs": str(tmp_path), "size": 32, "modalities": ["t2"], "binary_folds": 4, "jobs": 2}
    p = params.validate({**values, "multiclass_models": [], "arms": ["centralized"]}, "test")
    cohort = data.load_cohort(p)
    probed = probes.fit(p, "binary", cohort)
    histogram = probed[probed["arm"] == "histogram_only"]
    oracle = truth.reference_arms(histogram, data.read_truth(p), cohort).query("arm == 'oracle'")
    auc = [metrics.by_fold(arm).query("center == 'global'")["auc"].mean() for arm in (histogram, oracle)]
    print(f"histogram {auc[0]:.4f}, oracle {auc[1]:.4f}")
    assert auc[1] - auc[0] >= 0.06  # 0.08 as measured; a forest's trees follow the last bits of the cubes
