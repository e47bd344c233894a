"""The same federation across machines, on Flower: who sends what to whom. Nothing is learnt here.

The client app hands messages to `site`, the server app to `federated.aggregate`; `runs.keep` writes the same
files as in one process. Weights travel as one packed array, for Flower handles each array by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ipmn_core import disk, federated, metrics, runs
from ipmn_core.federated import State, Update, machine, training
from ipmn_core.flower import site
from ipmn_core.names import CENTERS
from ipmn_core.params import Params
from ipmn_core.runs import records

client_app = ClientApp()
server_app = ServerApp()
POLL_SECONDS = 1.0
FAILURE = "failed.txt"  # in a run's folder: why it could not go on


@dataclass(frozen=True)
class Policy:
    """What becomes of a round when a site is away, in seconds and sites.

    "wait" asks again until every site has answered; "continue" goes on with at least `min_sites` of them once
    `round_seconds` have passed. Either gives up when `wait_seconds` have passed without enough of them.
    """

    away: str = "wait"
    min_sites: int = 2
    round_seconds: float = 600.0
    wait_seconds: float = 3600.0


class SitesAwayError(RuntimeError):
    """Too few sites answered in the time that the policy gives them."""


def pack(state: State) -> ArrayRecord:
    """The weights as one array of bytes, names, shapes and types included."""
    buffer = BytesIO()
    torch.save(state, buffer)
    return ArrayRecord({"weights": Array(np.frombuffer(buffer.getbuffer(), np.uint8))})


def unpack(record: ArrayRecord) -> State:
    """The weights that `pack` packed; no code in them is ever run. Raises ValueError if they are none."""
    try:
        packed = BytesIO(record["weights"].numpy().tobytes())
        state = torch.load(packed, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"its weights cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("its weights are no state dict")
    return state


Work = Callable[[site.Site, dict[str, Any], RecordDict], tuple[dict[str, Any], State | None]]


def _introduction(at: site.Site, order: dict[str, Any], content: RecordDict):
    return site.introduce(at), None


def _local_update(at: site.Site, order: dict[str, Any], content: RecordDict):
    asked = (order[key] for key in ("round", "k", "since", "fresh"))
    update = site.train(at, unpack(content["weights"]), *asked)
    return {"n_k": update.n_k, "loss": update.loss}, update.state


def _test(at: site.Site, order: dict[str, Any], content: RecordDict):
    return site.evaluate(at, unpack(content["weights"]), order["round"]), None


def _answer(message: Message, context: Context, work: Work) -> Message:
    """A site's reply: values and perhaps weights. A fault reaches the server as its kind alone, for its text
    may name cases or folders; that goes to the site's own log.
    """
    order, kind = json.loads(message.content["order"]["json"]), message.metadata.message_type
    content, at = RecordDict(), None
    try:
        at = site.open_site(dict(context.node_config), order)
        with FileLock(at.folder / ".lock"):  # a question asked again may overtake the first
            values, state = work(at, order, message.content)
            if state is not None:
                content["weights"] = pack(state)
            site.note_sent(at, kind, values, _weight(content))
    except Exception as error:
        traceback.print_exc()
        text = str(error) if isinstance(error, training.DivergedError) else "its text is in the site's log"
        content, values = RecordDict(), {"fault": f"{type(error).__name__}: {text}"}
        if at is not None:
            with contextlib.suppress(OSError):  # a full disk may be the fault itself
                site.note_sent(at, kind, values)
    content["values"] = ConfigRecord({"json": json.dumps(values)})
    return Message(content, reply_to=message)


def _weight(content: RecordDict) -> int:
    """The bytes of the arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


@client_app.query()
def _on_query(message: Message, context: Context) -> Message:
    return _answer(message, context, _introduction)


@client_app.train()
def _on_train(message: Message, context: Context) -> Message:
    return _answer(message, context, _local_update)


@client_app.evaluate()
def _on_evaluate(message: Message, context: Context) -> Message:
    return _answer(message, context, _test)


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    order = json.loads(context.run_config["order"])
    p, run = Params.model_validate_json(order["profile"]), runs.Run(**order["run"])
    folder = runs.folder_of(p, run)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        machine.prepare(p.threads)
        execute(Sites(grid, p, run, order["nodes"], Policy(**order["policy"])))
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        disk.write(folder / FAILURE, lambda tmp: tmp.write_text(reason))
        raise


