import numpy as np
import pandas as pd
import pytest
import torch
from hospitals import RUN, largest_difference, profile, tiny_net

from ipmn_core import federated, metrics
from ipmn_core.flower import site


@pytest.fixture
def node(nodes):
    return nodes["NYU"]  # 12 cases: 6 to train, 6 to test


@pytest.fixture
def order(request):
    def make(**changes):
        p = profile("/the/servers/own", data="/the/servers/data", **changes)
        name = "".join(c if c.isalnum() else "_" for c in request.node.name)
        return {"profile": p.model_dump_json(), "run": RUN, "token": name[:90]}

    return make


@pytest.fixture
def w_global():
    return tiny_net().state_dict()


def states(at):
    return sorted(path.name for path in at.folder.glob("learner_*"))


@pytest.mark.parametrize(
    "change", [{"site": None}, {"outputs": ""}, {"site": "nyu"}, {"share": "everything"}]
)
def test_a_node_configuration_that_cannot_be_right_is_refused_with_what_it_must_name(node, order, change):
    with pytest.raises(site.SiteError, match=r"must name site \(one of NYU, .*\), data, outputs and perhaps"):
        site.open_site({**node, **change}, order())


@pytest.mark.parametrize("token", ["../elsewhere", "a/b", "/etc", "", "..", ".", "a b", "a\n", "x" * 121])
def test_a_token_that_is_a_path_is_refused(node, order, token):
    with pytest.raises(site.SiteError, match="token"):
        site.open_site(node, {**order(), "token": token})


def test_the_folders_are_the_sites_own_as_seen_from_where_it_was_started(node, order, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = site.open_site({**node, "outputs": "kept"}, order())
    assert (at.p.data, at.p.outputs) == (node["data"], str(tmp_path / "kept"))
    assert at.folder == tmp_path / "kept" / at.token and at.share == "scores" and at.p.rounds == 2


def test_another_centers_cases_are_not_trained_on(node, order):
    at = site.open_site({**node, "site": "NU"}, order())
    with pytest.raises(site.SiteError, match="holds scans of NYU, this is NU"):
        site.introduce(at)


def test_a_site_introduces_itself_by_counts_and_labels(node, order):
    at = site.open_site(node, order())
    hello = site.introduce(at)
    assert (hello["center"], hello["n_train"], hello["n_test"]) == ("NYU", 6, 6)
    assert hello["y_true"] == [int(label == 2) for label in at.tested["label"]]
    assert set(at.tested["case_id"]) == set(at.test["case_id"])


def test_what_leaves_is_ordered_and_fingerprinted_anew_for_each_run(node, order):
    asked = order()
    at, again = site.open_site(node, asked), site.open_site(node, asked)
    assert list(at.tested.index) == list(again.tested.index)
    assert site.introduce(at)["data"] == site.introduce(again)["data"]
    others = [site.open_site(node, {**asked, "token": f"{asked['token']}_{k}"}) for k in range(6)]
    assert len({tuple(other.tested.index) for other in others}) > 1  # six of 6! orders alike: 5e-15
    assert len({site.introduce(other)["data"] for other in (at, *others)}) == 7


def test_a_round_asked_for_again_ends_with_the_same_bits(node, order, w_global):
    at = site.open_site(node, order())
    one = site.train(at, w_global, 1, 0, 0, False)
    two = site.train(at, one.state, 2, 0, 1, False)
    again = site.train(site.open_site(node, order()), one.state, 2, 0, 1, False)
    assert two.n_k == 6 and two.loss == again.loss
    assert largest_difference(two.state, again.state) == 0 < largest_difference(two.state, one.state)
    assert states(at) == ["learner_1.pt", "learner_2.pt"]
    site.train(at, two.state, 3, 0, 2, False)
    assert states(at) == ["learner_2.pt", "learner_3.pt"]  # no round can ask for the first again


def test_a_state_that_is_gone_is_an_error(node, order, w_global):
    at = site.open_site(node, order())
    with pytest.raises(site.SiteError, match=r"learner_3\.pt, its state after round 3, is gone"):
        site.train(at, w_global, 4, 0, 3, False)


def test_a_site_that_diverges_keeps_the_state_it_had(node, order, w_global):
    at = site.open_site(node, order())
    site.train(at, w_global, 1, 0, 0, False)
    broken = {k: v * torch.nan if v.is_floating_point() else v for k, v in w_global.items()}
    with pytest.raises(federated.DivergedError):
        site.train(at, broken, 2, 0, 1, False)
    assert states(at) == ["learner_1.pt"]


@pytest.mark.parametrize("share", ["scores", "metrics"])
def test_what_is_told_of_a_test_is_what_is_kept_by_case(node, order, w_global, share):
    at = site.open_site({**node, "share": share}, order())
    told = site.evaluate(at, w_global, 1)
    kept = pd.read_parquet(at.folder / "predictions.parquet").set_index("case_id")
    y, prob = kept["y_true"].to_numpy(), kept[["prob_0", "prob_1"]].to_numpy()
    assert (told["n"], told["acc"], told["auc"]) == (6, metrics.accuracy(y, prob), metrics.auc(y, prob))
    assert ("prob" in told) == (share == "scores") == ("y_true" in site.introduce(at))
    if share == "scores":
        by_case = kept.loc[at.tested["case_id"]]
        assert (np.reshape(told["prob"], (-1, 2)) == by_case[["prob_0", "prob_1"]].to_numpy()).all()
        assert list(by_case["y_true"]) == site.introduce(at)["y_true"]


def test_predictions_of_a_round_tested_again_replace_the_earlier(node, order, w_global):
    at = site.open_site(node, order())
    moved = {k: v + 1 if v.is_floating_point() else v for k, v in w_global.items()}
    for round_, w in ((1, w_global), (2, w_global), (2, moved)):
        site.evaluate(at, w, round_)
    kept = pd.read_parquet(at.folder / "predictions.parquet")
    assert kept.groupby("epoch").size().to_dict() == {1: 6, 2: 6}
    first, second = (kept[kept["epoch"] == k].set_index("case_id")["prob_1"] for k in (1, 2))
    assert (first != second).all()
