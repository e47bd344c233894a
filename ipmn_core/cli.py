"""The command `ipmn`: fetch and check the data, run a profile, predict a case and export models.

Those of a federation across machines are in `cli_federation`.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from pathlib import Path

from ipmn_core.flower import cli

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
EPILOG = """examples:
  ipmn run params/demo.yaml        all four notebooks on the phantom cohort: tables 1-3, figures, a report
  ipmn report params/demo.yaml     the report alone, from the notebooks of the last run
  ipmn fetch data/ipmn             the real data set, from OSF
  ipmn check data/ipmn             is this copy of the data set usable?
  ipmn predict scan.nii.gz --mask pancreas.nii.gz --models outputs/demo/runs/binary/t2/fedavg
  ipmn export outputs/demo/runs/binary/t2/fedavg shared/fedavg_t2
  ipmn phantom /tmp/cohort         a synthetic cohort with known truth, in the data set's own layout
  ipmn federation demo             hospitals as processes here: server and sites, over TLS
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 a fault that the message explains, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what is finished is kept, the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    except (
        ValueError,
        OSError,
        RuntimeError,
        ArithmeticError,
    ) as error:  # what this package raises for people to read
        if os.environ.get("IPMN_DEBUG"):
            raise
        print(f"ipmn: {_in_words(error)}", file=sys.stderr)
        return 1


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        remedy = " (make room, or choose another folder)" if error.errno in NO_PLACE else ""
        return f"{error.filename}: {error.strerror}{remedy}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipmn",
        description="Risk of pancreatic cysts (IPMN) from MRI, centralized and federated: tables 1-3.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_run(commands)

    check = commands.add_parser(
        "check", help="print what is wrong with a copy of the data set; exit 1 on errors"
    )
    check.add_argument("root", type=Path, metavar="ROOT", help="the folder that holds the label sheets")
    check.add_argument(
        "--columns", choices=("header", "position"), default="header", help="how to find the sheets' columns"
    )
    check.set_defaults(command=check_cohort)

    _add_phantom(commands)

    fetch = commands.add_parser("fetch", help="download the real data set from OSF, verify, unpack, check it")
    fetch.add_argument("root", type=Path, metavar="ROOT", help="the folder to put it in")
    fetch.add_argument("--yes", action="store_true", help="do not ask before downloading")
    fetch.set_defaults(command=fetch_cohort, columns="header")

    _add_predict(commands)

    export = commands.add_parser("export", help="an arm's trained models with a model card, to hand on")
    export.add_argument("arm", type=Path, metavar="ARM", help="<outputs>/runs/<task>/<modality>/<arm>")
    export.add_argument("target", type=Path, metavar="TARGET", help="the folder to write; it must not exist")
    export.set_defaults(command=export_arm)

    cli.add(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run", help="run the four notebooks of a profile; write its tables, figures and report"
    )
    run.add_argument("params", type=Path, metavar="PARAMS", help="a profile, for instance params/demo.yaml")
    run.add_argument(
        "--fresh", action="store_true", help="discard this profile's finished training runs first"
    )
    run.set_defaults(command=run_profile)

    report = commands.add_parser(
        "report", help="write a profile's report.html again, from its executed notebooks"
    )
    report.add_argument("params", type=Path, metavar="PARAMS", help="the profile that `ipmn run` ran")
    report.set_defaults(command=write_report)


def _add_phantom(commands: argparse._SubParsersAction) -> None:
    phantom = commands.add_parser("phantom", help="write the synthetic cohort")
    phantom.add_argument("root", type=Path, metavar="ROOT", help="the folder to write; it must not exist yet")
    phantom.add_argument(
        "--layout", choices=("second", "first"), default="second", help="release whose layout to use"
    )
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--max-per-cell", type=int, metavar="N", help="at most N cases per center and class")
    phantom.add_argument(
        "--shortcut",
        type=float,
        default=0.0,
        metavar="Q",
        help="tie the protocol to high risk: its AUC within a center is (1 + Q) / 2 (default: 0, off)",
    )
    phantom.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    phantom.set_defaults(command=write_phantom)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser("predict", help="probabilities of a new case; not for clinical use")
    predict.add_argument("image", type=Path, metavar="IMAGE", help="a scan with --mask, or a clean ROI")
    predict.add_argument("--mask", type=Path, metavar="FILE", help="the pancreas, on the image's grid")
    predict.add_argument(
        "--models",
        nargs="+",
        required=True,
        type=Path,
        metavar="PATH",
        help="runs (fold<k>), an arm's folder, an export, or the weights of a 3D DenseNet-121",
    )
    predict.add_argument("--center", help="whose model to ask; for the arm local_only")
    predict.add_argument("--size", type=int, default=96, help="of the cube, for bare weights (default: 96)")
    predict.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    predict.add_argument("--json", action="store_true", help="print JSON instead of a table")
    predict.add_argument("--picture", type=Path, metavar="FILE", help="write ROI and probabilities as PNG")
    predict.set_defaults(command=predict_case)