class Sites:
    """The sites of a run as the server sees them: asked by name, awaited as the policy says."""

    def __init__(self, grid: Grid, p: Params, run: runs.Run, nodes: dict[str, int], policy: Policy):
        self.grid, self.p, self.run, self.policy = grid, p, run, policy
        self.nodes = {center: nodes[center] for center in CENTERS if center in nodes}
        self.token = _token(p, run)
        self.bytes = 0

    def ask(
        self, kind: str, orders: dict[str, dict], weights: State | None = None, enough: int | None = None
    ) -> dict[str, RecordDict]:
        """The sites' answers by name: of all that are asked, or with "continue" of at least `enough` of them.

        Whoever has not answered after `round_seconds` is asked again; an answer to either question counts.
        Raises SitesAwayError naming those that did not answer.
        """
        packed = None if weights is None else pack(weights)
        answers: dict[str, RecordDict] = {}
        asked: dict[str, str] = {}  # message -> site
        started = again = time.monotonic()
        while True:
            now = time.monotonic()
            missing = [name for name in orders if name not in answers]
            late = self.policy.away == "continue" and enough is not None and len(answers) >= enough
            if not missing or (late and now - started > self.policy.round_seconds):
                return answers
            if now - started > self.policy.wait_seconds:
                raise SitesAwayError(
                    f"{', '.join(missing)} did not answer ({kind}) within {self.policy.wait_seconds:.0f} s; "
                    "the last round is kept: start their sites, then `ipmn federation run` goes on from there"
                )
            online = set(self.grid.get_node_ids())
            waited_for = set(asked.values())
            if now >= again:
                waited_for, again = set(), now + self.policy.round_seconds
            for name in missing:
                if name not in waited_for and self.nodes[name] in online:
                    message = self._message(kind, name, orders[name], packed)
                    asked |= {number: name for number in self.grid.push_messages([message]) if number}
                    self.bytes += _weight(message.content)
            for reply in self.grid.pull_messages(list(asked)):
                name = asked.pop(reply.metadata.reply_to_message_id)
                if reply.has_content():  # otherwise Flower says that the node is away: it is asked again
                    answers[name] = reply.content
                    self.bytes += _weight(reply.content)
            time.sleep(POLL_SECONDS)

    def _message(self, kind: str, name: str, order: dict, packed: ArrayRecord | None) -> Message:
        p = self.p.model_copy(update={"data": "of the site", "outputs": "of the site"})
        common = {"profile": p.model_dump_json(), "run": asdict(self.run), "token": self.token}
        content = RecordDict({"order": ConfigRecord({"json": json.dumps({**common, **order})})})
        if packed is not None:
            content["weights"] = packed
        return Message(content, dst_node_id=self.nodes[name], message_type=kind)


def _token(p: Params, run: runs.Run) -> str:
    """The name by which sites keep what they hold of this run: drawn at its start, kept until it is whole."""
    path = runs.folder_of(p, run) / "token"
    if not path.exists():
        name = runs.named(run).replace(" ", "_")
        disk.write(path, lambda tmp: tmp.write_text(f"{name}-{secrets.token_hex(4)}"))
    return path.read_text()


def execute(sites: Sites) -> Path:
    """The folder of a run that was trained at the sites, in the form that `runs.execute` leaves.

    Case ids in it are running numbers. Goes on from the last whole round, with the bits of a run that never
    stopped. Raises SitesAwayError, StaleRunError for other data or settings, ValueError naming a faulty site.
    """
    started = time.perf_counter()
    p, run = sites.p.model_copy(update={"checkpoint_seconds": 0.0}), sites.run
    told = sites.ask("query", {name: {} for name in sites.nodes})
    hellos = {name: _values(told[name]) for name in sites.nodes}  # in their order, not in that of arrival
    for name, hello in hellos.items():
        if "fault" in hello or hello["center"] != name:
            raise ValueError(f"{name}: {hello.get('fault') or 'its node says it is ' + hello['center']}")
    record = {"settings": runs.settings_of(p, run), "cohort": "federation"}
    keys = json.dumps({name: hello["data"] for name, hello in hellos.items()})
    record["data"] = hashlib.sha256(keys.encode()).hexdigest()
    records.finished(runs.folder_of(p, run), record["settings"], record["data"])
    rows = pd.concat([_numbered(name, hellos[name], run) for name in sites.nodes], ignore_index=True)
    epochs = lambda learning: _rounds(sites, record["settings"], hellos, learning)  # noqa: E731
    folder = runs.keep(p, run, record, rows, epochs, started)
    for name in ("token", FAILURE):
        (folder / name).unlink(missing_ok=True)
    return folder


def _values(answer: RecordDict) -> dict[str, Any]:
    """What a site tells beside weights: counts, a loss, scores, or a `fault`."""
    try:
        return dict(json.loads(answer["values"]["json"]))
    except (KeyError, TypeError, ValueError) as error:
        return {"fault": f"its answer cannot be read ({type(error).__name__})"}


def _numbered(center: str, hello: dict[str, Any], run: runs.Run) -> pd.DataFrame:
    """A site's cases as the server has them: numbers, roles and, if it shares them, labels of test cases."""
    label = [2 * y for y in hello.get("y_true", [0] * hello["n_test"])]  # high risk is label 2
    names = [f"{center} {role} {i}" for role in ("train", "test") for i in range(hello[f"n_{role}"])]
    rows = pd.DataFrame({"case_id": names, "center": center, "modality": run.modality})
    rows["role"] = ["train"] * hello["n_train"] + ["test"] * hello["n_test"]
    return rows.assign(label=[0] * hello["n_train"] + label)


