import contextlib
import dataclasses
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
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from test_federated import largest_difference, small_net
from test_site import profile, write_phantom

from ipmn_core import federated, metrics, models, phantom, runs
from ipmn_core.data import ScanError, assign_folds, load_cubes, read
from ipmn_core.federated import training
from ipmn_core.flower import app, deployment, site
from ipmn_core.runs import records

SITES = {"NYU": 4, "MCF": 3, "NU": 2}  # cases a class: hospitals of three sizes
FOLD_0 = {"task": "binary", "modality": "t2", "arm": "fedprox_0.1", "fold": 0}
FAILED = "failed.txt"


class ServerKilledError(Exception):
    """Stands for a server that ends in the middle of a round."""


class Hospitals(Grid):
    """Flower's grid without a network: messages travel as bytes, each hospital is a call of the client app.

    `away(name, kind, order)` says how a hospital is away when it is asked: None (it is there), "silent",
    "unavailable" (Flower answers for it) or "offline" (not listed for a while). `spoil(name, kind, order,
    content)` may change an answer. Both may raise. `asked` and `left` are what was sent: name, kind, order,
    message and its bytes.
    """

    run = None

    def __init__(self, nodes, away=None, spoil=None):
        self.nodes, self.number = nodes, {name: k for k, name in enumerate(nodes, start=101)}
        self.away, self.spoil = away or (lambda *_: None), spoil or (lambda *_: None)
        self.asked, self.left, self.replies, self.hidden = [], [], {}, {}

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *arguments, **settings):
        raise NotImplementedError

    def get_node_ids(self):
        hidden = {self.number[name] for name, polls in self.hidden.items() if polls > 0}
        self.hidden = {name: polls - 1 for name, polls in self.hidden.items()}
        return [number for number in self.number.values() if number not in hidden]

    def push_messages(self, messages):
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids):
        there = [number for number in message_ids if number in self.replies]
        return [self.replies.pop(number) for number in reversed(there)]  # they come in any order

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message):
        message.metadata.__dict__["_message_id"] = str(len(self.asked))  # the SuperLink sets it
        sent = message_to_proto(message).SerializeToString()
        message = message_from_proto(message_to_proto(message))
        name = next(n for n, number in self.number.items() if number == message.metadata.dst_node_id)
        kind, order = message.metadata.message_type, json.loads(message.content["order"]["json"])
        self.asked.append(
            types.SimpleNamespace(name=name, kind=kind, order=order, message=message, bytes=sent)
        )
        how = self.away(name, kind, order)
        if how == "offline":
            self.hidden[name] = 3
        if how == "unavailable":
            self.replies[message.metadata.message_id] = Message(Error(3, "unavailable"), reply_to=message)
        if how is None:
            self._answer(name, kind, order, message)
        return message.metadata.message_id

    def _answer(self, name, kind, order, message):
        context = Context(1, message.metadata.dst_node_id, self.nodes[name], RecordDict(), {})
        reply = app.client_app(message, context)
        self.spoil(name, kind, order, reply.content)
        sent = message_to_proto(reply).SerializeToString()
        reply = message_from_proto(message_to_proto(reply))
        self.left.append(types.SimpleNamespace(name=name, kind=kind, order=order, message=reply, bytes=sent))
        self.replies[message.metadata.message_id] = reply

    def orders(self, kind, round_):
        """{name: order}, the last that each was sent."""
        return {m.name: m.order for m in self.asked if m.kind == kind and m.order.get("round") == round_}

    def update(self, name, round_):
        """The weights a hospital sent after a round."""
        sent = [m for m in self.left if (m.name, m.kind, m.order.get("round")) == (name, "train", round_)]
        return app.unpack(sent[-1].message.content["weights"])

    def w_global(self, kind, round_):
        """The weights that were sent out to be trained or evaluated in a round."""
        sent = [m for m in self.asked if m.kind == kind and m.order.get("round") == round_]
        return app.unpack(sent[-1].message.content["weights"])


@pytest.fixture(scope="module", autouse=True)
def a_process_of_flowers():
    """As Flower prepares a server app's process; `small` is a model that trains in milliseconds."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small", lambda n_classes: small_net())
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def clock_that_does_not_wait():
    """The server's clock: sleeping is done at once."""
    now = types.SimpleNamespace(time=0.0)
    sleep = lambda seconds: setattr(now, "time", now.time + max(seconds, 0.001))  # noqa: E731
    instead = types.SimpleNamespace(monotonic=lambda: now.time, perf_counter=lambda: now.time, sleep=sleep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "time", instead)
        yield now


