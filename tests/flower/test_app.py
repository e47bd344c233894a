import json
import os
import pickle
import shutil
import types
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hospitals import RUN, SITES, Hospitals, largest_difference, profile, serve, values_of

from ipmn_core import data, federated, metrics, models, runs
from ipmn_core.flower import app, cli, demo, site
from ipmn_core.runs import StaleRunError


class ServerKilledError(Exception):
    """Stands for a server that ends in the middle of a round."""


def kept_at(nodes, token):
    """The predictions that the hospitals keep on their own disks, by epoch and case."""
    frames = [pd.read_parquet(f"{node['outputs']}/{token}/predictions.parquet") for node in nodes.values()]
    return pd.concat(frames).set_index(["epoch", "case_id"])


def assert_same_bits(there, here, nodes, token):
    """Every file that both leave is equal, and so are predictions by case where the cases are."""
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (there, here))
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("updates.csv", "history.csv"):
        assert (there / name).read_text() == (here / name).read_text()
    alone = pd.read_parquet(here / "predictions.parquet").set_index(["epoch", "case_id"])
    pd.testing.assert_frame_equal(kept_at(nodes, token).loc[alone.index], alone, check_exact=True)


def average_of(grid, names, round_):
    """Eq. (2) over what the named hospitals sent, by the numbers of cases that they told."""
    n_k = {m.name: values_of(m.content)["n_train"] for m in grid.left if m.kind == "query"}
    states = [grid.weights(grid.left, "train", round_, name) for name in names]
    return federated.weighted_average(states, [n_k[name] for name in names])


# -- one federation: what it ends with, and what was sent


@pytest.fixture(scope="module")
def trained(nodes, together):
    """A whole run at the hospitals and in one process, with what was sent."""
    p = profile(together.parent / "server", profile="trained", data=str(together))
    grid = Hospitals(nodes)
    return types.SimpleNamespace(p=p, grid=grid, there=serve(grid, p), here=demo.in_process(p, SITES))


def test_a_federation_ends_with_the_bits_of_one_process(trained, nodes):
    assert_same_bits(trained.there, trained.here, nodes, trained.grid.token)


def test_the_hospitals_asked_to_train_are_those_that_are_drawn(nodes, p):
    grid, drawn = Hospitals(nodes), p(clients_per_round=2, rounds=4)
    there = serve(grid, drawn)
    strategy = federated.Strategy(clients_per_round=2)
    expected = [federated.drawn(list(SITES), strategy, [0, 0, round_]) for round_ in (1, 2, 3, 4)]
    assert [list(grid.orders("train", round_)) for round_ in (1, 2, 3, 4)] == expected
    assert len({tuple(names) for names in expected}) > 1
    assert [len(grid.orders("evaluate", round_)) for round_ in (1, 2, 3, 4)] == [3] * 4
    assert not (there / "left_out.csv").exists()  # not drawn is no fault
    assert_same_bits(there, demo.in_process(drawn, SITES), nodes, grid.token)


def test_a_run_has_the_form_and_the_table_of_one_process(trained):
    names, alone = ({path.name for path in folder.iterdir()} for folder in (trained.there, trained.here))
    assert names == alone
    ours, theirs = (json.loads((f / "run.json").read_text()) for f in (trained.there, trained.here))
    assert ours["settings"] == theirs["settings"] and ours.keys() == theirs.keys()
    frames = [pd.read_parquet(f / "predictions.parquet") for f in (trained.there, trained.here)]
    ours, theirs = (metrics.by_fold(metrics.select(frame, "best_test")) for frame in frames)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert frames[0]["case_id"].str.fullmatch(r"(NYU|MCF|NU) fold 0 test \d+").all()


def test_no_case_patient_or_folder_occurs_in_any_answer(trained, nodes, together):
    scans = data.read(together)
    secret = {*scans["case_id"], *scans["patient_id"], ".nii", ".xlsx", trained.p.outputs}
    secret |= {nodes[name][key] for name in nodes for key in ("data", "outputs")}
    assert len(secret) >= 27 and len(trained.grid.left) == 3 * (1 + 2 + 2)
    for message in trained.grid.left:
        for text in secret:
            assert text.encode() not in message.bytes, (message.name, message.kind, text)


TOLD = {"query": {"center", "n_train", "n_test", "data", "y_true"}, "train": {"n_k", "loss"}}
TOLD["evaluate"] = {"n", "acc", "auc", "prob"}


def test_an_answer_holds_the_named_values_and_no_other(trained):
    for message in trained.grid.left:
        assert set(message.content) == {"values"} | ({"weights"} if message.kind == "train" else set())
        assert set(message.content["values"]) == {"json"}
        assert set(values_of(message.content)) == TOLD[message.kind]


