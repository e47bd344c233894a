import json
import os
import pickle
import shutil
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hospitals import SITES, Hospitals, assert_same_bits, largest_difference, serve, values_of

from ipmn_core import data, federated, metrics, models
from ipmn_core.flower import app, demo, processes, site
from ipmn_core.flower.deployment import FederationError
from ipmn_core.runs import StaleRunError


def averages(grid, names, round_):
    """Whether the weights tested in a round are Eq. (2) over those of `names`, by the cases they told."""
    n_k = {m.name: values_of(m.content)["n_train"] for m in grid.left if m.kind == "query"}
    states = [grid.weights(grid.left, "train", round_, name) for name in names]
    average = federated.weighted_average(states, [n_k[name] for name in names])
    return largest_difference(grid.weights(grid.asked, "evaluate", round_, "NYU"), average) == 0


# -- one federation: what it ends with, and what was sent


def test_a_run_is_that_of_one_process_with_numbers_for_case_ids(trained):
    assert_same_bits(trained.there, trained.here, trained.work)
    names, alone = ({path.name for path in folder.iterdir()} for folder in (trained.there, trained.here))
    assert names == alone
    ours, theirs = (json.loads((f / "run.json").read_text()) for f in (trained.there, trained.here))
    assert ours["settings"] == theirs["settings"] and ours.keys() == theirs.keys()
    ours = pd.read_parquet(trained.there / "predictions.parquet")
    assert ours["case_id"].str.fullmatch(r"(NYU|MCF|NU) fold 0 test \d+").all()


def killed(kind, name):
    """The server ends as it asks a hospital in round 2."""

    def away(*asked):
        if asked == (name, kind, 2):
            raise InterruptedError("the server")

    return away


@pytest.mark.parametrize("arm", ["fedbn", "fedavg_bn_local", "fedavg_bn_recomputed", "fedadam", "scaffold"])
def test_a_strategy_has_the_bits_of_one_process_also_after_the_server_was_killed(nodes, p, tmp_path, arm):
    """Two of three hospitals are drawn for each round, NYU and MCF for the second."""
    drawn = p(clients_per_round=2, rounds=4, arms=[arm])
    asked = ("train", "MCF") if arm in ("fedadam", "scaffold") else ("evaluate", "NU")
    with pytest.raises(InterruptedError):
        serve(Hospitals(nodes, away=killed(*asked)), drawn, arm=arm)
    grid = Hospitals(nodes)
    there = serve(grid, drawn, arm=arm)
    assert not grid.orders("train", 1) and not (there / "token").exists()
    assert_same_bits(there, demo.in_process(drawn, SITES), tmp_path / "work")
    sent = grid.weights(grid.left, "train", 3, next(iter(grid.orders("train", 3))))
    norm = {key for key in models.build("tiny", 2).state_dict() if key.startswith(("1.", "4."))}
    stays = {"fedbn": norm, "fedavg_bn_local": {key for key in norm if "running" in key or "num" in key}}
    assert norm - sent.keys() == stays.get(arm, set())
    assert any(key.startswith("control.") for key in sent) == (arm == "scaffold")
    personal = [path.parent.parent.name for path in (tmp_path / "work").glob("*/*/model.pt")]
    assert sorted(personal) == sorted(SITES if federated.strategy(arm).personal else [])


def test_no_case_patient_or_folder_occurs_in_any_answer(trained, together):
    scans = data.read(together).scans
    secret = {*scans["case_id"], *scans["patient_id"], ".nii", ".xlsx", str(together.parent)}
    secret |= {str(trained.work)}
    assert len(secret) >= 23 and len(trained.grid.left) == 3 * (1 + 2 + 2)
    for message in trained.grid.left:
        for text in secret:
            assert text.encode() not in message.bytes, (message.name, message.kind, text)


TOLD = {"query": {"center", "n_train", "n_test", "data", "y_true"}, "train": {"loss"}}
TOLD["evaluate"] = {"n", "acc", "auc", "prob"}


