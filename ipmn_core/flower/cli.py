"""`ipmn federation ...`: the commands of a federation across machines (docs/federation.md)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Adds `federation` and its pieces to the commands of `ipmn`."""
    federation = commands.add_parser(
        "federation", help="the same federation across machines, on Flower (docs/federation.md)"
    )
    pieces = federation.add_subparsers(title="pieces", required=True, metavar="PIECE")

    _add_demo(pieces)
    _add_init(pieces)

    piece = pieces.add_parser("server", help="the server, until it is interrupted")
    piece.add_argument("folder", type=Path, metavar="FOLDER", help="what `init` wrote")
    piece.set_defaults(command=server)

    _add_site(pieces)

    for name, command, text in (
        ("run", run, "train the profile's runs at the sites, then write table 3"),
        ("status", status, "which sites are online"),
    ):
        piece = pieces.add_parser(name, help=text)
        piece.add_argument("folder", type=Path, metavar="FOLDER", help="what `init` wrote")
        piece.set_defaults(command=command)
        if name == "run":
            piece.add_argument("--only", default="", metavar="TEXT", help="only runs whose name holds TEXT")


def _add_demo(pieces: argparse._SubParsersAction) -> None:
    piece = pieces.add_parser(
        "demo", help="server and sites as processes here, beside the same in one process"
    )
    piece.add_argument(
        "params", nargs="?", type=Path, default=Path("params/federation.yaml"), metavar="PARAMS"
    )
    piece.add_argument("--sites", nargs="+", default=("NYU", "MCF", "NU"), metavar="CENTER")
    piece.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave keys, logs and the sites' files there"
    )
    piece.set_defaults(command=demo)


def _add_init(pieces: argparse._SubParsersAction) -> None:
    piece = pieces.add_parser("init", help="write certificates, keys and configuration of server and sites")
    piece.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write; it must not exist")
    piece.add_argument("params", type=Path, metavar="PARAMS", help="a profile, as params/federation.yaml")
    piece.add_argument(
        "--sites", nargs="+", required=True, metavar="CENTER", help="two or more of the centers"
    )
    piece.add_argument("--host", required=True, help="name or address at which sites reach the server")
    piece.add_argument("--port", type=int, default=9092, help="its port (default: 9092)")
    piece.add_argument(
        "--away", choices=("wait", "continue"), default="wait", help="what a round does while a site is away"
    )
    piece.add_argument(
        "--min-sites", type=int, default=2, metavar="N", help="with continue: at least N sites"
    )
    piece.add_argument(
        "--round-seconds", type=float, default=600.0, metavar="S", help="then a site counts as away"
    )
    piece.add_argument("--wait-seconds", type=float, default=3600.0, metavar="S", help="then the run fails")
    piece.set_defaults(command=init)


def _add_site(pieces: argparse._SubParsersAction) -> None:
    piece = pieces.add_parser("site", help="a site, until it is interrupted")
    piece.add_argument("folder", type=Path, metavar="FOLDER", help="what `init` wrote for this site")
    piece.add_argument("--data", type=Path, required=True, metavar="DIR", help="this site's own cases")
    piece.add_argument("--outputs", type=Path, required=True, metavar="DIR", help="where its files shall lie")
    piece.add_argument(
        "--share",
        choices=("scores", "metrics"),
        default="scores",
        help="of test cases: labels and scores without ids (pooled AUC), or ACC and AUC only",
    )
    piece.set_defaults(command=site)


def demo(options: argparse.Namespace) -> int:
    """Prints how far a federation of processes is from the same rounds in one, and what a round costs."""
    from ipmn_core.flower import demo as processes

    result = processes.run(options.params, options.sites, options.keep)
    print(f"\n{result.rounds.astype(object).to_markdown(index=False)}\n")
    print(f"largest absolute difference from one process: weights {result.weights}", end=", ")
    print(f"predictions {result.predictions}")
    return 0 if result.weights == result.predictions == 0 else 1


def init(options: argparse.Namespace) -> int:
    """Writes a federation's folder and says what goes where."""
    from ipmn_core.flower import deployment

    names = ("away", "min_sites", "round_seconds", "wait_seconds")
    policy = {name: getattr(options, name) for name in names}
    made = deployment.write(
        options.folder, options.params, options.sites, options.host, options.port, **policy
    )
    print(f"the server's own: {made.folder}/server/, private keys included; start `ipmn federation server`")
    for name in made.sites:
        print(f"for {name} alone, by a safe way, for it holds its key: {made.folder}/sites/{name}/")
    return 0


def server(options: argparse.Namespace) -> None:
    """Becomes Flower's SuperLink."""
    from ipmn_core.flower import deployment

    federation = deployment.read(options.folder)
    _become(deployment.server_command(federation), deployment.environment(federation))


def site(options: argparse.Namespace) -> None:
    """Keeps Flower's SuperNode running."""
    from ipmn_core.flower import deployment

    command = deployment.site_command(options.folder, options.data, options.outputs, options.share)
    deployment.stay(command, deployment.environment())


def _become(command: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def run(options: argparse.Namespace) -> int:
    """Trains at the sites what is not on disk yet, and prints table 3."""
    from ipmn_core import pipeline
    from ipmn_core.federated import privacy
    from ipmn_core.flower import deployment

    federation = deployment.read(options.folder)
    with pipeline.locked(federation.profile):
        for folder in deployment.run(federation, options.only):
            print(f"whole: {folder}", flush=True)
        if options.only:
            return 0
        path = deployment.tables(federation)
    print(f"\n{path.read_text()}\n{privacy.note(federation.profile)}\ntables  {path.parent}/")
    return 0


def status(options: argparse.Namespace) -> int:
    """Prints a line a site; exit 1 if one is not online."""
    import pandas as pd

    from ipmn_core.flower import deployment

    rows = deployment.status(deployment.read(options.folder))
    print(pd.DataFrame(rows).to_markdown(index=False))
    return 0 if all(row["status"] == "online" for row in rows) else 1
