import contextlib
import io
import json

import bench
import pandas as pd
import pytest
import torch

from ipmn_core import cli, phantom
from ipmn_core.federated import machine


@pytest.fixture(scope="module", autouse=True)
def small_cohorts(tmp_path_factory, phantom_root):
    """Links to cohorts of one case a center and class in place of the bench's own two, which take longer."""
    first = phantom.write(
        tmp_path_factory.mktemp("bench") / "first", layout="first", max_per_cell=1, progress=False
    )
    roots = {"first": first, "second": phantom_root}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "write", lambda root, *, layout, **_: root.symlink_to(roots[layout]))
        yield


@pytest.fixture(scope="module")
def benched(tmp_path_factory, small_cohorts):
    """What the command prints of one small case, and the JSON that it writes."""
    file, printed = tmp_path_factory.mktemp("bench") / "bench.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["--only", "densenet121 32", "--repeats", "1", "--json", str(file)]
        assert cli.main(["bench", *arguments]) == 0
    return printed.getvalue(), json.loads(file.read_text())


def test_a_case_has_rows_of_time_memory_and_rate_for_both_sides(benched):
    rows = benched[1]["rows"]
    assert [(row["case"], row["unit"]) for row in rows] == [
        ("densenet121 32^3", "s/sample"),
        ("densenet121 32^3, peak memory", "GB"),
        ("densenet121 32^3, rate", "GFLOP/s"),
    ]
    assert all(list(row) == ["case", "unit", "plain", "ours", "ratio"] for row in rows)


def test_a_ratio_above_one_is_in_our_favour(benched):
    time, memory, rate = benched[1]["rows"]
    for row in (time, memory):
        assert row["ratio"] == pytest.approx(row["plain"] / row["ours"], rel=0.01)  # 4 decimals are kept
    assert rate["ratio"] == pytest.approx(rate["ours"] / rate["plain"], rel=0.01)
    assert rate["ratio"] == pytest.approx(time["ratio"], abs=1e-4)  # the same work in both times
    assert bench._row("x", "volumes/s", plain=2.0, ours=6.0)[-1] == 3
    assert bench._row("x", "s", plain=6.0, ours=2.0)[-1] == 3


def test_matrix_products_are_timed_in_every_type_that_the_machine_has(benched):
    has_bfloat16 = machine.has_bfloat16(torch.device("cpu"))
    assert set(benched[1]["gemm_gflops"]) == {"float32", *["bfloat16"] * has_bfloat16}
    assert min(benched[1]["gemm_gflops"].values()) > 0


def test_the_json_is_what_was_printed(benched):
    printed, results = benched
    assert pd.DataFrame(results["rows"]).to_markdown(index=False, floatfmt=".4g") in printed
    for dtype, rate in results["gemm_gflops"].items():
        assert f"{rate:.0f} GFLOP/s {dtype}" in printed.splitlines()[0]


def test_an_unknown_case_is_one_sentence_that_names_all_there_are(capsys):
    assert cli.main(["bench", "--only", "vgg"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("ipmn: no case is called 'vgg'; there are densenet121 32^3, ") and "\n" not in said
    assert all(name in said for name in [*(case.name for case in bench.CASES), "preprocessing"])


def test_cases_are_both_networks_at_both_sizes_and_both_kinds_of_round():
    names = {case.name for case in bench.CASES}
    assert len(names) == len(bench.CASES)
    assert {f"{model} {size}^3" for model in ("densenet121", "resnet34") for size in (32, 96)} <= names
    assert {"fedavg 32^3", "fedprox_0.1 32^3", "fedprox_0.1 96^3"} <= names


def test_a_side_that_fails_is_named_with_its_case_and_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(phantom, "write", lambda *_, **__: None)  # so that there is no cohort to read
    monkeypatch.setattr(bench, "_dtypes", list)
    assert cli.main(["bench", "--only", "densenet121 32", "--repeats", "1"]) == 1
    said = capsys.readouterr().err
    assert "ipmn: _plain(Case(model='densenet121', size=32" in said
    assert "CohortError" in said and "IPMN_labels" in said


def test_what_is_measured_apart_fails_by_name():
    with pytest.raises(RuntimeError, match=r"^fail\(3,\): ValueError: no such number as 3$"):
        bench.apart(fail, 3)


def fail(number):
    raise ValueError(f"no such number as {number}")


def test_preprocessing_alone_is_a_rate_of_volumes(monkeypatch):
    monkeypatch.setattr(bench, "_dtypes", list)
    (row,) = bench.run("preprocessing", repeats=1)["rows"]
    assert (row["case"], row["unit"]) == ("preprocessing", "volumes/s")
    assert row["ratio"] == pytest.approx(row["ours"] / row["plain"], rel=0.01)  # 4 decimals are kept