@pytest.fixture(autouse=True)
def clock():
    with clock_that_does_not_wait() as now:
        yield now


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder with all hospitals' cases."""
    return write_phantom(tmp_path_factory.mktemp("federation") / "together", SITES)


@pytest.fixture(scope="module")
def nodes(together):
    """Each hospital's own configuration; their work folders are shared by all tests, runs differ by token."""
    folders = phantom.split(together, together.parent / "data", SITES)
    work = together.parent / "work"
    for name in SITES:
        (work / name).mkdir(parents=True)
    return {n: {"site": n, "data": str(folders[n]), "outputs": str(work / n)} for n in SITES}


@pytest.fixture(scope="module")
def union(together):
    """The hospitals' cases in one place, with their cubes."""
    scans = read(together)
    return scans, load_cubes(scans, 32, together.parent / "cache", 1)


@pytest.fixture
def p(tmp_path):
    return lambda **changes: profile(tmp_path / "server", **changes)


def serve(grid, p, run=FOLD_0, nodes=None, **policy):
    """The folder of a run, by Flower's own call of the server app."""
    policy = {"round_seconds": 10.0, "wait_seconds": 100.0, **policy}
    order = {"profile": p.model_dump_json(), "run": run, "nodes": nodes or grid.number, "policy": policy}
    app.server_app(grid, Context(1, 0, {}, RecordDict(), {"order": json.dumps(order)}))
    return runs.folder_of(p, runs.Run(**run))


def in_process(p, union, run=FOLD_0):
    """The folder of the same run, trained in this process on all hospitals' cases."""
    scans, cubes = union
    folds = assign_folds(scans, p.binary_folds, p.fold_rule, binary=True)
    return runs.execute(p.model_copy(update={"profile": "alone"}), runs.Run(**run), scans, folds, cubes)


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def kept_at(sites_of, token):
    """What the hospitals keep on their own disks: all predictions by epoch and case."""
    paths = [f"{sites_of[name]['outputs']}/{token}/predictions.parquet" for name in sites_of]
    return pd.concat(map(pd.read_parquet, paths)).set_index(["epoch", "case_id"])


def assert_same_bits(there, here, sites_of, token):
    """Every file that both leave is equal, and predictions by case where the cases are."""
    ours, theirs = weights(there), weights(here)
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("updates.csv", "history.csv"):
        assert (there / name).read_text() == (here / name).read_text()
    alone = pd.read_parquet(here / "predictions.parquet").set_index(["epoch", "case_id"])
    pd.testing.assert_frame_equal(kept_at(sites_of, token).loc[alone.index], alone, check_exact=True)


def average_of(grid, names, round_):
    """Eq. (2) over what the named hospitals sent, by the numbers of cases that they named."""
    hellos = {m.name: json.loads(m.message.content["values"]["json"]) for m in grid.left if m.kind == "query"}
    n_k = [hellos[name]["n_train"] for name in names]
    return federated.weighted_average([grid.update(name, round_) for name in names], n_k)


def token_of(grid):
    return grid.asked[0].order["token"]


# -- one federation of the paper's kind: what it ends with, and what was sent


@pytest.fixture(scope="module")
def trained(nodes, union, tmp_path_factory):
    """A whole run at the hospitals and in one process, of a real model; with what was sent."""
    p = profile(tmp_path_factory.mktemp("server"), binary_model="shufflenetv2")
    grid = Hospitals(nodes)
    with clock_that_does_not_wait():
        there = serve(grid, p)
    here = in_process(p, union)
    return types.SimpleNamespace(p=p, grid=grid, there=there, here=here)


def test_a_federation_ends_with_the_bits_of_one_process(trained, nodes):
    assert_same_bits(trained.there, trained.here, nodes, token_of(trained.grid))


def test_the_run_is_whole_and_in_the_form_of_one_process(trained):
    names = {path.name for path in trained.there.iterdir()}
    assert names == {path.name for path in trained.here.iterdir()} | {"rounds.csv"}
    ours, theirs = (json.loads((f / "run.json").read_text()) for f in (trained.there, trained.here))
    assert ours["settings"] == theirs["settings"] and ours.keys() == theirs.keys()