def test_the_tensors_that_leave_are_the_models_and_nothing_is_hidden_behind_them(trained):
    model = models.build("tiny", 2, seed=0).state_dict()
    numbers = sum(value.numel() * value.element_size() for value in model.values())
    for message in (message for message in trained.grid.left if message.kind == "train"):
        record = message.content["weights"]
        state = app.unpack(record)
        assert list(record) == ["weights"] and list(state) == list(model)
        assert all((state[k].shape, state[k].dtype) == (model[k].shape, model[k].dtype) for k in model)
        # torch's archive adds a header and an entry in the directory for each tensor, padded to 64 bytes
        assert len(record["weights"].data) < numbers + 512 * len(model) + 8192


def test_each_hospital_has_a_list_of_what_left_it(trained, nodes):
    for name in SITES:
        sent = pd.read_csv(f"{nodes[name]['outputs']}/{trained.grid.token}/sent.csv")
        left = [message for message in trained.grid.left if message.name == name]
        size = [len(m.content["weights"]["weights"].data) if m.kind == "train" else 0 for m in left]
        assert list(sent["what"]) == [m.kind for m in left] and list(sent["weights_bytes"]) == size
        told = ["; ".join(f"{k}={v}" for k, v in values_of(m.content).items()) for m in left]
        assert list(sent["values"]) == told


# -- a server that ends, hospitals that are away


def once(name, kind, round_, how, times=1):
    """`name` is away the first `times` that it is asked."""
    left = [how] * times
    return lambda *asked: left.pop() if asked == (name, kind, round_) and left else None


def killed(kind, name):
    """The server ends as it asks a hospital in round 2."""

    def away(*asked):
        if asked == (name, kind, 2):
            raise ServerKilledError("out of memory")

    return away


@pytest.mark.parametrize(("kind", "name"), [("train", "NU"), ("evaluate", "MCF")])
def test_a_server_that_ended_in_round_2_goes_on_with_the_same_bits(nodes, p, trained, kind, name):
    first, second = Hospitals(nodes, away=killed(kind, name)), Hospitals(nodes)
    with pytest.raises(ServerKilledError):
        serve(first, p())
    folder = runs.folder_of(p(), runs.Run(**RUN))
    assert not (folder / "run.json").exists()
    there = serve(second, p())
    assert first.token == second.token and not second.orders("train", 1)
    assert not (there / "token").exists()
    assert_same_bits(there, trained.here, nodes, second.token)


def test_a_server_does_not_go_on_with_other_cases(nodes, p, tmp_path):
    with pytest.raises(ServerKilledError):
        serve(Hospitals(nodes, away=killed("train", "NYU")), p())
    shutil.copytree(nodes["NU"]["data"], tmp_path / "relabelled")
    sheet = pd.read_excel(tmp_path / "relabelled" / "IPMN_labels_total.xlsx")
    sheet.loc[sheet.index[sheet["Risk assessment"] == 0][0], "Risk assessment"] = 1
    sheet.to_excel(tmp_path / "relabelled" / "IPMN_labels_total.xlsx", index=False)
    changed = {**nodes, "NU": {**nodes["NU"], "data": str(tmp_path / "relabelled")}}
    with pytest.raises(StaleRunError, match="data"):
        serve(Hospitals(changed), p())


@pytest.mark.parametrize("how", ["silent", "unavailable", "offline"])
def test_waiting_for_a_hospital_asks_it_again_and_changes_nothing(nodes, p, trained, how):
    grid = Hospitals(nodes, away=once("MCF", "train", 2, how))
    there = serve(grid, p())
    asked = [m.name for m in grid.asked if m.kind == "train" and m.order["round"] == 2]
    assert sorted(asked) == ["MCF", "MCF", "NU", "NYU"]
    assert not (there / "left_out.csv").exists()
    assert_same_bits(there, trained.here, nodes, grid.token)


def test_a_hospital_that_stays_away_is_named_when_the_patience_ends(nodes, p, clock):
    away = lambda name, kind, round_: "silent" if (name, kind) == ("NU", "train") else None  # noqa: E731
    before = clock.time
    with pytest.raises(app.SitesAwayError, match=r"^NU did not answer \(train\) within 100 s; .*start"):
        serve(Hospitals(nodes, away=away), p())
    assert 100 < clock.time - before < 120


def test_too_few_hospitals_end_a_round_that_would_continue(nodes, p):
    away = lambda name, kind, round_: "silent" if kind == "train" and name != "NYU" else None  # noqa: E731
    with pytest.raises(app.SitesAwayError, match=r"^MCF, NU did not answer"):
        serve(Hospitals(nodes, away=away), p(), away="continue", min_sites=2)


