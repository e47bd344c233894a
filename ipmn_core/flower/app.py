"""The same federation across machines, on Flower: who sends what to whom. Nothing is learned here.

The client app passes messages to `site`, the server app updates to `federated.aggregate`; `runs.record`
writes the same files as in one process. Weights travel as one packed array: Flower handles each array alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
import traceback
from collections.abc import Iterator
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

from ipmn_core import federated, runs
from ipmn_core.disk import atomic
from ipmn_core.federated import DivergedError, Epoch, State, Update
from ipmn_core.flower import site
from ipmn_core.flower.deployment import Policy
from ipmn_core.names import CENTERS
from ipmn_core.params import Params
from ipmn_core.runs import store

client_app = ClientApp()
server_app = ServerApp()
POLL_SECONDS = 1.0
Values = dict[str, Any]


class SitesAwayError(RuntimeError):
    """Too few sites answered in the time that the policy gives them."""


def pack(state: State) -> ArrayRecord:
    """The weights as one array of bytes, names, shapes and types included."""
    buffer = BytesIO()
    torch.save(state, buffer)
    return ArrayRecord({"weights": Array(np.frombuffer(buffer.getbuffer(), np.uint8))})


def unpack(record: ArrayRecord) -> State:
    """The weights that `pack` packed; code in them never runs. Raises ValueError for anything else."""
    try:
        packed = BytesIO(record["weights"].numpy().tobytes())
        state = torch.load(packed, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"its weights cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("its weights are no state dict")
    return state


def _record(values: Values) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(values)})


@client_app.query()
@client_app.train()
@client_app.evaluate()
def _answer(message: Message, context: Context) -> Message:
    """A site's reply: values and perhaps weights.

    A fault reaches the server as its kind alone, because its text, which goes to the site's own log, may name
    cases or folders.
    """
    order, kind = json.loads(message.content["order"]["json"]), message.metadata.message_type
    at, packed = None, {}
    try:
        at = site.open_site(dict(context.node_config), order)
        with FileLock(at.folder / ".lock"):  # a question asked again may overtake the first
            values, state = _work(at, kind, order, message.content)
            packed = {} if state is None else {"weights": pack(state)}
            site.note_sent(at, kind, values, sum(len(record["weights"].data) for record in packed.values()))
    except Exception as error:
        traceback.print_exc()
        text = str(error) if isinstance(error, DivergedError) else "its text is in the site's log"
        packed, values = {}, {"fault": f"{type(error).__name__}: {text}"}
        if at is not None:
            with contextlib.suppress(OSError):  # a full disk may be the fault itself
                site.note_sent(at, kind, values)
    return Message(RecordDict({"values": _record(values), **packed}), reply_to=message)


def _work(at: site.Site, kind: str, order: Values, content: RecordDict) -> tuple[Values, State | None]:
    if kind == "query":
        return site.introduce(at), None
    w_global = unpack(content["weights"])
    if kind == "evaluate":
        return site.evaluate(at, w_global, order["round"]), None
    update = site.train(at, w_global, *(order[key] for key in ("round", "k", "since", "fresh")))
    return {"n_k": update.n_k, "loss": update.loss}, update.state


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    order = json.loads(context.run_config["order"])
    p, run = Params.model_validate_json(order["profile"]), runs.Run(**order["run"])
    federated.prepare(p.threads)
    execute(Sites(grid, p, run, order["nodes"], Policy(**order["policy"])))


class Sites:
    """The sites of a run as the server sees them: asked by name, awaited as the policy says."""

    def __init__(self, grid: Grid, p: Params, run: runs.Run, nodes: dict[str, int], policy: Policy):
        self.grid, self.p, self.run, self.policy = grid, p, run, policy
        self.nodes = {center: nodes[center] for center in CENTERS if center in nodes}
        self.folder = runs.folder_of(p, run)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "token"  # the name of the run at the sites, kept until it is whole
        if not path.exists():
            with atomic(path) as tmp:
                tmp.write_text(f"{runs.named(run).replace(' ', '_')}-{secrets.token_hex(4)}")
        of_sites = p.model_copy(update={"data": "of the site", "outputs": "of the site"})
        self.order = {"profile": of_sites.model_dump_json(), "run": asdict(run), "token": path.read_text()}

    def ask(
        self, kind: str, orders: dict[str, Values], weights: State | None = None, enough: int | None = None
    ) -> dict[str, RecordDict]:
        """The sites' answers by name: of all in `orders`, or with "continue" of at least `enough` of them.

        Sites that have not answered after `round_seconds` are asked again; an answer to either question
        counts. Raises SitesAwayError naming those that did not answer.
        """
        packed = {} if weights is None else {"weights": pack(weights)}
        answers: dict[str, RecordDict] = {}
        asked: dict[str, str] = {}  # message -> site
        started = again = time.monotonic()
        while missing := [name for name in orders if name not in answers]:
            now = time.monotonic()
            may_leave = self.policy.away == "continue" and enough is not None and len(answers) >= enough
            if may_leave and now - started > self.policy.round_seconds:
                break
            if now - started > self.policy.wait_seconds:
                raise SitesAwayError(
                    f"{', '.join(missing)} did not answer ({kind}) within {self.policy.wait_seconds:.0f} s; "
                    "the last round is kept: start their sites, then `ipmn federation run` goes on from there"
                )
            online, waited_for = set(self.grid.get_node_ids()), set(asked.values())
            if now >= again:
                waited_for, again = set(), now + self.policy.round_seconds
            for name in missing:
                if name not in waited_for and self.nodes[name] in online:
                    content = RecordDict({"order": _record({**self.order, **orders[name]}), **packed})
                    message = Message(content, dst_node_id=self.nodes[name], message_type=kind)
                    asked |= {number: name for number in self.grid.push_messages([message]) if number}
            for reply in self.grid.pull_messages(list(asked)):
                name = asked.pop(reply.metadata.reply_to_message_id)
                if reply.has_content():  # otherwise Flower says that the node is away: it is asked again
                    answers[name] = reply.content
            time.sleep(POLL_SECONDS)
        return answers


@dataclass
class Remote:
    """Where a site goes on from: the round of its last state, and whether with new AdamW moments."""

    since: int = 0
    fresh: bool = False

    def state_dict(self) -> Values:
        """Plain values for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Values) -> None:
        """Set both back to a checkpoint's values."""
        self.since, self.fresh = state["since"], state["fresh"]


