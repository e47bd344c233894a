import json

import bench
import pandas as pd
import pytest
import torch

from ipmn_core import federated, models, phantom
from ipmn_core.data import read
from ipmn_core.federated import device


@pytest.fixture
def small_cohorts(tmp_path, first_root, phantom_root, monkeypatch):
    """Links to cohorts of one case per center and class in place of the bench's own, which take longer."""
    (tmp_path / "cohorts").mkdir()
    roots = {"first": first_root, "second": phantom_root}
    monkeypatch.setattr(phantom, "write", lambda root, *, layout, **_: root.symlink_to(roots[layout]))


def test_a_ratio_above_one_is_in_our_favor():
    assert bench._row("x", "volumes/s", plain=2.0, ours=6.0) == ("x", "volumes/s", 2.0, 6.0, 3.0)
    assert bench._row("x", "s", plain=6.0, ours=2.0)[-1] == 3
    assert bench._row("x", "GB", plain=1.0, ours=2.0)[-1] == 0.5


def test_a_case_that_is_not_there_is_said_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "vgg"])
    assert "no case is called 'vgg'; there are densenet121 32^3, " in capsys.readouterr().err


def test_both_sides_run_an_epoch_a_round_and_preprocessing(small_cohorts, tmp_path, monkeypatch, one_thread):
    monkeypatch.setitem(models.MODELS, "densenet121", models.MODELS["tiny"])  # so that it takes no time
    monkeypatch.setattr(federated, "prepare", lambda threads: None)
    for layout in ("first", "second"):
        phantom.write(tmp_path / "cohorts" / layout, layout=layout)
    for arm in (None, "fedprox_0.1"):
        case = bench.Case("densenet121", 32, 2, 2, arm)
        assert bench._plain(case, tmp_path / "cohorts") > 0 and bench._ours(case, tmp_path / "cohorts") > 0
    scans = read(tmp_path / "cohorts" / "second").scans.head(2)
    assert bench._plain_cubes(scans, 32) > 0 and bench._our_cubes(scans, 32, jobs=1) > 0


@pytest.mark.slow
def test_a_bench_prints_time_memory_and_rate_of_both_and_writes_them_as_json(small_cohorts, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench.main(["--only", "densenet121 32", "--repeats", "1", "--json", str(file)]) == 0
    printed, results = capsys.readouterr().out, json.loads(file.read_text())
    assert pd.DataFrame(results["rows"]).to_markdown(index=False, floatfmt=".4g") in printed
    time, memory, rate = results["rows"]
    assert (time["case"], time["unit"]) == ("densenet121 32^3", "s/sample")
    assert (memory["case"], memory["unit"]) == ("densenet121 32^3, peak memory", "GB")
    assert (rate["case"], rate["unit"]) == ("densenet121 32^3, rate", "GFLOP/s")
    assert rate["ratio"] == pytest.approx(time["ratio"], abs=1e-4)  # the same work in both times
    dtypes = {"float32", *["bfloat16"] * device.has_bfloat16(torch.device("cpu"))}
    assert set(results["gemm_gflops"]) == dtypes and min(results["gemm_gflops"].values()) > 0