def test_a_round_continues_without_a_hospital_and_says_so(nodes, p):
    """Three rounds, NU silent in the second: it comes back with its own state."""
    away = lambda name, kind, round_: "silent" if (name, round_) == ("NU", 2) else None  # noqa: E731
    grid = Hospitals(nodes, away=away)
    there = serve(grid, p(rounds=3), away="continue", min_sites=2)
    left_out = pd.read_csv(there / "left_out.csv")
    assert left_out[["round", "client"]].to_numpy().tolist() == [[2, "NU"]]
    assert left_out["reason"].str.fullmatch("away; .*round not tested").all()
    expected = average_of(grid, ("NYU", "MCF"), 2)
    assert largest_difference(grid.weights(grid.asked, "evaluate", 2), expected) == 0
    products = pd.read_csv(there / "updates.csv").set_index(["round", "client", "other"])["inner_product"]
    assert products[2].isna().sum() == 5 and products[[1, 3]].notna().all()
    history = pd.read_csv(there / "history.csv").set_index("epoch")
    assert history["test_auc"].isna().tolist() == [False, True, False] and history["loss"].notna().all()
    assert set(pd.read_parquet(there / "predictions.parquet")["epoch"]) == {1, 3}
    orders = grid.orders("train", 3)
    assert {name: order["since"] for name, order in orders.items()} == {"NYU": 2, "MCF": 2, "NU": 1}
    assert not any(order["fresh"] for order in orders.values())


def test_the_last_round_is_tested_everywhere_under_either_policy(nodes, p):
    grid = Hospitals(nodes, away=once("NU", "evaluate", 2, "silent", times=3))
    there = serve(grid, p(), away="continue", min_sites=1)
    assert set(pd.read_parquet(there / "predictions.parquet")["epoch"]) == {1, 2}
    assert not (there / "left_out.csv").exists()


# -- answers that cannot be right


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def as_record(content):
    return ArrayRecord({"weights": Array(np.frombuffer(content, np.uint8))})


def of_mcf(change):
    """`change(content)` of what MCF answers to the first round's training."""
    return lambda *asked: change(asked[3]) if asked[:3] == ("MCF", "train", 1) else None


def with_state(change):
    return lambda content: content.update({"weights": app.pack(change(app.unpack(content["weights"])))})


def with_values(**changes):
    def spoil(content):
        content["values"] = ConfigRecord({"json": json.dumps({**values_of(content), **changes})})

    return spoil