def execute(sites: Sites) -> Path:
    """Train a run at the sites; its folder, in the form that `runs.execute` leaves.

    Case ids in it are running numbers. Goes on from the last whole round, with the bits of a run that never
    stopped. Raises SitesAwayError, StaleRunError for other data or settings, ValueError naming a faulty site.
    """
    p, run = sites.p.model_copy(update={"checkpoint_seconds": 0.0, "data": "federation"}), sites.run
    told = sites.ask("query", {name: {} for name in sites.nodes})
    hellos = {name: _values(told[name]) for name in sites.nodes}  # in their order, not in that of arrival
    for name, hello in hellos.items():
        if "fault" in hello or hello["center"] != name:
            raise ValueError(f"{name}: {hello.get('fault') or 'its node says it is ' + hello['center']}")
    keys = json.dumps({name: hello["data"] for name, hello in hellos.items()})
    key, settings = hashlib.sha256(keys.encode()).hexdigest(), runs.run_settings(p, run)
    store.finished(sites.folder, settings.protocol(), key)
    settings, progress = runs.on_this_machine(p, settings), store.resume(sites.folder)
    model = runs.build(settings, federated.device_of(p), list(hellos))
    rows = pd.concat([_numbered(name, hello, run) for name, hello in hellos.items()], ignore_index=True)
    rounds = _rounds(sites, settings, hellos, model, progress.learning)
    folder = runs.record(p, run, settings, key, rows, model, rounds, progress)
    (folder / "token").unlink()
    return folder


def _values(answer: RecordDict) -> Values:
    """What a site tells beside weights: counts, a loss, scores, or a `fault`."""
    try:
        return dict(json.loads(answer["values"]["json"]))
    except (KeyError, TypeError, ValueError) as error:
        return {"fault": f"its answer cannot be read ({type(error).__name__})"}


def _numbered(center: str, hello: Values, run: runs.Run) -> pd.DataFrame:
    """A site's cases as the server has them: numbers, roles and, if it shares them, labels of test cases."""
    role = np.repeat(["train", "test"], [hello["n_train"], hello["n_test"]])
    rows = pd.DataFrame({"role": role, "center": center, "modality": run.modality, "label": 0})
    number = rows.groupby("role").cumcount().astype(str)
    rows["case_id"] = f"{center} fold {run.fold} " + rows["role"] + " " + number
    rows.loc[rows["role"] == "test", "label"] = 2 * np.array(hello.get("y_true", 0))  # high risk is label 2
    return rows


def _rounds(
    sites: Sites,
    settings: runs.RunSettings,
    hellos: dict[str, Values],
    model: torch.nn.Module,
    checkpoint: Values | None,
) -> Iterator[Epoch]:
    """`federated.fit_federated` with the local updates and the tests made at the sites."""
    learners = {name: Remote() for name in hellos}
    first = federated.restore(model, learners, checkpoint)
    names, aggregated = list(learners), first > 1
    for round_ in range(first, settings.epochs + 1):
        taking_part = federated.drawn(names, settings.strategy, [*settings.seed, round_])
        w_global = federated.snapshot(model)
        orders = {n: {"round": round_, "k": names.index(n), **asdict(learners[n])} for n in taking_part}
        answers = sites.ask("train", orders, w_global, min(sites.policy.min_sites, len(taking_part)))
        updates = [_update(name, answers.get(name), hellos[name]["n_train"]) for name in taking_part]
        loss, products, left_out = federated.aggregate(model, w_global, updates, names)
        for name in answers:
            learners[name].fresh = name in left_out
            if "fault" not in _values(answers[name]):
                learners[name].since = round_
        aggregated |= len(left_out) < len(taking_part)
        enough = None if round_ == settings.epochs else 1
        orders = {name: {"round": round_} for name in names}
        tested = sites.ask("evaluate", orders, federated.snapshot(model), enough)
        prob, centers = _tested({name: _values(tested[name]) for name in names if name in tested}, len(names))
        for name in (name for name in names if name not in tested):
            left_out[name] = "; ".join([*filter(None, [left_out.get(name)]), "round not tested"])
        yield Epoch(round_, loss, prob, learners, products, left_out, centers)
    if not aggregated:
        raise DivergedError(federated.without_any_client(left_out))


def _update(name: str, answer: RecordDict | None, n_train: int) -> Update:
    """A site's answer as an update, or the reason why it is none."""
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


def _tested(told: dict[str, Values], n_sites: int) -> tuple[np.ndarray | None, list[tuple]]:
    """Probabilities (n_test, 2) of all test cases; else, if a site shares no scores, metrics by center.

    Neither if a site was away. Raises ValueError naming a site that could not test.
    """
    for name, values in told.items():
        if "fault" in values:
            raise ValueError(f"{name} could not test the global model: {values['fault']}")
    if len(told) < n_sites:
        return None, []
    if all("prob" in values for values in told.values()):
        return np.concatenate([np.reshape(values["prob"], (-1, 2)) for values in told.values()]), []
    return None, [(name, values["n"], values["acc"], values["auc"]) for name, values in told.items()]
