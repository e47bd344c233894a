"""The dial: the same arms at other points, each a separate profile; the oracle is the same everywhere."""

import numpy as np
import pandas as pd
import pytest
from small_profile import profile

from ipmn_core import params, runs
from ipmn_core.runs import dial, store


def test_points_are_profiles_and_the_profile_is_one_of_them(tmp_path):
    p = profile(tmp_path, dial_shifts=[0, 0.5, 1.0], dial_intensities=["minmax", "zscore"])
    points = dial.points(p)
    at = [(q.phantom_shift, q.intensity, q.profile) for q in points]
    assert len(set(at)) == 6 and points[2] is p and at[1] == (0, "zscore", f"{p.profile}_shift0_zscore")
    assert len({q.phantom_root for q in points}) == 3  # a scale of intensity is no other phantom
    assert len({runs.folder_of(q, runs.Run("binary", "t1", "fedavg", 0)) for q in points}) == 6
    assert dial.points(profile(tmp_path)) == []


@pytest.mark.parametrize("values", [{"dial_shifts": [1.5]}, {"dial_intensities": ["histogram"]}])
def test_a_point_that_is_none_is_refused(tmp_path, values):
    with pytest.raises(params.ParamsError, match=next(iter(values))):
        profile(tmp_path, **values)


def test_the_table_has_each_arm_and_the_oracle_at_each_point_and_fold(tmp_path, monkeypatch):
    cases = pd.DataFrame(
        {"case_id": [f"c{k}" for k in range(8)], "center": [*"AAAABBBB"], "y_true": [0, 1] * 4}
    )
    frame = cases.assign(modality="t1", task="binary", arm="fedavg", seed=0, fold=[0, 0, 1, 1] * 2)
    arm = pd.concat(
        [frame.assign(epoch=e, prob_0=1 - p, prob_1=p) for e, p in ((1, 0.5), (2, frame["y_true"]))]
    )
    oracle = frame.assign(arm="oracle", epoch=1, prob_0=0.5, prob_1=0.5)
    monkeypatch.setattr(store, "predictions", lambda q, task: arm)
    monkeypatch.setattr(dial.data, "read_truth", lambda q: None)
    monkeypatch.setattr(dial.data, "open_cohort", lambda q: None)
    monkeypatch.setattr(dial.truth, "reference_arms", lambda *_: oracle)
    table = dial.table(profile(tmp_path, dial_shifts=[0.0, 1.0]))
    assert len(table) == 2 * 2 * 2 and set(table["shift"]) == {0.0, 1.0} and set(table["fold"]) == {0, 1}
    assert table.groupby("arm")["within"].agg(list).to_dict() == {"fedavg": [1.0] * 4, "oracle": [0.5] * 4}
    assert np.isfinite(table["within"]).all()