REFUSED = {
    "8.bias holds values that are NaN": with_state(lambda s: s | {"8.bias": torch.tensor([0.0, torch.nan])}),
    "its update lacks 8.bias": with_state(lambda s: {k: s[k] for k in s if k != "8.bias"}),
    "its weights cannot be read": lambda content: content.update({"weights": as_record(b"no weights")}),
    "its weights are no state dict": with_state(lambda s: list(s.values())),
    "'weights'": lambda content: content.pop("weights"),
    "it trained on 600 cases, not the 4 it has": with_values(n_k=600),
    "its update cannot be read": with_values(loss=None),
    "its answer cannot be read": lambda content: content.pop("values"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_update_that_cannot_be_right_is_refused_and_the_site_named(nodes, p, reason):
    grid = Hospitals(nodes, spoil=of_mcf(REFUSED[reason]))
    left_out = pd.read_csv(serve(grid, p(rounds=1)) / "left_out.csv")
    assert list(left_out["client"]) == ["MCF"] and reason in left_out["reason"].iloc[0]
    honest = average_of(grid, ("NYU", "NU"), 1)
    assert largest_difference(grid.weights(grid.asked, "evaluate", 1), honest) == 0


def test_a_run_without_any_update_is_an_error_that_names_a_site(nodes, p):
    spoil = lambda name, kind, round_, content: kind == "train" and content.pop("weights")  # noqa: E731
    with pytest.raises(federated.DivergedError, match=r"left out of every round; NYU: "):
        serve(Hospitals(nodes, spoil=spoil), p())


def test_after_a_refused_update_a_site_begins_afresh_as_in_one_process(nodes, p, monkeypatch):
    honest = federated.local_update

    def local_update(model, w_global, client, data, settings, strategy, seed):
        loss = honest(model, w_global, client, data, settings, strategy, seed)
        if list(seed[-2:]) == [1, 1]:  # MCF in the first round
            model[0].weight.data[0] = float("nan")
        return loss

    monkeypatch.setattr(federated, "local_update", local_update)
    monkeypatch.setattr(federated.client, "local_update", local_update)
    grid = Hospitals(nodes)
    there, here = serve(grid, p(rounds=3)), demo.in_process(p(rounds=3), SITES)
    assert (there / "left_out.csv").read_text() == (here / "left_out.csv").read_text()
    assert_same_bits(there, here, nodes, grid.token)


def test_code_in_weights_is_never_run(nodes, p, tmp_path):
    """Neither at the server nor at a site, as a plain pickle or in torch's archive."""
    buffer = BytesIO()
    torch.save({"8.bias": Trap(tmp_path / "ran")}, buffer)
    for content in (pickle.dumps(Trap(tmp_path / "ran")), buffer.getvalue()):
        with pytest.raises(ValueError, match="its weights cannot be read"):
            app.unpack(as_record(content))
        for kind in ("train", "evaluate"):
            reply = ask(nodes["NYU"], p(), kind, as_record(content))
            assert "fault" in values_of(reply.content) and set(reply.content) == {"values"}
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # the trap is one


# -- faults of a hospital


def ask(node, p, kind, weights):
    """A site's reply to a message of a server."""
    order = {"profile": p.model_dump_json(), "run": RUN, "token": "asked", "round": 1, "k": 0}
    order |= {"since": 0, "fresh": False}
    content = RecordDict({"order": ConfigRecord({"json": json.dumps(order)}), "weights": weights})
    message = Message(content, dst_node_id=1, message_type=kind)
    return app.client_app(message, Context(1, 1, node, RecordDict(), {}))


def test_the_text_of_a_fault_stays_at_the_hospital(nodes, p, monkeypatch, capfd):
    honest, text = site.introduce, f"nu_0001: {nodes['NU']['data']}/nu_0001.nii.gz holds no number"

    def broken(at):
        if at.center == "NU":
            raise site.SiteError(text)
        return honest(at)

    monkeypatch.setattr(site, "introduce", broken)
    grid = Hospitals(nodes)
    with pytest.raises(ValueError, match=r"^NU: SiteError: its text is in the site's log$"):
        serve(grid, p())
    answer = next(message for message in grid.left if message.name == "NU")
    assert b"nu_0001" not in answer.bytes and nodes["NU"]["data"].encode() not in answer.bytes
    assert text in capfd.readouterr().err  # the hospital's own log has it


def fails_at_mcf(monkeypatch, what):
    honest = getattr(site, what)
    monkeypatch.setattr(site, what, lambda at, *a: honest(at, *a) if at.center != "MCF" else 1 / 0)


def test_a_hospital_that_cannot_test_the_model_ends_the_run_by_name(nodes, p, monkeypatch):
    fails_at_mcf(monkeypatch, "evaluate")
    with pytest.raises(ValueError, match=r"^MCF could not test the global model: ZeroDivisionError"):
        serve(Hospitals(nodes), p())


def test_a_hospital_that_cannot_train_is_left_out_by_the_kind_of_its_fault(nodes, p, monkeypatch):
    fails_at_mcf(monkeypatch, "train")
    left_out = pd.read_csv(serve(Hospitals(nodes), p(rounds=1)) / "left_out.csv").to_dict("records")
    reason = "ZeroDivisionError: its text is in the site's log"
    assert left_out == [{"round": 1, "client": "MCF", "reason": reason}]


def test_what_cannot_be_noted_does_not_leave(nodes, p, monkeypatch):
    def full(at, *note):
        raise OSError("no room on the disk")

    monkeypatch.setattr(site, "note_sent", full)
    reply = ask(nodes["NYU"], p(), "train", app.pack(models.build("tiny", 2, seed=0).state_dict()))
    assert "OSError" in values_of(reply.content)["fault"] and set(reply.content) == {"values"}


def test_a_node_that_says_it_is_another_hospital_is_refused(nodes, p):
    with pytest.raises(ValueError, match=r"^NU: its node says it is MCF"):
        serve(Hospitals({**nodes, "NU": nodes["MCF"]}), p())


# -- metrics instead of scores


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
    assert history["test_auc"].isna().all() and history["test_acc"].tolist() == pytest.approx(
        pooled, rel=1e-12
    )
    assert not (there / "predictions.parquet").exists()
    assert "there is no table 3" in cli.table3(p())


def test_the_table_has_every_site_and_all_of_them(nodes, p):
    for fold in (0, 1):
        serve(Hospitals(nodes), p(), fold)
    assert "tables" in cli.table3(p())
    table = pd.read_csv(p().folder / "tables" / "table3.csv")
    assert set(table["center"]) == {"global", *SITES} and table["auc_mean"].notna().all()
