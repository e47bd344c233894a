"""The federation across machines, on Flower: who sends what to whom. Nothing is learned here.

The client app passes messages to `site`; the server app passes updates to `federated.aggregate`.
`runs.record` writes the same files as in one process. Weights travel as one packed array, because Flower
handles each array separately.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ipmn_core import data, federated, runs
from ipmn_core.disk import atomic
from ipmn_core.federated import Epoch, State, Update
from ipmn_core.flower import site
from ipmn_core.flower.deployment import Federation, FederationError
from ipmn_core.runs import store

client_app = ClientApp()
server_app = ServerApp()
Values = dict[str, Any]


def pack(state: State) -> ArrayRecord:
    """The weights, with names, shapes and types, as one array of bytes."""
    buffer = BytesIO()
    torch.save(state, buffer)
    return ArrayRecord({"weights": Array(np.frombuffer(buffer.getbuffer(), np.uint8))})


def unpack(record: ArrayRecord) -> State:
    """The weights from `pack`, without running code in them. Raises an error for anything else."""
    packed = BytesIO(record["weights"].numpy().tobytes())
    state = torch.load(packed, map_location="cpu", weights_only=True)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise TypeError("weights must be tensors")
    return state


@client_app.query()
@client_app.train()
@client_app.evaluate()
def _answer(message: Message, context: Context) -> Message:
    """A site's reply: values and, after training, weights.

    The server gets only the kind of an error, because its text may name cases or folders; the site's log has
    the text. A FederationError names neither, so the server gets its text.
    """
    order, kind = json.loads(message.content["order"]["json"]), message.metadata.message_type
    at, packed = None, {}
    try:
        at = site.Site(dict(context.node_config), order)
        with FileLock(at.folder / ".lock"):  # a repeated question may overtake the first
            if kind == "query":
                values = site.introduce(at)
            elif kind == "evaluate":
                values = site.evaluate(at, unpack(message.content["weights"]), order["round"], order["since"])
            else:
                where = (order[key] for key in ("round", "k", "since", "fresh"))
                loss, state = site.train(at, unpack(message.content["weights"]), *where)
                values, packed = {"loss": loss}, {"weights": pack(state)}
            site.note_sent(at, kind, values, sum(len(record["weights"].data) for record in packed.values()))
    except Exception as error:
        traceback.print_exc()
        text = error if isinstance(error, FederationError) else type(error).__name__
        values, packed = {"fault": f"{text}: more is in the site's log"}, {}
        if at is not None:
            with contextlib.suppress(OSError):  # the error may be a full disk
                site.note_sent(at, kind, values)
    told = ConfigRecord({"json": json.dumps(values)})
    return Message(RecordDict({"values": told, **packed}), reply_to=message)


class Sites:
    """The sites of a run as the server sees them."""

    def __init__(self, grid: Grid, federation: Federation, run: runs.Run, nodes: dict[str, int]):
        self.grid, self.federation, self.nodes = grid, federation, nodes
        folder = runs.folder_of(federation.profile, run)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "token"  # the name of the run at the sites, kept until it is finished
        if not path.exists():
            with atomic(path) as tmp:
                plain = re.sub(r"[^A-Za-z0-9_.-]", "_", runs.named(run))  # a modality may have any letters
                tmp.write_text(f"{plain[:100]}-{secrets.token_hex(4)}")
        of_sites = federation.profile.model_copy(update={"data": "of the site", "outputs": "of the site"})
        self.order = {"profile": of_sites.model_dump_json(), "run": asdict(run), "token": path.read_text()}
        self.order["sites"] = federation.sites

    def ask(
        self, kind: str, orders: dict[str, Values], weights: State | None = None, enough: int | None = None
    ) -> dict[str, Values]:
        """The sites' answers by name: of all in `orders`, or with "continue" of at least `enough` of them.

        In the order of `orders`, not of arrival. Asks sites again that have not answered after
        `round_seconds`; either answer counts. Raises FederationError naming sites that do not answer within
        `wait_seconds`, or one that fails outside training.
        """
        packed = {} if weights is None else {"weights": pack(weights)}
        answers, asked, last = {}, {}, {}  # by site; the site of each message; when each site was asked
        after, patience = self.federation.round_seconds, self.federation.wait_seconds
        started = time.monotonic()
        while missing := [name for name in orders if name not in answers]:
            now = time.monotonic()
            may_leave = self.federation.away == "continue" and enough is not None and len(answers) >= enough
            if may_leave and now - started > after:
                break
            if now - started > patience:
                raise FederationError(
                    f"{', '.join(missing)} did not answer ({kind}) within {patience:.0f} s; "
                    "the last round is kept: start their sites, then `ipmn federation run` resumes from there"
                )
            online = set(self.grid.get_node_ids())
            for name in missing:
                if self.nodes[name] in online and now - last.get(name, -after) >= after:
                    order = ConfigRecord({"json": json.dumps({**self.order, **orders[name]})})
                    content = RecordDict({"order": order, **packed})
                    message = Message(content, dst_node_id=self.nodes[name], message_type=kind)
                    asked |= {number: name for number in self.grid.push_messages([message]) if number}
                    last[name] = now
            for reply in self.grid.pull_messages(list(asked)):
                name = asked.pop(reply.metadata.reply_to_message_id)
                if reply.has_content():
                    answers[name] = told = _told(reply.content, kind)
                    if kind != "train" and "fault" in told:
                        raise FederationError(f"{name} failed ({kind}): {told['fault']}")
                else:  # Flower says that the node is away: ask again
                    last.pop(name, None)
            time.sleep(1.0)
        return {name: answers[name] for name in orders if name in answers}


def _told(content: RecordDict, kind: str) -> Values:
    """A site's answer: counts, scores, loss and weights (`state`), or a `fault`."""
    try:
        told = json.loads(content["values"]["json"])
        if "fault" in told:
            return {"fault": str(told["fault"]) or "it gives no reason"}
        if kind == "train":
            return {"loss": float(told["loss"]), "state": unpack(content["weights"])}
        return dict(told)
    except Exception as error:  # an invalid answer must not end the others' round
        return {"fault": f"its answer cannot be read ({type(error).__name__})"}


