import numpy as np
import pandas as pd
import pytest
import torch
from test_federated import largest_difference, small_net

from ipmn_core import metrics, models, params, phantom, runs
from ipmn_core.federated import training
from ipmn_core.flower import site


def write_phantom(root, sizes, seed=0):
    """A phantom of some centers, with so many cases a class: to draw all takes as long as their tests."""
    cohort = pd.concat(
        [phantom.patients(seed, n).query(f"center == '{center}'") for center, n in sizes.items()]
    )
    phantom.write_sheets(cohort, "second", root)
    for row in cohort.itertuples(index=False):
        phantom.write_patient(row, seed, "second", root)
    return root


@pytest.fixture(scope="module", autouse=True)
def small_and_single_threaded():
    """`small` is a model that trains in milliseconds; the threads that training sets are put back."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small", lambda n_classes: small_net())
        yield
    torch.set_num_threads(before)


def profile(folder, **changes):
    small = {
        "profile": "t",
        "outputs": str(folder),
        "size": 32,
        "binary_model": "small",
        "arms": ["fedprox_0.1"],
        "modalities": ["t2"],
        "binary_folds": 2,
        "rounds": 2,
        "batch_size": 4,
        "batches_per_epoch": 1,
        "threads": 1,
        "device": "cpu",
        "precision": "float32",
    }
    return params.validate({**small, **changes}, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """NYU's own folder."""
    root = write_phantom(tmp_path_factory.mktemp("hospital") / "phantom", {"NYU": 4})
    return phantom.split(root, root.parent / "data", ["NYU"])["NYU"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """NYU's work folder: cubes are made once; runs are told apart by their token."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def node(data, work):
    return {"site": "NYU", "data": str(data), "outputs": str(work)}


@pytest.fixture
def order(request):
    def make(**changes):
        p = profile("/the/servers/own", data="/the/servers/data", **changes)
        run = {"task": "binary", "modality": "t2", "arm": "fedprox_0.1", "fold": 0}
        name = "".join(c if c.isalnum() else "_" for c in request.node.name)
        return {"profile": p.model_dump_json(), "run": run, "token": name[:100]}

    return make


@pytest.fixture
def w_global():
    return small_net().state_dict()


def steps_taken(at, round_):
    saved = torch.load(at.folder / f"learner_{round_}.pt", weights_only=True)
    return {float(state["step"]) for state in saved["optimizer"]["state"].values()}


@pytest.mark.parametrize(
    "change",
    [
        {"site": None},
        {"data": None},
        {"outputs": ""},
        {"site": "nyu"},
        {"site": "Mayo"},
        {"share": "everything"},
        {"share": ""},
    ],
)
def test_a_node_configuration_that_cannot_be_is_refused_with_what_it_must_name(node, order, change):
    with pytest.raises(site.SiteError, match=r"must name site \(one of NYU, .*\), data, outputs and perhaps"):
        site.open_site({**node, **change}, order())


@pytest.mark.parametrize("token", ["../elsewhere", "a/b", "/etc", "", "..", ".", "a b", "a\n", "x" * 121])
def test_a_token_that_is_a_path_is_refused(node, order, token):
    with pytest.raises(site.SiteError, match="token"):
        site.open_site(node, {**order(), "token": token})


def test_the_folders_are_the_sites_own_whatever_the_server_says(node, order, data, work):
    at = site.open_site(node, order())
    assert (at.p.data, at.p.outputs) == (str(data), str(work))
    assert at.folder == work / at.token
    assert at.share == "scores" and at.p.rounds == 2


def test_relative_folders_are_those_seen_from_where_the_site_was_started(node, order, data, monkeypatch):
    monkeypatch.chdir(data.parent)
    at = site.open_site({**node, "data": "NYU", "outputs": "kept"}, order())
    assert (at.p.data, at.p.outputs) == (str(data), str(data.parent / "kept"))


def test_a_setting_that_this_version_does_not_know_is_no_guess(node, order):
    asked = order()
    asked["profile"] = asked["profile"].replace('"batch_size"', '"batches"')
    with pytest.raises(ValueError, match="batches"):
        site.open_site(node, asked)


def test_another_centers_cases_are_not_trained_on(node, order):
    at = site.open_site({**node, "site": "NU"}, order())
    with pytest.raises(site.SiteError, match="holds scans of NYU, this is NU"):
        site.introduce(at)


def test_a_site_introduces_itself_by_counts_and_labels_in_an_order_of_its_own(node, order):
    at = site.open_site(node, order())
    hello = site.introduce(at)
    assert set(hello) == {"center", "n_train", "n_test", "data", "y_true"}
    assert (hello["center"], hello["n_train"], hello["n_test"]) == ("NYU", 6, 6)
    assert hello["y_true"] == [int(label == 2) for label in at.tested["label"]]
    assert set(at.tested["case_id"]) == set(at.rows.loc[at.rows["role"] == "test", "case_id"])


def test_the_order_of_the_test_cases_stays_through_a_run_and_is_another_in_the_next(node, order):
    asked = order()
    first, again = site.open_site(node, asked), site.open_site(node, asked)
    assert list(first.tested.index) == list(again.tested.index)
    orders = set()
    for k in range(6):  # 6! orders: six alike have a chance of 5e-15
        other = site.open_site(node, {**asked, "token": f"{asked['token'][:90]}_{k}"})
        orders.add(tuple(other.tested.index))
    assert len(orders) > 1


def test_the_fingerprint_of_the_data_cannot_be_compared_between_runs(node, order):
    asked = order()
    here = site.introduce(site.open_site(node, asked))["data"]
    there = site.introduce(site.open_site(node, {**asked, "token": asked["token"][:90] + "_b"}))["data"]
    assert here == site.introduce(site.open_site(node, asked))["data"] != there


def test_a_round_asked_for_again_ends_with_the_same_bits(node, order, w_global):
    at = site.open_site(node, order())
    one = site.train(at, w_global, 1, 0, 0, False)
    two = site.train(at, one.state, 2, 0, 1, False)
    again = site.train(site.open_site(node, order()), one.state, 2, 0, 1, False)
    assert two.n_k == 6 and two.loss == again.loss
    assert largest_difference(two.state, again.state) == 0 < largest_difference(two.state, one.state)
    assert sorted(path.name for path in at.folder.glob("learner_*")) == ["learner_1.pt", "learner_2.pt"]


def test_states_that_no_round_can_ask_for_are_removed(node, order, w_global):
    at = site.open_site(node, order())
    for round_ in (1, 2, 3):
        site.train(at, w_global, round_, 0, round_ - 1, False)
    assert sorted(path.name for path in at.folder.glob("learner_*")) == ["learner_2.pt", "learner_3.pt"]


def test_a_site_goes_on_from_its_own_state_unless_it_shall_begin_afresh(node, order, w_global):
    at = site.open_site(node, order(lr_step=1, lr_gamma=0.5))
    site.train(at, w_global, 1, 0, 0, False)
    kept = site.train(at, w_global, 2, 0, 1, False)
    assert steps_taken(at, 2) == {2.0}
    fresh = site.train(at, w_global, 2, 0, 1, True)
    assert steps_taken(at, 2) == {1.0}
    assert largest_difference(kept.state, fresh.state) > 0
    saved = torch.load(at.folder / "learner_2.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.5**2)  # its schedule stays


def test_a_state_that_is_gone_is_said_and_not_made_up(node, order, w_global):
    at = site.open_site(node, order())
    with pytest.raises(site.SiteError, match=r"learner_3\.pt, its state after round 3, is gone"):
        site.train(at, w_global, 4, 0, 3, False)


def test_a_site_that_diverges_keeps_the_state_it_had(node, order, w_global):
    at = site.open_site(node, order())
    site.train(at, w_global, 1, 0, 0, False)
    broken = {k: v * torch.nan if v.is_floating_point() else v for k, v in w_global.items()}
    with pytest.raises(training.DivergedError):
        site.train(at, broken, 2, 0, 1, False)
    assert [path.name for path in at.folder.glob("learner_*")] == ["learner_1.pt"]


def test_what_is_told_of_a_test_is_what_is_kept_by_case(node, order, w_global):
    at = site.open_site(node, order())
    told = site.evaluate(at, w_global, 1)
    assert set(told) == {"prob"}
    kept = pd.read_parquet(at.folder / "predictions.parquet").set_index("case_id")
    by_case = kept.loc[at.tested["case_id"], ["prob_0", "prob_1"]].to_numpy()
    assert (np.reshape(told["prob"], (-1, 2)) == by_case).all()
    assert list(kept["y_true"].loc[at.tested["case_id"]]) == site.introduce(at)["y_true"]


def test_predictions_of_a_round_tested_again_take_the_place_of_the_earlier(node, order, w_global):
    at = site.open_site(node, order())
    moved = {k: v + 1 if v.is_floating_point() else v for k, v in w_global.items()}
    for round_, w in ((1, w_global), (2, w_global), (2, moved)):
        site.evaluate(at, w, round_)
    kept = pd.read_parquet(at.folder / "predictions.parquet")
    assert kept.groupby("epoch").size().to_dict() == {1: 6, 2: 6}
    first, second = (kept[kept["epoch"] == k].set_index("case_id")["prob_1"] for k in (1, 2))
    assert (first != second).all()


def test_a_site_that_shares_metrics_tells_no_label_and_no_score(node, order, w_global):
    at = site.open_site({**node, "share": "metrics"}, order())
    assert set(site.introduce(at)) == {"center", "n_train", "n_test", "data"}
    told = site.evaluate(at, w_global, 1)
    kept = pd.read_parquet(at.folder / "predictions.parquet")
    y, prob = kept["y_true"].to_numpy(), kept[["prob_0", "prob_1"]].to_numpy()
    assert told == {"n": 6, "acc": metrics.accuracy(y, prob), "auc": metrics.auc(y, prob)}


def test_noise_is_drawn_from_a_number_that_stays_at_the_site(node, order, w_global):
    asked = order(clip_norm=0.1, noise_multiplier=1.0)
    here = site.open_site(node, asked)
    elsewhere = site.open_site(node, {**asked, "token": asked["token"][:90] + "_b"})
    one, two = (site.train(at, w_global, 1, 0, 0, False).state for at in (here, elsewhere))
    again = site.train(site.open_site(node, asked), w_global, 1, 0, 0, False).state
    assert here.secret != elsewhere.secret and len(here.secret) == 16
    assert largest_difference(one, again) == 0 < largest_difference(one, two)


def test_the_same_round_asked_for_with_other_weights_is_noised_anew(node, order, w_global):
    """Else the difference of two answers would hold no noise. A given secret: the same noise each time."""
    at = site.open_site(node, order(clip_norm=1.0, noise_multiplier=1.0))
    (at.folder / "secret").write_bytes(bytes(range(16)))
    others = {k: v + 1e-3 if v.is_floating_point() else v for k, v in w_global.items()}
    key = max(w_global, key=lambda k: w_global[k].numel())
    one, two = (site.train(at, w, 1, 0, 0, False).state[key] - w[key] for w in (w_global, others))
    error = 1 / np.sqrt(2 * one.numel())  # relative standard error of a sample's standard deviation
    assert (one - two).std().item() == pytest.approx(2**0.5, rel=4 * error)


def test_clipping_alone_needs_no_secret_and_is_that_of_one_process(node, order, w_global):
    at = site.open_site(node, order(clip_norm=1e-3))
    state = site.train(at, w_global, 1, 0, 0, False).state
    drift = sum(
        (state[k] - w_global[k]).double().square().sum() for k in w_global if w_global[k].is_floating_point()
    )
    assert drift.sqrt().item() == pytest.approx(1e-3, rel=1e-3)  # float32 sums near weights of 0.1 to 1
    assert not (at.folder / "secret").exists()


def test_a_site_keeps_a_list_of_what_left_it(node, order):
    at = site.open_site(node, order())
    site.note_sent(at, "train", {"n_k": 6, "loss": 0.5}, weights=1234)
    site.note_sent(at, "evaluate", {"n": 6})
    sent = pd.read_csv(at.folder / "sent.csv")
    assert list(sent["what"]) == ["train", "evaluate"] and list(sent["weights_bytes"]) == [1234, 0]
    assert list(sent["values"]) == ["n_k=6; loss=0.5", "n=6"]
    assert pd.to_datetime(sent["at"]).notna().all()


def test_settings_at_a_site_are_those_of_one_process(node, order):
    at = site.open_site(node, order())
    assert at.settings == runs.settings_of(profile("x"), at.run)