def test_an_answer_holds_the_named_values_the_models_tensors_and_nothing_behind_them(trained):
    model = models.build("tiny", 2, seed=0).state_dict()
    numbers = sum(value.numel() * value.element_size() for value in model.values())
    for message in trained.grid.left:
        assert set(message.content) == {"values"} | ({"weights"} if message.kind == "train" else set())
        assert set(message.content["values"]) == {"json"}
        assert set(values_of(message.content)) == TOLD[message.kind]
        if message.kind == "train":
            record = message.content["weights"]
            assert list(record) == ["weights"]
            state = app.unpack(record)
            form = lambda w: [(key, value.shape, value.dtype) for key, value in w.items()]  # noqa: E731
            assert form(state) == form(model)
            # torch's archive adds a header and an entry in the directory for each tensor, padded to 64 bytes
            assert len(record["weights"].data) < numbers + 512 * len(model) + 8192


def test_each_hospital_has_a_list_of_what_left_it(trained):
    for name in SITES:
        sent = pd.read_csv(trained.work / name / trained.grid.left[0].order["token"] / "sent.csv")
        left = [message for message in trained.grid.left if message.name == name]
        size = [len(m.content["weights"]["weights"].data) if m.kind == "train" else 0 for m in left]
        assert list(sent["what"]) == [m.kind for m in left] and list(sent["weights_bytes"]) == size
        told = ["; ".join(f"{k}={v}" for k, v in values_of(m.content).items()) for m in left]
        assert list(sent["values"]) == told


# -- a server that ends, hospitals that are away


def test_a_server_does_not_go_on_with_other_cases(nodes, p, tmp_path):
    with pytest.raises(InterruptedError):
        serve(Hospitals(nodes, away=killed("train", "NYU")), p())
    shutil.copytree(nodes["NU"]["data"], tmp_path / "relabelled")
    sheet = pd.read_excel(tmp_path / "relabelled" / "IPMN_labels_total.xlsx")
    sheet.loc[sheet.index[sheet["Risk assessment"] == 0][0], "Risk assessment"] = 1
    sheet.to_excel(tmp_path / "relabelled" / "IPMN_labels_total.xlsx", index=False)
    changed = {**nodes, "NU": {**nodes["NU"], "data": str(tmp_path / "relabelled")}}
    with pytest.raises(StaleRunError, match="data"):
        serve(Hospitals(changed), p())


@pytest.mark.parametrize("how", ["silent", "unavailable", "offline"])
def test_waiting_for_a_hospital_asks_it_again_and_changes_nothing(nodes, p, trained, tmp_path, how):
    left = [how]
    away = lambda *asked: left.pop() if asked == ("MCF", "train", 2) and left else None  # noqa: E731
    grid = Hospitals(nodes, away=away)
    there = serve(grid, p())
    asked = [m.name for m in grid.asked if m.kind == "train" and m.order["round"] == 2]
    assert sorted(asked) == ["MCF", "MCF", "NU", "NYU"]
    assert_same_bits(there, trained.here, tmp_path / "work")


@pytest.mark.parametrize(("away", "missing"), [("wait", ("NU",)), ("continue", ("MCF", "NU"))])
def test_hospitals_that_stay_away_are_named_when_the_patience_ends(nodes, p, clock, away, missing):
    """With "continue", two of three are needed."""
    silent = lambda name, kind, _: "silent" if kind == "train" and name in missing else None  # noqa: E731
    before = clock.time
    told = f"^{', '.join(missing)} did not answer .* within 100 s; .*start"
    with pytest.raises(FederationError, match=told):
        serve(Hospitals(nodes, away=silent), p(), away=away)
    assert 100 < clock.time - before < 120


def test_a_round_continues_without_a_hospital_and_says_so(nodes, p):
    """NU is silent in the second round of three, and comes back with its own state; the last waits for it."""
    times = {("NU", "train", 2): 9, ("NU", "evaluate", 2): 9, ("NU", "evaluate", 3): 3}

    def away(*asked):
        times[asked] = times.get(asked, 0) - 1
        return "silent" if times[asked] >= 0 else None

    grid = Hospitals(nodes, away=away)
    there = serve(grid, p(rounds=3), away="continue")
    left_out = pd.read_csv(there / "left_out.csv").to_numpy().tolist()
    assert left_out == [[2, "NU", "away; round not tested"]]
    assert averages(grid, ("NYU", "MCF"), 2)
    products = pd.read_csv(there / "updates.csv").set_index(["round", "client", "other"])["inner_product"]
    assert products[2].isna().sum() == 5 and products[[1, 3]].notna().all()
    history = pd.read_csv(there / "history.csv").set_index("epoch")
    assert history["test_auc"].isna().tolist() == [False, True, False] and history["loss"].notna().all()
    assert set(pd.read_parquet(there / "predictions.parquet")["epoch"]) == {1, 3}
    orders = grid.orders("train", 3)
    assert {name: order["since"] for name, order in orders.items()} == {"NYU": 2, "MCF": 2, "NU": 1}
    assert not any(order["fresh"] for order in orders.values())