def test_the_tables_are_those_of_one_process_though_cases_are_numbers(trained):
    run = runs.Run(**FOLD_0)
    read = [
        records.read_predictions(f, runs.protocol_of(trained.p, run)) for f in (trained.there, trained.here)
    ]
    ours, theirs = (metrics.by_fold(metrics.select(frame, "best_test")) for frame in read)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert read[0]["case_id"].str.fullmatch(r"(NYU|MCF|NU) test \d+").all()
    for (_, epoch), rows in read[0].groupby(["center", "epoch"]):
        alone = read[1][(read[1]["epoch"] == epoch) & (read[1]["center"] == rows["center"].iloc[0])]
        ours, theirs = (frame[["y_true", "prob_1"]].to_numpy().tolist() for frame in (rows, alone))
        assert sorted(ours) == sorted(theirs)


def test_a_round_notes_its_sites_and_the_bytes_of_its_weights(trained):
    rounds = pd.read_csv(trained.there / "rounds.csv")
    one = len(app.pack(weights(trained.there))["weights"].data)
    assert list(rounds["round"]) == [1, 2] and list(rounds["sites"]) == [3, 3]
    # out to be trained, back, out to be tested, three times each; names in a pickle differ by a few bytes
    assert rounds["weights_bytes"].to_numpy() == pytest.approx(9 * one, rel=0.01)


def test_no_case_patient_or_folder_of_a_hospital_occurs_in_any_message(trained, nodes, union):
    scans, _ = union
    ids = set(scans["case_id"]) | set(scans["patient_id"])
    folders = {nodes[name][key] for name in nodes for key in ("data", "outputs")}
    files = {str(path) for column in ("image", "mask") if column in scans for path in scans[column]}
    assert len(ids) >= 27 and len(trained.grid.left) == 3 * (1 + 2 + 2)
    for message in trained.grid.left:
        for text in ids | folders | files | {".nii", ".xlsx"}:
            assert text.encode() not in message.bytes, (message.name, message.kind, text)


def test_no_folder_of_the_server_occurs_in_an_answer(trained):
    for message in trained.grid.left:
        assert trained.p.outputs.encode() not in message.bytes


def test_an_answer_holds_the_named_values_and_no_other(trained):
    told = {"query": {"center", "n_train", "n_test", "data", "y_true"}, "train": {"n_k", "loss"}}
    told["evaluate"] = {"prob"}
    for message in trained.grid.left:
        content = message.message.content
        assert set(content) == {"values"} | ({"weights"} if message.kind == "train" else set())
        assert set(content["values"]) == {"json"}
        assert set(json.loads(content["values"]["json"])) == told[message.kind]


def test_the_tensors_that_leave_are_the_models_and_nothing_hides_behind_them(trained):
    model = models.build("shufflenetv2", 2).state_dict()
    updates = [message for message in trained.grid.left if message.kind == "train"]
    assert len(updates) == 6
    for message in updates:
        record = message.message.content["weights"]
        assert list(record) == ["weights"]
        state = app.unpack(record)
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in model.items()
        }
        numbers = sum(value.numel() * value.element_size() for value in model.values())
        # torch's archive adds a header and an entry in the directory for each tensor, padded to 64 bytes
        assert len(record["weights"].data) < numbers + 512 * len(model) + 8192


def test_labels_and_scores_of_a_hospital_leave_in_an_order_that_is_not_that_of_its_files(nodes, p):
    orders = set()
    for k in range(6):  # six of 6! orders alike have a chance of 5e-15
        node, order = nodes["NYU"], {"profile": p().model_dump_json(), "run": FOLD_0, "token": f"order_{k}"}
        orders.add(tuple(site.open_site(node, order).tested["case_id"]))
    assert len(orders) > 1


def test_each_hospital_has_a_list_of_what_left_it(trained, nodes):
    for name in SITES:
        sent = pd.read_csv(f"{nodes[name]['outputs']}/{token_of(trained.grid)}/sent.csv")
        left = [message for message in trained.grid.left if message.name == name]
        assert list(sent["what"]) == [message.kind for message in left]
        size = [len(m.message.content["weights"]["weights"].data) if m.kind == "train" else 0 for m in left]
        assert list(sent["weights_bytes"]) == size