def run_profile(options: argparse.Namespace) -> int:
    """Runs the notebooks of a profile and says where everything lies."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    start = time.perf_counter()
    with pipeline.locked(p):
        pipeline.prepare(p, options.fresh)
        for path in pipeline.run(p):
            print(f"{time.perf_counter() - start:6.0f} s  {path.stem} done", flush=True)
        page = pipeline.write_report(p)
    print(f"\n{(p.folder / 'tables' / 'table3_beside_paper.md').read_text()}")
    for what in ("tables", "figures", "notebooks"):
        print(f"{what:>10}  {p.folder / what}/")
    print(f"{'report':>10}  {page}")
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Writes the report of a profile again, from its executed notebooks, and says where."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    with pipeline.locked(p):
        print(f"report in {pipeline.write_report(p)}")
    return 0


def check_cohort(options: argparse.Namespace) -> int:
    """Prints the problems of a data set, its table 1, and a last line that says whether it can be used."""
    import pandas as pd

    from ipmn_core import data

    scans, problems = data.inspect(options.root, options.columns)
    of_volumes = data.volume_problems(scans, progress=True)
    problems = data.worst_first(pd.concat([problems, of_volumes]).reset_index(drop=True))
    if len(problems):
        print(problems.map(data.in_one_cell).to_markdown(index=False, disable_numparse=True))
    errors = int((problems["severity"] == "error").sum())
    if not errors:
        print(f"\n{data.table1(scans).to_markdown(index=False)}")
    remarks = len(problems) - errors
    print(f"\n{options.root}: {len(scans)} labelled scans, {errors} error(s), {remarks} other remark(s)")
    return 1 if errors else 0


def fetch_cohort(options: argparse.Namespace) -> int:
    """Downloads the real data set, says what could not be verified, and checks it like `ipmn check`."""
    from ipmn_core.data import osf

    options.root, unverified = osf.fetch(options.root, _agreed if options.yes else _asked)
    for name in unverified:
        print(f"not verified, OSF gives no checksum: {name}")
    return check_cohort(options)


def _agreed(question: str) -> bool:
    print(question, "yes (--yes)")
    return True


def _asked(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise RuntimeError("no terminal to ask at; `--yes` downloads without a question") from None


def predict_case(options: argparse.Namespace) -> int:
    """Prints the probabilities of a case by each model, their mean and spread, and what to mind."""
    from ipmn_core import predict

    result = predict.predict(
        options.image, options.mask, options.models, options.center, options.size, options.device
    )
    if options.picture:
        from ipmn_core import data

        predict.picture(result, data.load_roi(options.image, options.mask, result.case), options.picture)
    if options.json:
        print(predict.to_json(result))
    else:
        print(predict.table(result).to_markdown(index=False, floatfmt=".3f"))
        print("", *result.warnings, predict.NOTICE, sep="\n")
    return 0


def export_arm(options: argparse.Namespace) -> int:
    """Writes an arm's models and their card, and says where."""
    from ipmn_core import card

    print(f"models and their card (README.md) in {card.export(options.arm, options.target)}/")
    return 0


def write_phantom(options: argparse.Namespace) -> int:
    """Writes the phantom cohort and says where."""
    from ipmn_core.phantom import write

    root = write(
        options.root,
        seed=options.seed,
        layout=options.layout,
        max_per_cell=options.max_per_cell,
        shortcut=options.shortcut,
        jobs=options.jobs,
    )
    print(f"phantom cohort in {root}/; its truth in {root / 'truth.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
