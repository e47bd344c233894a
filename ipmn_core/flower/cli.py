"""`ipmn federation ...`: the commands of a federation across machines (docs/federation.md)."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path


def command(commands: argparse._SubParsersAction, function: Callable, kind: str = "command") -> Callable:
    """Add `function` as a command, with its name and docstring; return the parser's `add_argument`."""
    new = commands.add_parser(function.__name__, help=function.__doc__)
    new.set_defaults(**{kind: function})
    return new.add_argument


def add(commands: argparse._SubParsersAction) -> None:
    """Add `federation` and its subcommands to the commands of `ipmn`."""
    federation = commands.add_parser(
        "federation", help="Train across machines, on Flower (docs/federation.md)"
    )
    federation.set_defaults(command=_start)
    pieces = federation.add_subparsers(title="pieces", required=True, metavar="PIECE")
    piece = partial(command, pieces, kind="piece")
    folder = {"type": Path, "metavar": "FOLDER"}
    argument = piece(demo)
    argument("params", nargs="?", type=Path, default=Path("params/federation.yaml"), metavar="PARAMS")
    argument("--keep", **folder, help="keep keys, logs and the sites' files in this folder")

    argument = piece(init)
    argument("folder", **folder, help="the folder to write; it must not exist")
    argument("params", type=Path, metavar="PARAMS", help="a profile, for instance params/federation.yaml")
    argument("--sites", nargs="+", required=True, metavar="SITE", help="two or more names")
    argument("--host", required=True, help="name or address at which sites reach the server")
    argument("--port", type=int, default=9092, help="its port (default: 9092)")
    argument("--away", choices=("wait", "continue"), default="wait", help="what to do when a site is away")

    argument = piece(server)
    argument("folder", **folder, help="the folder that `init` wrote")

    argument = piece(site)
    argument("folder", **folder, help="the folder that `init` wrote for this site")
    argument("--data", type=Path, required=True, metavar="PATH", help="the site's own manifest or release")
    argument("--outputs", type=Path, required=True, metavar="DIR", help="the folder for the site's files")
    text = "what to share of test cases: labels and scores without ids (pooled AUC), or only ACC and AUC"
    argument("--share", choices=("scores", "metrics"), default="scores", help=text)

    argument = piece(run)
    argument("folder", **folder, help="the folder that `init` wrote")
    argument("--only", default="", metavar="TEXT", help="only runs whose name contains TEXT; no table")


def _start(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("flwr") is None:
        raise RuntimeError("Flower is not installed; `pip install 'ipmn[flower]'`")
    return options.piece(options)


def demo(options: argparse.Namespace) -> int:
    """Run server and sites as processes here, and compare with training in one process."""
    from ipmn_core.flower import demo

    weights, predictions = demo.run(options.params, options.keep)
    print(f"largest absolute difference from one process: weights {weights}, predictions {predictions}")
    return 0 if weights == predictions == 0 else 1


def init(options: argparse.Namespace) -> int:
    """Write certificates, keys and settings of server and sites."""
    from ipmn_core import params
    from ipmn_core.flower import deployment

    where = options.sites, options.host, options.port
    made = deployment.write(options.folder, params.load(options.params), *where, away=options.away)
    print(f"only for the server: {made.server}/ (with private keys); start `ipmn federation server`")
    for name in made.sites:
        print(f"only for {name}, sent securely because it holds its key: {made.folder}/sites/{name}/")
    return 0


def server(options: argparse.Namespace) -> None:
    """Run the server until it is interrupted."""
    from ipmn_core.flower import deployment, processes

    federation = deployment.read(options.folder)
    command = processes.server_command(federation)
    os.execvpe(command[0], command, processes.environment(federation))


def site(options: argparse.Namespace) -> None:
    """Run a site until it is interrupted."""
    from ipmn_core.flower import processes

    command = processes.site_command(options.folder, options.data, options.outputs, options.share)
    os.execvpe(command[0], command, processes.environment())


def run(options: argparse.Namespace) -> int:
    """Train the profile's runs at the sites, then write table 3."""
    from ipmn_core import pipeline
    from ipmn_core.flower import deployment, processes

    federation = deployment.read(options.folder)
    with pipeline.locked(federation.profile):
        for folder in processes.run(federation, options.only):
            print(f"finished: {folder}", flush=True)
        if not options.only:
            print(f"\n{processes.table3(federation.profile)}")
    return 0