# -- settings of a round


@pytest.mark.parametrize(
    "changes", [{"clients_per_round": 2, "rounds": 3}, {"clip_norm": 0.01}, {"fold_rule": "patient"}]
)
def test_departures_from_the_paper_are_the_same_in_both_forms(nodes, union, p, changes):
    grid = Hospitals(nodes)
    there, here = serve(grid, p(**changes)), in_process(p(**changes), union)
    assert_same_bits(there, here, nodes, token_of(grid))


def test_the_hospitals_asked_to_train_are_those_that_are_drawn(nodes, p):
    grid = Hospitals(nodes)
    there = serve(grid, p(clients_per_round=2, rounds=4))
    strategy = federated.Strategy(clients_per_round=2)
    expected = [federated.drawn(list(SITES), strategy, [0, 0, round_]) for round_ in (1, 2, 3, 4)]
    assert [list(grid.orders("train", round_)) for round_ in (1, 2, 3, 4)] == expected
    assert len({tuple(names) for names in expected}) > 1
    assert [len(grid.orders("evaluate", round_)) for round_ in (1, 2, 3, 4)] == [3] * 4
    assert list(pd.read_csv(there / "rounds.csv")["sites"]) == [2] * 4
    assert not (there / "left_out.csv").exists()  # not drawn is no fault


# -- a server that ends, hospitals that are away


def killed(at_kind, at_site):
    """The server ends as it asks a hospital in round 2."""

    def away(name, kind, order):
        if (name, kind, order.get("round")) == (at_site, at_kind, 2):
            raise ServerKilledError("out of memory")

    return away


@pytest.mark.parametrize(("kind", "name"), [("train", "NYU"), ("train", "NU"), ("evaluate", "MCF")])
def test_a_server_that_ended_in_round_2_goes_on_with_the_same_bits(nodes, union, p, kind, name):
    first, second = Hospitals(nodes, away=killed(kind, name)), Hospitals(nodes)
    with pytest.raises(ServerKilledError):
        serve(first, p())
    folder = runs.folder_of(p(), runs.Run(**FOLD_0))
    assert (folder / FAILED).read_text() == "ServerKilledError: out of memory"
    assert not (folder / "run.json").exists()
    there = serve(second, p())
    assert token_of(first) == token_of(second) and not second.orders("train", 1)
    assert not (there / FAILED).exists() and not (there / "token").exists()
    assert list(pd.read_csv(there / "rounds.csv")["round"]) == [1, 2]
    assert_same_bits(there, in_process(p(), union), nodes, token_of(second))


def test_a_server_does_not_go_on_with_other_cases(nodes, p, tmp_path):
    with pytest.raises(ServerKilledError):
        serve(Hospitals(nodes, away=killed("train", "NYU")), p())
    other = tmp_path / "relabelled"
    shutil.copytree(nodes["NU"]["data"], other)
    sheet = pd.read_excel(other / "IPMN_labels_total.xlsx")
    first = sheet.index[sheet["Risk assessment"] == 0][0]
    sheet.loc[first, "Risk assessment"] = 1
    sheet.to_excel(other / "IPMN_labels_total.xlsx", index=False)
    changed = {**nodes, "NU": {**nodes["NU"], "data": str(other)}}
    with pytest.raises(records.StaleRunError, match="data"):
        serve(Hospitals(changed), p())


def once(name, kind, round_, how, times=1):
    """`name` is away the first time, or so many `times`, that it is asked."""
    asked = []

    def away(*message):
        if message[:2] == (name, kind) and message[2].get("round") == round_ and len(asked) < times:
            asked.append(message)
            return how

    return away


@pytest.mark.parametrize("how", ["silent", "unavailable", "offline"])
def test_waiting_for_a_hospital_asks_it_again_and_changes_nothing(nodes, union, p, how):
    grid = Hospitals(nodes, away=once("MCF", "train", 2, how))
    there = serve(grid, p())
    asked = [m.name for m in grid.asked if m.kind == "train" and m.order["round"] == 2]
    assert sorted(asked) == ["MCF", "MCF", "NU", "NYU"]
    assert not (there / "left_out.csv").exists()
    assert_same_bits(there, in_process(p(), union), nodes, token_of(grid))


