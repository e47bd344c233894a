"""Hospitals without a network or processes: Flower's grid in memory."""

import json
import types

import numpy as np
import pandas as pd
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from ipmn_core import params, phantom, runs
from ipmn_core.flower import app, demo, deployment

SITES = {"NYU": 4, "MCF": 3, "NU": 2}  # cases per class: hospitals of three sizes
HOST = "fl.example.org"
RUN = {"task": "binary", "modality": "t2", "arm": "fedprox_0.1", "fold": 0}


def largest_difference(a, b):
    return max((a[key].double() - b[key].double()).abs().max().item() for key in b)


def assert_same_bits(there, here, work):
    """Every file that both leave is equal, and so are predictions by case, which the hospitals keep."""
    weights = 0.0 if (there / "model.pt").exists() else float("nan")  # a personal model stays at its site
    np.testing.assert_equal(demo.compare(there, here, work), (weights, 0.0))
    for name in ("updates.csv", "history.csv", "left_out.csv"):
        ours, alone = (path.read_text() if path.exists() else "" for path in (there / name, here / name))
        assert ours == alone


def profile(folder, **changes):
    """A profile whose results are below `folder`: two rounds of one batch, FedProx, two folds."""
    values = {"profile": "t", "outputs": str(folder), "size": 32, "modalities": ["t2"], "arms": [RUN["arm"]]}
    values |= {"binary_model": "tiny", "binary_folds": 2, "rounds": 2}
    values |= {"batch_size": 4, "batches_per_epoch": 1, "threads": 1, "device": "cpu", "precision": "float32"}
    return params.validate({**values, **changes}, "test")


def write_phantom(root, sizes):
    """A phantom of some centers, with so many cases per class."""
    cohorts = [phantom.patients(0, n).query(f"center == '{name}'") for name, n in sizes.items()]
    cohort = pd.concat(cohorts).assign(has_t1=False)
    phantom.write_sheets(cohort, "second", root)
    for row in cohort.itertuples(index=False):
        phantom.write_patient(row, 0, "second", root)
    return root


def nodes_of(together, work):
    """Each hospital's own configuration, its files in `work`."""
    of = lambda name: {"data": str(together.parent / "data" / name), "outputs": str(work / name)}  # noqa: E731
    return {name: {"site": name, "share": "scores", **of(name)} for name in SITES}


def federation_in(folder, host=HOST, sites=tuple(SITES), changes=None, **away):
    return deployment.write(folder, profile("results", **(changes or {})), sites, host, 39800, **away)


def serve(grid, p, fold=0, modality="t2", arm=RUN["arm"], **away):
    """The folder of a run, by Flower's own call of the server app."""
    where = {"folder": "f", "profile": p, "sites": list(grid.number), "host": HOST, "port": 1}
    made = deployment.Federation(**where, **{"round_seconds": 10.0, "wait_seconds": 100.0, **away})
    run = {**RUN, "fold": fold, "modality": modality, "arm": arm}
    order = {"federation": made.model_dump(mode="json"), "run": run, "nodes": grid.number}
    app.server_app(grid, Context(1, 0, {}, RecordDict(), {"order": json.dumps(order)}))
    return runs.folder_of(p, runs.Run(**order["run"]))


def values_of(content):
    return json.loads(content["values"]["json"])


class Hospitals:
    """Messages travel as bytes; each hospital is a call of the client app.

    `away(name, kind, round)` says how a hospital is away when it is asked: None (it is there), "silent",
    "unavailable" (Flower answers for it) or "offline" (not listed for a while). `spoil(name, kind, round,
    content)` may change an answer. Both may raise. `asked` and `left` are what was sent: name, kind, order,
    content and its bytes.
    """

    def __init__(self, nodes, away=None, spoil=None):
        self.nodes, self.number = nodes, {name: k for k, name in enumerate(nodes, start=101)}
        self.away, self.spoil = away or (lambda *_: None), spoil or (lambda *_: None)
        self.asked, self.left, self.replies, self.hidden = [], [], {}, {}

    def get_node_ids(self):
        hidden = {self.number[name] for name, polls in self.hidden.items() if polls > 0}
        self.hidden = {name: polls - 1 for name, polls in self.hidden.items()}
        return [number for number in self.number.values() if number not in hidden]

    def push_messages(self, messages):
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids):
        there = [number for number in message_ids if number in self.replies]
        return [self.replies.pop(number) for number in reversed(there)]  # they come in any order

    def _deliver(self, message):
        number = message.metadata.__dict__["_message_id"] = str(len(self.asked))  # the SuperLink sets it
        name = next(n for n, k in self.number.items() if k == message.metadata.dst_node_id)
        kind, order = message.metadata.message_type, json.loads(message.content["order"]["json"])
        message = self._sent(message, self.asked, name, kind, order)
        how = self.away(name, kind, order.get("round"))
        if how == "offline":
            self.hidden[name] = 3
        if how == "unavailable":
            self.replies[number] = Message(Error(3, "unavailable"), reply_to=message)
        if how is None:
            context = Context(1, message.metadata.dst_node_id, self.nodes[name], RecordDict(), {})
            reply = app.client_app(message, context)
            self.spoil(name, kind, order.get("round"), reply.content)
            self.replies[number] = self._sent(reply, self.left, name, kind, order)
        return number

    def _sent(self, message, to, name, kind, order):
        proto = message_to_proto(message)
        message = message_from_proto(proto)
        about = {"name": name, "kind": kind, "order": order, "content": message.content}
        to.append(types.SimpleNamespace(**about, bytes=proto.SerializeToString()))
        return message

    def orders(self, kind, round_):
        """{name: order}, the last that each was sent."""
        return {m.name: m.order for m in self.asked if m.kind == kind and m.order.get("round") == round_}

    def weights(self, messages, kind, round_, name):
        """The weights of a round among `asked` or `left`."""
        about = (kind, round_, name)
        sent = next(m for m in messages if (m.kind, m.order.get("round"), m.name) == about)
        return app.unpack(sent.content["weights"])