def _rounds(
    sites: Sites, settings: dict[str, Any], hellos: dict[str, dict], learning: dict[str, Any] | None
) -> Iterator[tuple[training.Epoch, torch.nn.Module]]:
    """`federated.fit`, the local updates made elsewhere; the checkpoint says what each site goes on from."""
    steps, strategy = runs.steps_of(settings), runs.strategy_of(settings)
    model = runs.placed(runs.build_of(settings), machine.device_of(sites.p), steps)
    names, aggregated = list(sites.nodes), learning is not None
    state_of = {name: {"since": 0, "fresh": False} for name in names}
    if learning is not None:
        model.load_state_dict(learning["model"])
        state_of = learning["learners"]
    left_out: dict[str, str] = {}
    for round_ in range(learning["epoch"] + 1 if learning else 1, steps.epochs + 1):
        began, before = time.monotonic(), sites.bytes
        taking_part = federated.drawn(names, strategy, [*steps.seed, round_])
        w_global = training.snapshot(model)
        orders = {n: {"round": round_, "k": names.index(n), **state_of[n]} for n in taking_part}
        answers = sites.ask("train", orders, w_global, min(sites.policy.min_sites, len(taking_part)))
        updates = [_update(name, answers.get(name), hellos[name]["n_train"]) for name in taking_part]
        loss, products, left_out = federated.aggregate(model, w_global, updates, names)
        for name in answers:
            trained = "fault" not in _values(answers[name])
            since = round_ if trained else state_of[name]["since"]
            state_of[name] = {"since": since, "fresh": name in left_out}
        n_sites = len(taking_part) - len(left_out)
        aggregated |= n_sites > 0
        last = round_ == steps.epochs
        tested = sites.ask(
            "evaluate", {n: {"round": round_} for n in names}, training.snapshot(model), None if last else 1
        )
        prob, centers = _tested(hellos, tested)
        for name in (name for name in names if name not in tested):
            left_out[name] = "; ".join([*filter(None, [left_out.get(name)]), "round not tested"])
        _note_round(sites, round_, time.monotonic() - began, sites.bytes - before, n_sites)
        state = _checkpoint_of(model, state_of, round_)
        yield training.Epoch(round_, loss, prob, state, products, left_out, centers), model
    if not aggregated:
        raise training.DivergedError(federated.without_any_client(left_out))


def _update(name: str, answer: RecordDict | None, n_train: int) -> Update:
    """A site's answer as an update, or why it is none; the site is named either way."""
    if answer is None:
        return Update(name, fault="away")
    values = _values(answer)
    if "fault" in values:
        return Update(name, fault=values["fault"])
    if values.get("n_k") != n_train:
        return Update(name, fault=f"it trained on {values.get('n_k')} cases, not the {n_train} it has")
    try:
        return Update(name, n_train, float(values["loss"]), unpack(answer["weights"]))
    except (KeyError, TypeError, ValueError) as error:
        return Update(name, fault=f"its update cannot be read ({error})")


def _tested(
    hellos: dict[str, dict], answers: dict[str, RecordDict]
) -> tuple[np.ndarray | None, list[tuple[str, int, float, float]]]:
    """Probabilities (n_test, 2) of all test cases; or per-center metrics, if a site shares no more; or
    neither, if a site was away.
    """
    values = {name: _values(answers[name]) for name in hellos if name in answers}
    for name, value in values.items():
        if "fault" in value:
            raise ValueError(f"{name} could not test the global model: {value['fault']}")
    if len(values) < len(hellos):
        return None, []
    prob = {name: np.reshape(value["prob"], (-1, 2)) for name, value in values.items() if "prob" in value}
    if len(prob) == len(hellos):
        return np.concatenate(list(prob.values())), []
    for name in prob:
        y = np.array(hellos[name]["y_true"])
        values[name] = {
            "n": len(y),
            "acc": metrics.accuracy(y, prob[name]),
            "auc": metrics.auc(y, prob[name]),
        }
    return None, [(name, value["n"], value["acc"], value["auc"]) for name, value in values.items()]


def _checkpoint_of(model: torch.nn.Module, state_of: dict[str, dict], round_: int) -> Callable[[], dict]:
    return lambda: {"epoch": round_, "model": model.state_dict(), "learners": dict(state_of)}


def _note_round(sites: Sites, round_: int, seconds: float, weights: int, n_sites: int) -> None:
    """A line of the run's `rounds.csv`: what a round cost, and how many sites it aggregated."""
    path = runs.folder_of(sites.p, sites.run) / "rounds.csv"
    row = {"round": round_, "seconds": round(seconds, 1), "weights_bytes": weights, "sites": n_sites}
    before = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(row))
    lines = pd.concat([before[before["round"] < round_], pd.DataFrame([row])], ignore_index=True)
    disk.write(path, lambda tmp: lines.to_csv(tmp, index=False))