@pytest.mark.parametrize("how", ["silent", "unavailable", "offline"])
def test_a_hospital_that_stays_away_is_named_when_the_patience_ends(nodes, p, clock, how):
    away = lambda name, kind, order: how if (name, kind) == ("NU", "train") else None  # noqa: E731
    with pytest.raises(app.SitesAwayError, match=r"^NU did not answer \(train\) within 100 s; .*start"):
        serve(Hospitals(nodes, away=away), p())
    assert 100 < clock.time < 120
    folder = runs.folder_of(p(), runs.Run(**FOLD_0))
    assert (folder / FAILED).read_text().startswith("SitesAwayError: NU did not answer")


def test_too_few_hospitals_end_a_round_that_would_continue(nodes, p):
    away = lambda name, kind, order: "silent" if kind == "train" and name != "NYU" else None  # noqa: E731
    with pytest.raises(app.SitesAwayError, match=r"^MCF, NU did not answer"):
        serve(Hospitals(nodes, away=away), p(), away="continue", min_sites=2)


@pytest.fixture
def continued(nodes, p):
    """Three rounds, NU silent in the second."""
    away = lambda name, kind, order: "silent" if name == "NU" and order.get("round") == 2 else None  # noqa: E731
    grid = Hospitals(nodes, away=away)
    return grid, serve(grid, p(rounds=3), away="continue", min_sites=2)


def test_a_round_continues_without_a_hospital_and_says_so(continued):
    grid, there = continued
    left_out = pd.read_csv(there / "left_out.csv")
    assert left_out[["round", "client"]].to_numpy().tolist() == [[2, "NU"]]
    assert left_out["reason"].str.fullmatch("away; .*round not tested").all()
    assert list(pd.read_csv(there / "rounds.csv")["sites"]) == [3, 2, 3]
    expected = average_of(grid, ("NYU", "MCF"), 2)
    assert largest_difference(grid.w_global("evaluate", 2), expected) == 0
    products = pd.read_csv(there / "updates.csv").set_index(["round", "client", "other"])["inner_product"]
    assert products[2].isna().sum() == 5 and products[[1, 3]].notna().all()


def test_a_round_that_was_not_tested_everywhere_has_no_result(continued):
    _, there = continued
    history = pd.read_csv(there / "history.csv").set_index("epoch")
    assert history["test_auc"].isna().tolist() == [False, True, False] and history["loss"].notna().all()
    assert set(pd.read_parquet(there / "predictions.parquet")["epoch"]) == {1, 3}