class Remote(dict):
    """A learner at its site: the round `since` of its last state, and whether it starts `fresh`."""

    state_dict = dict.copy
    load_state_dict = dict.update


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    """Train a run at the sites; leave a folder in the form of `runs.execute`.

    Case ids in it are running numbers. Resumes from the last complete round, bit for bit. Raises
    FederationError naming a site that stays away or fails, ValueError for sites with too few training cases,
    StaleRunError for other data or settings.
    """
    order = json.loads(context.run_config["order"])
    federation, run = Federation(**order["federation"]), runs.Run(**order["run"])
    p = federation.profile.model_copy(update={"checkpoint_seconds": 0.0})
    federated.prepare(p.threads)
    sites = Sites(grid, federation, run, order["nodes"])
    hellos = sites.ask("query", {name: {} for name in sites.nodes})
    for name, hello in hellos.items():
        if hello["center"] != name:
            raise FederationError(f"{name}: its node says it is {hello['center']}")
    n_train = {name: hello["n_train"] for name, hello in hellos.items()}
    federated.check_n_train(n_train, f", {runs.named(run)}")
    keys = json.dumps({name: hello["data"] for name, hello in hellos.items()}).encode()
    key, folder = hashlib.sha256(keys).hexdigest(), runs.folder_of(p, run)
    settings = runs.run_settings(p, run)
    store.finished(folder, settings.protocol(), key)
    settings, progress = runs.on_this_machine(p, settings), store.resume(folder)
    model = runs.build(settings, federated.device_of(p), 2, list(hellos))
    rows = pd.concat([_numbered(name, hello, run) for name, hello in hellos.items()], ignore_index=True)
    rounds = _rounds(sites, settings, n_train, model, progress.learning)
    _, classes, positive = data.classes_of(p, data.PAPER)
    cases = data.Cohort("federation", rows, classes, positive, key=key)
    runs.record(p, run, settings, cases, model, rounds, progress)
    (folder / "token").unlink()


def _numbered(center: str, hello: Values, run: runs.Run) -> pd.DataFrame:
    """A site's cases as the server knows them: numbers, roles and, if shared, labels of test cases."""
    role = np.repeat(["train", "test"], [hello["n_train"], hello["n_test"]])
    rows = pd.DataFrame({"role": role, "center": center, "modality": run.modality, "positive": False})
    number = rows.groupby("role").cumcount().astype(str)
    rows["case_id"] = f"{center} fold {run.fold} " + rows["role"] + " " + number
    rows.loc[rows["role"] == "test", "positive"] = np.array(hello.get("y_true", 0), dtype=bool)
    return rows


def _rounds(
    sites: Sites,
    settings: runs.RunSettings,
    n_k: dict[str, int],
    model: torch.nn.Module,
    checkpoint: Values | None,
) -> Iterator[Epoch]:
    """`federated.fit_federated` with local updates and tests at the sites."""
    learners = {name: Remote(since=0, fresh=False) for name in n_k}
    server = federated.Server(model, settings.strategy, n_k)
    first = federated.restore(model, learners, checkpoint, server)
    names, aggregated = list(learners), first > 1
    for round_ in range(first, settings.epochs + 1):
        taking_part = federated.drawn(names, settings.strategy, [*settings.seed, round_])
        w_global = server.sends(federated.snapshot(model))
        orders = {name: {"round": round_, "k": names.index(name), **learners[name]} for name in taking_part}
        answers = sites.ask("train", orders, w_global, min(sites.federation.min_sites, len(taking_part)))
        updates = [Update(name, n_k[name], **answers.get(name, {"fault": "away"})) for name in taking_part]
        loss, products, left_out = federated.aggregate(model, server, w_global, updates, names)
        for name, answer in answers.items():
            learners[name]["fresh"] = name in left_out
            if "fault" not in answer:
                learners[name]["since"] = round_
        aggregated |= len(left_out) < len(taking_part)
        enough = None if round_ == settings.epochs else 1
        orders = {name: {"round": round_, **learners[name]} for name in names}
        tested = sites.ask("evaluate", orders, federated.snapshot(model), enough)
        away = {name: left_out.get(name, "away") for name in names if name not in tested}
        left_out |= {name: f"{reason}; round not tested" for name, reason in away.items()}
        prob, centers = None, []  # the result if a site is away
        if not away and all("prob" in told for told in tested.values()):
            prob = np.concatenate([np.reshape(tested[name]["prob"], (-1, 2)) for name in names])
        elif not away:  # a site shares no scores; a fold may have no test case of a site
            having = [(name, tested[name]) for name in names if tested[name]["n"]]
            centers = [(name, told["n"], told["acc"], told["auc"]) for name, told in having]
        yield Epoch(round_, loss, prob, learners, products, left_out, centers, server)
    if not aggregated:
        raise federated.DivergedError(federated.without_any_client(left_out))
