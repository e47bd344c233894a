import numpy as np
import pandas as pd
import pytest
import torch
from hospitals import RUN, largest_difference, profile

from ipmn_core import federated, metrics, models
from ipmn_core.flower.site import Site, evaluate, introduce, train


@pytest.fixture
def at(nodes):
    """Opens NYU's site, of 6 cases to train and 6 to test."""

    def opened(token="a_run", **changes):
        p = profile("/the/servers/own", data="/the/servers/data")
        return Site(nodes["NYU"] | changes, {"profile": p.model_dump_json(), "run": RUN, "token": token})

    return opened


@pytest.fixture
def w_global():
    return models.build("tiny", 2, seed=0).state_dict()


def states(site):
    return sorted(path.name for path in site.folder.glob("learner_*"))


@pytest.mark.parametrize("token", ["../elsewhere", "/etc", "", "..", "a\n"])
def test_a_token_that_is_a_path_is_refused(at, token):
    with pytest.raises(ValueError, match="token"):
        at(token)


def test_the_folders_are_the_sites_own_as_seen_from_where_it_was_started(at, nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = at(outputs="kept")
    assert (site.p.data, site.p.outputs) == (nodes["NYU"]["data"], str(tmp_path / "kept"))
    assert site.folder == tmp_path / "kept" / "a_run" and site.p.rounds == 2


def test_another_centers_cases_are_not_trained_on(at):
    with pytest.raises(ValueError, match="holds scans of NYU, this is NU"):
        introduce(at(site="NU"))


def test_what_leaves_is_ordered_and_fingerprinted_anew_for_each_run(at):
    assert list(at().order) == list(at().order) and introduce(at()) == introduce(at())
    others = [at(f"run_{k}") for k in range(7)]
    assert len({tuple(other.order) for other in others}) > 1  # seven of 6! orders alike: 7e-18
    assert len({introduce(other)["data"] for other in others}) == 7


def test_a_round_asked_for_again_ends_with_the_same_bits(at, w_global):
    _, one = train(at(), w_global, 1, 0, 0, False)
    (loss, two), (again, same) = (train(at(), one, 2, 0, 1, False) for _ in range(2))
    assert loss == again and largest_difference(two, same) == 0 < largest_difference(two, one)
    assert states(at()) == ["learner_1.pt", "learner_2.pt"]
    train(at(), two, 3, 0, 2, False)
    assert states(at()) == ["learner_2.pt", "learner_3.pt"]  # no round can ask for the first again
    with pytest.raises(FileNotFoundError, match=r"learner_1\.pt"):
        train(at(), w_global, 4, 0, 1, False)


def test_a_site_that_diverges_keeps_the_state_it_had(at, w_global):
    train(at(), w_global, 1, 0, 0, False)
    broken = {k: v * torch.nan if v.is_floating_point() else v for k, v in w_global.items()}
    with pytest.raises(federated.DivergedError):
        train(at(), broken, 2, 0, 1, False)
    assert states(at()) == ["learner_1.pt"]


def test_what_is_told_of_a_test_is_what_is_kept_by_case(at, w_global):
    told, hello = evaluate(at(), w_global, 1), introduce(at())
    kept = pd.read_parquet(at().folder / "predictions.parquet")
    y, prob = kept["y_true"].to_numpy(), kept[["prob_0", "prob_1"]].to_numpy()
    assert (hello["center"], hello["n_train"], hello["n_test"]) == ("NYU", 6, 6)
    assert (told["n"], told["acc"], told["auc"]) == (6, metrics.accuracy(y, prob), metrics.auc(y, prob))
    assert (np.reshape(told["prob"], (-1, 2)) == prob[at().order]).all()
    assert hello["y_true"] == y[at().order].tolist()


def test_predictions_of_a_round_tested_again_replace_the_earlier(at, w_global):
    moved = {k: v + 1 if v.is_floating_point() else v for k, v in w_global.items()}
    for round_, w in ((1, w_global), (2, w_global), (2, moved)):
        evaluate(at(), w, round_)
    kept = pd.read_parquet(at().folder / "predictions.parquet")
    assert kept.groupby("epoch").size().to_dict() == {1: 6, 2: 6}
    first, second = (kept[kept["epoch"] == k].set_index("case_id")["prob_1"] for k in (1, 2))
    assert (first != second).all()