# -- answers that cannot be right


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def as_record(content):
    return ArrayRecord({"weights": Array(np.frombuffer(content, np.uint8))})


def with_state(change):
    return lambda content: content.update({"weights": app.pack(change(app.unpack(content["weights"])))})


REFUSED = {
    "8.bias holds values that are NaN": with_state(lambda s: s | {"8.bias": torch.tensor([0.0, torch.nan])}),
    "its update lacks 8.bias": with_state(lambda s: {k: s[k] for k in s if k != "8.bias"}),
    "cannot be read (UnpicklingError)": lambda content: content.update({"weights": as_record(b"no weights")}),
    "cannot be read (AttributeError)": with_state(lambda s: list(s.values())),
    "cannot be read (KeyError)": lambda content: content.pop("weights"),
    "its answer cannot be read": lambda content: content.pop("values"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_update_that_cannot_be_right_is_refused_and_the_site_named(nodes, p, reason):
    spoil = lambda *asked: REFUSED[reason](asked[3]) if asked[:3] == ("MCF", "train", 1) else None  # noqa: E731
    grid = Hospitals(nodes, spoil=spoil)
    left_out = pd.read_csv(serve(grid, p()) / "left_out.csv")  # of two rounds; MCF is back in the second
    assert list(left_out["client"]) == ["MCF"] and reason in left_out["reason"].iloc[0]
    assert averages(grid, ("NYU", "NU"), 1)


def test_after_a_refused_update_a_site_begins_afresh_as_in_one_process(nodes, p, monkeypatch, tmp_path):
    honest = federated.local_update

    def local_update(model, w_global, client, data, settings, strategy, seed):
        loss = honest(model, w_global, client, data, settings, strategy, seed)
        if list(seed[-2:]) == [1, 1]:  # MCF in the first round
            model[0].weight.data[0] = float("nan")
        return loss

    monkeypatch.setattr(federated, "local_update", local_update)
    monkeypatch.setattr(federated.client, "local_update", local_update)
    there, here = serve(Hospitals(nodes), p(rounds=3)), demo.in_process(p(rounds=3), SITES)
    assert (there / "left_out.csv").exists()
    assert_same_bits(there, here, tmp_path / "work")


def test_code_in_weights_is_never_run(tmp_path):
    """As a plain pickle or in torch's archive."""
    buffer = BytesIO()
    torch.save({"8.bias": Trap(tmp_path / "ran")}, buffer)
    for content in (pickle.dumps(Trap(tmp_path / "ran")), buffer.getvalue()):
        with pytest.raises(pickle.UnpicklingError):
            app.unpack(as_record(content))
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # the trap is one


# -- faults of a hospital


@pytest.mark.parametrize("what", ["introduce", "train", "evaluate"])
def test_a_fault_names_the_hospital_and_its_text_stays_there(nodes, p, monkeypatch, capfd, what):
    """Who cannot train is left out of the round; anything else ends the run."""
    honest, text = getattr(site, what), f"nu_0001: {nodes['NU']['data']}/nu_0001.nii.gz holds no number"

    def broken(at, *order):
        if at.center == "NU":
            raise ValueError(text)
        return honest(at, *order)

    monkeypatch.setattr(site, what, broken)
    grid, told = Hospitals(nodes), "ValueError: more is in the site's log"
    if what == "train":
        left_out = pd.read_csv(serve(grid, p(rounds=1)) / "left_out.csv")
        assert left_out.to_numpy().tolist() == [[1, "NU", told]]
    else:
        with pytest.raises(FederationError, match=rf"^NU failed \(\w+\): {told}$"):
            serve(grid, p(rounds=1))
    for message in grid.left:
        assert b"nu_0001" not in message.bytes and nodes["NU"]["data"].encode() not in message.bytes
    assert text in capfd.readouterr().err  # the hospital's own log has it


def test_what_cannot_be_noted_does_not_leave(nodes, p, monkeypatch):
    def full(at, kind, values, weights=0):
        if kind == "train":
            raise OSError("no room on the disk")

    monkeypatch.setattr(site, "note_sent", full)
    grid = Hospitals(nodes)
    with pytest.raises(federated.DivergedError, match="left out of every round; NYU: OSError"):
        serve(grid, p(rounds=1))
    assert all(set(message.content) == {"values"} for message in grid.left)


def test_a_hospital_with_too_few_cases_to_train_on_is_refused_before_the_first_round(nodes, p):
    def spoil(name, kind, _, content):
        if (name, kind) == ("NU", "query"):
            content["values"]["json"] = json.dumps({**values_of(content), "n_train": 1})

    grid = Hospitals(nodes, spoil=spoil)
    with pytest.raises(ValueError, match=r"fewer than 2 training cases, binary t2 .*fold 0: NU \(1\)"):
        serve(grid, p())
    assert {message.kind for message in grid.asked} == {"query"}


@pytest.mark.parametrize("share", ["scores", "metrics"])
def test_a_hospital_without_a_test_case_in_a_fold_trains_and_has_no_score(nodes, p, monkeypatch, share):
    honest = site.Site.test.func
    others = property(lambda at: honest(at)[: 0 if at.center == "NU" else None])
    monkeypatch.setattr(site.Site, "test", others)
    grid = Hospitals(nodes | {"NU": {**nodes["NU"], "share": share}})
    there = serve(grid, p())
    assert set(grid.orders("train", 2)) == set(SITES)
    told = "predictions.parquet" if share == "scores" else "centers.csv"
    told = pd.read_parquet(there / told) if share == "scores" else pd.read_csv(there / told)
    assert set(told["center"]) == {"NYU", "MCF"}
    assert pd.read_csv(there / "history.csv")["test_acc"].notna().all()


def test_a_node_that_says_it_is_another_hospital_is_refused(nodes, p):
    with pytest.raises(FederationError, match=r"^NU: its node says it is MCF"):
        serve(Hospitals({**nodes, "NU": nodes["MCF"]}), p())


# -- tables, and metrics instead of scores


@pytest.mark.parametrize("names", [tuple(SITES), ("MCF",)])
def test_a_hospital_may_share_metrics_instead_of_scores(nodes, p, trained, names):
    """Its labels and scores stay; `centers.csv` has the metrics of one process, there is no pooled AUC."""
    grid = Hospitals(nodes | {name: {**nodes[name], "share": "metrics"} for name in names})
    there = serve(grid, p())
    for message in (message for message in grid.left if message.name in names):
        assert set(values_of(message.content)) == TOLD[message.kind] - {"y_true", "prob"}
    rows = []
    alone = pd.read_parquet(trained.here / "predictions.parquet")
    for (epoch, center), part in alone.groupby(["epoch", "center"], sort=False):
        y, prob = part["y_true"].to_numpy(), part[["prob_0", "prob_1"]].to_numpy()
        rows.append((epoch, center, len(y), metrics.accuracy(y, prob), metrics.auc(y, prob)))
    expected = pd.DataFrame(rows, columns=["round", "center", "n", "acc", "auc"])
    pd.testing.assert_frame_equal(pd.read_csv(there / "centers.csv"), expected, rtol=1e-15)  # decimal text
    history = pd.read_csv(there / "history.csv")
    pooled = [np.average(part["acc"], weights=part["n"]) for _, part in expected.groupby("round")]
    assert history["test_auc"].isna().all()
    assert history["test_acc"].tolist() == pytest.approx(pooled, rel=1e-12)
    assert not (there / "predictions.parquet").exists()
    assert "no table 3, because" in processes.table3(p())


def test_the_table_has_every_site_and_all_of_them(nodes, p):
    for fold in (0, 1):
        serve(Hospitals(nodes), p(), fold)
    assert "tables" in processes.table3(p())
    table = pd.read_csv(p().folder / "tables" / "table3.csv")
    assert set(table["center"]) == {"global", *SITES} and table["auc_mean"].notna().all()