def test_a_hospital_that_was_away_comes_back_with_its_own_state(continued, nodes):
    grid, _ = continued
    assert {name: order["since"] for name, order in grid.orders("train", 3).items()} == {
        "NYU": 2,
        "MCF": 2,
        "NU": 1,
    }
    assert not any(order["fresh"] for order in grid.orders("train", 3).values())
    steps = {}
    for name in SITES:
        saved = torch.load(f"{nodes[name]['outputs']}/{token_of(grid)}/learner_3.pt", weights_only=True)
        steps[name] = {float(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert steps == {"NYU": {3.0}, "MCF": {3.0}, "NU": {2.0}}  # one batch a round


def test_the_last_round_is_tested_everywhere_whatever_the_policy(nodes, p):
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


def with_state(change):
    """Spoils the update that is sent by `change(state)`."""

    def spoil(content):
        state = app.unpack(content["weights"])
        content["weights"] = app.pack(change(state) or state)

    return spoil


def with_values(change):
    def spoil(content):
        values = json.loads(content["values"]["json"])
        change(values)
        content["values"] = ConfigRecord({"json": json.dumps(values)})

    return spoil


def of_mcf(change, round_=1):
    """`change(content)` of what MCF answers to a round's training."""

    def spoil(name, kind, order, content):
        if (name, kind, order.get("round")) == ("MCF", "train", round_):
            change(content)

    return spoil


def replaced(content):
    content["weights"] = as_record(b"no weights")


def renamed(content):
    content["weights"] = ArrayRecord({"other": content["weights"]["weights"]})


def a_list(content):
    content["weights"] = app.pack([torch.zeros(2)])


REFUSED = {
    "NaN": (
        with_state(lambda s: s | {"5.bias": torch.tensor([0.0, torch.nan])}),
        "5.bias holds values that are NaN",
    ),
    "shape": (with_state(lambda s: s | {"5.bias": torch.zeros(3)}), r"5.bias has shape \(3,\), not \(2,\)"),
    "missing": (with_state(lambda s: {k: s[k] for k in s if k != "5.bias"}), "its update lacks 5.bias"),
    "unknown": (with_state(lambda s: s | {"6.bias": torch.zeros(2)}), "its update has an unknown 6.bias"),
    "type": (with_state(lambda s: s | {"5.bias": torch.zeros(2, dtype=torch.int64)}), "5.bias"),
    "complex": (with_state(lambda s: s | {"5.bias": torch.zeros(2, dtype=torch.complex64)}), "5.bias"),
    "bytes": (replaced, "its weights cannot be read"),
    "name": (renamed, "its weights"),
    "no dict": (a_list, "its weights are no state dict"),
    "none": (lambda content: content.pop("weights"), "weights"),
    "cases": (with_values(lambda v: v.update(n_k=600)), "it trained on 600 cases, not the 4 it has"),
    "no count": (with_values(lambda v: v.pop("n_k")), "cases"),
    "no loss": (with_values(lambda v: v.pop("loss")), "loss"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_update_that_cannot_be_right_is_refused_and_the_site_named(nodes, p, what):
    change, reason = REFUSED[what]
    grid = Hospitals(nodes, spoil=of_mcf(change))
    there = serve(grid, p(rounds=1))
    left_out = pd.read_csv(there / "left_out.csv")
    assert list(left_out["client"]) == ["MCF"] and left_out["reason"].str.contains(reason).all()
    honest = average_of(grid, ("NYU", "NU"), 1)
    assert largest_difference(grid.w_global("evaluate", 1), honest) == 0


def test_a_refused_update_alone_leaves_the_global_model_as_it_was(nodes, p):
    grid = Hospitals({"MCF": nodes["MCF"]}, spoil=of_mcf(REFUSED["NaN"][0]))
    serve(grid, p())
    assert largest_difference(grid.w_global("evaluate", 1), small_net().state_dict()) == 0
    assert largest_difference(grid.w_global("evaluate", 2), small_net().state_dict()) > 0
    assert grid.orders("train", 2)["MCF"]["fresh"]


def test_a_run_without_any_update_is_an_error_that_names_a_site(nodes, p):
    spoil = lambda name, kind, order, content: kind == "train" and replaced(content)  # noqa: E731
    with pytest.raises(training.DivergedError, match=r"left out of every round; NYU: .*its weights cannot"):
        serve(Hospitals(nodes, spoil=spoil), p())


def test_after_a_refused_update_a_site_begins_afresh_as_in_one_process(nodes, union, p, monkeypatch):
    honest = federated.local_update

    def local_update(model, w_global, client, data, settings, strategy, seed):
        loss = honest(model, w_global, client, data, settings, strategy, seed)
        if list(seed[-2:]) == [1, 1]:  # MCF in the first round
            model[0].weight.data[0] = float("nan")
        return loss

    monkeypatch.setattr(federated, "local_update", local_update)
    grid = Hospitals(nodes)
    there, here = serve(grid, p(rounds=3)), in_process(p(rounds=3), union)
    assert (there / "left_out.csv").read_text() == (here / "left_out.csv").read_text()
    assert_same_bits(there, here, nodes, token_of(grid))


def trapped(tmp_path):
    """Weights with code in them, as a plain pickle and in torch's archive."""
    buffer = BytesIO()
    torch.save({"5.bias": Trap(tmp_path / "ran")}, buffer)
    return [pickle.dumps(Trap(tmp_path / "ran")), buffer.getvalue()]


@pytest.mark.parametrize("form", [0, 1])
def test_code_in_an_update_is_not_run(tmp_path, form):
    content = trapped(tmp_path)[form]
    with pytest.raises(ValueError, match="its weights cannot be read"):
        app.unpack(as_record(content))
    assert not (tmp_path / "ran").exists()
    torch.load(BytesIO(content), weights_only=False) if form else pickle.loads(content)
    assert (tmp_path / "ran").exists()  # the trap is one


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_code_in_what_a_server_sends_is_not_run_at_a_site(nodes, p, tmp_path, kind):
    order = {"profile": p().model_dump_json(), "run": FOLD_0, "token": f"trap_{kind}"}
    order |= {"round": 1, "k": 0, "since": 0, "fresh": False}
    for content in trapped(tmp_path):
        records_ = {"order": ConfigRecord({"json": json.dumps(order)}), "weights": as_record(content)}
        message = Message(RecordDict(records_), dst_node_id=1, message_type=kind)
        reply = app.client_app(message, Context(1, 1, nodes["NYU"], RecordDict(), {}))
        assert "fault" in json.loads(reply.content["values"]["json"]) and set(reply.content) == {"values"}
    assert not (tmp_path / "ran").exists()


def test_packed_weights_come_back_as_they_were():
    state = small_net().state_dict()
    back = app.unpack(app.pack(state))
    assert list(back) == list(state) and all(torch.equal(back[k], state[k]) for k in state)
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in state.items()}


# -- faults of a hospital


def test_the_text_of_a_fault_stays_at_the_hospital(nodes, union, p, monkeypatch, capfd):
    case, folder = union[0].loc[union[0]["center"] == "NU", "case_id"].iloc[0], nodes["NU"]["data"]

    def broken(at):
        if at.center == "NU":
            raise ScanError(case, f"{folder}/{case}.nii.gz", "holds no number", "export it again")
        return honest(at)

    honest = site.introduce
    monkeypatch.setattr(site, "introduce", broken)
    grid = Hospitals(nodes)
    with pytest.raises(ValueError, match=r"^NU: ScanError: its text is in the site's log$"):
        serve(grid, p())
    answer = next(message for message in grid.left if message.name == "NU")
    assert case.encode() not in answer.bytes and folder.encode() not in answer.bytes
    assert f"{case}: {folder}" in capfd.readouterr().err  # the hospital's own log has it


def test_a_hospital_that_cannot_test_the_model_ends_the_run_by_name(nodes, p, monkeypatch):
    honest = site.evaluate
    fails = lambda at, w, r: honest(at, w, r) if at.center != "MCF" else 1 / 0  # noqa: E731
    monkeypatch.setattr(site, "evaluate", fails)
    with pytest.raises(ValueError, match=r"^MCF could not test the global model: ZeroDivisionError"):
        serve(Hospitals(nodes), p())


def test_a_hospital_that_cannot_train_is_left_out_by_the_kind_of_its_fault(nodes, p, monkeypatch):
    honest = site.train
    fails = lambda at, *a: honest(at, *a) if at.center != "MCF" else int(at.rows["case_id"].iloc[0])  # noqa: E731
    monkeypatch.setattr(site, "train", fails)
    left_out = pd.read_csv(serve(Hospitals(nodes), p(rounds=1)) / "left_out.csv")
    assert left_out.to_dict("records") == [
        {"round": 1, "client": "MCF", "reason": "ValueError: its text is in the site's log"}
    ]


def test_what_cannot_be_noted_does_not_leave(nodes, p, monkeypatch):
    def full(at, *note):
        raise OSError("no room on the disk")

    monkeypatch.setattr(site, "note_sent", full)
    order = {"profile": p().model_dump_json(), "run": FOLD_0, "token": "full", "round": 1, "k": 0, "since": 0}
    content = RecordDict({"order": ConfigRecord({"json": json.dumps({**order, "fresh": False})})})
    content["weights"] = app.pack(small_net().state_dict())
    message = Message(content, dst_node_id=1, message_type="train")
    reply = app.client_app(message, Context(1, 1, nodes["NYU"], RecordDict(), {}))
    assert "fault" in json.loads(reply.content["values"]["json"]) and set(reply.content) == {"values"}


def test_a_node_that_says_it_is_another_hospital_is_refused(nodes, p):
    crossed = {**nodes, "NU": nodes["MCF"]}
    with pytest.raises(ValueError, match=r"^NU: its node says it is MCF"):
        serve(Hospitals(crossed), p())


# -- metrics instead of scores


def shares(nodes, *names):
    return {n: {**nodes[n], "share": "metrics" if n in names else "scores"} for n in nodes}


@pytest.fixture(scope="module")
def metrics_only(nodes, tmp_path_factory):
    """Both folds of a federation whose hospitals share no scores."""
    p = profile(tmp_path_factory.mktemp("server"))
    grids = [Hospitals(shares(nodes, *SITES)) for _ in range(2)]
    with clock_that_does_not_wait():
        folders = [serve(grids[fold], p, run={**FOLD_0, "fold": fold}) for fold in (0, 1)]
    return types.SimpleNamespace(p=p, grids=grids, folders=folders)


def federation(p):
    return deployment.Federation(folder=p.folder, host="localhost", port=1, profile=p, sites=tuple(SITES))


def by_center(p, union, run):
    """Metrics of each round at each center, from one process."""
    alone = pd.read_parquet(in_process(p, union, run) / "predictions.parquet")
    rows = []
    for (epoch, center), part in alone.groupby(["epoch", "center"], sort=False):
        y, prob = part["y_true"].to_numpy(), part[["prob_0", "prob_1"]].to_numpy()
        rows.append((epoch, center, len(y), metrics.accuracy(y, prob), metrics.auc(y, prob)))
    return pd.DataFrame(rows, columns=["round", "center", "n", "acc", "auc"])


def test_no_label_and_no_score_leaves_hospitals_that_share_metrics(metrics_only):
    told = {"query": {"center", "n_train", "n_test", "data"}, "train": {"n_k", "loss"}}
    told["evaluate"] = {"n", "acc", "auc"}
    for message in (message for grid in metrics_only.grids for message in grid.left):
        assert set(json.loads(message.message.content["values"]["json"])) == told[message.kind]


def test_the_hospitals_metrics_are_kept_and_are_those_of_one_process(metrics_only, union):
    for fold, folder in enumerate(metrics_only.folders):
        kept = pd.read_csv(folder / "centers.csv")
        expected = by_center(metrics_only.p, union, {**FOLD_0, "fold": fold})
        pd.testing.assert_frame_equal(kept, expected, rtol=1e-15)  # through decimal text
        assert not (folder / "predictions.parquet").exists()
        history = pd.read_csv(folder / "history.csv")
        pooled = [np.average(part["acc"], weights=part["n"]) for _, part in expected.groupby("round")]
        assert history["test_auc"].isna().all() and list(history["test_acc"]) == pytest.approx(
            pooled, rel=1e-12
        )


def test_predictions_and_a_pooled_auc_are_then_not_available(metrics_only):
    run = runs.Run(**FOLD_0)
    with pytest.raises(metrics.PredictionsError, match=r"shared no scores.* not available"):
        records.read_predictions(metrics_only.folders[0], runs.protocol_of(metrics_only.p, run))


def test_the_table_is_printed_without_the_global_auc(metrics_only):
    path = deployment.tables(federation(metrics_only.p))
    table = pd.read_csv(path.with_suffix(".csv")).set_index("center")
    last = [pd.read_csv(folder / "centers.csv").query("round == 2") for folder in metrics_only.folders]
    pooled = pd.Series([np.average(fold["acc"], weights=fold["n"]) for fold in last])
    last = pd.concat(last)
    assert set(table.index) == {"global", *SITES}
    assert np.isnan(table.loc["global", "auc_mean"])
    assert table.loc["global", "acc_mean"] == pytest.approx(pooled.mean(), abs=1e-4)  # as printed
    for name in SITES:
        auc = last.loc[last["center"] == name, "auc"]
        assert table.loc[name, "auc_mean"] == pytest.approx(auc.mean(), abs=1e-4, nan_ok=True)
    line = next(line for line in path.read_text().splitlines() if "lobal" in line)
    assert "n/a" in line and f"{table.loc['global', 'acc_mean']:.4f}" in line


def test_the_table_of_scores_is_that_of_one_process(nodes, union, p):
    for fold in (0, 1):
        serve(Hospitals(nodes), p(), run={**FOLD_0, "fold": fold})
        in_process(p(), union, {**FOLD_0, "fold": fold})
    alone = p().model_copy(update={"profile": "alone"})
    assert deployment.tables(federation(p())).read_text() == deployment.tables(federation(alone)).read_text()


def test_one_hospital_without_scores_does_not_hide_the_others(nodes, union, p):
    there = serve(Hospitals(shares(nodes, "MCF")), p())
    pd.testing.assert_frame_equal(
        pd.read_csv(there / "centers.csv"), by_center(p(), union, FOLD_0), rtol=1e-15
    )


def test_the_policy_of_a_federation_is_the_servers(p):
    fields = {field.name: field.default for field in dataclasses.fields(app.Policy)}
    about = federation(p())
    assert {name: getattr(about, name) for name in fields} == fields
