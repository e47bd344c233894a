"""The command `ipmn`; its commands of a federation across machines are in `flower.cli`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from functools import partial
from pathlib import Path

from ipmn_core.flower import cli

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
EPILOG = """examples:
  ipmn run params/demo.yaml        all four notebooks on the phantom cohort: tables 1-3, figures, a report
  ipmn report params/demo.yaml     the report alone, from the notebooks of the last run
  ipmn params                      every setting, its default and its meaning
  ipmn fetch data/ipmn             the real data set, from OSF
  ipmn check data/ipmn             is this copy of the data set usable?
  ipmn predict scan.nii.gz --mask pancreas.nii.gz --models outputs/demo/runs/binary/t2/fedavg
  ipmn export outputs/demo/runs/binary/t2/fedavg shared/fedavg_t2
  ipmn phantom /tmp/cohort         a synthetic cohort with known truth, in the data set's own layout
  ipmn federation demo             hospitals as processes here: server and sites, over TLS
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0 if done, 1 after an explained error, 2 for wrong usage, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:  # this package's own messages
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

    def add(name, command, text):
        """The function that adds an argument to a new command."""
        new = commands.add_parser(name, help=text)
        new.set_defaults(command=command)
        return new.add_argument

    one_of = lambda *choices: {"choices": choices, "default": choices[0]}  # noqa: E731
    profile = {"type": Path, "metavar": "PARAMS", "help": "a profile, for instance params/demo.yaml"}
    new_folder = {"type": Path, "help": "the folder to write; it must not exist yet"}

    argument = add("run", run_profile, "run a profile's four notebooks; write its tables, figures and report")
    argument("params", **profile)
    argument("--fresh", action="store_true", help="discard this profile's finished training runs first")

    argument = add("report", write_report, "write a profile's report.html again, from its executed notebooks")
    argument("params", **profile)

    argument = add("check", check_cohort, "print what is wrong with a copy of the data set; exit 1 on errors")
    argument("root", type=Path, metavar="ROOT", help="the folder that holds the label sheets")

    argument = add("phantom", write_phantom, "write the synthetic cohort")
    argument("root", metavar="ROOT", **new_folder)
    argument("--layout", **one_of("second", "first"), help="release whose layout to use")
    argument("--seed", type=int, default=0)
    argument("--max-per-cell", type=int, metavar="N", help="at most N cases per center and class")
    text = "tie the protocol to high risk: its AUC within a center is (1 + Q) / 2 (default: 0, off)"
    argument("--shortcut", type=float, default=0.0, metavar="Q", help=text)
    argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")

    argument = add("fetch", fetch_cohort, "download the real data set from OSF, verify, unpack, check it")
    argument("root", type=Path, metavar="ROOT", help="the folder to put it in")
    argument("--yes", action="store_true", help="do not ask before downloading")

    argument = add("predict", predict_case, "probabilities of a new case; not for clinical use")
    argument("image", type=Path, metavar="IMAGE", help="a scan with --mask, or a clean ROI")
    argument("--mask", type=Path, metavar="FILE", help="the pancreas, on the image's grid")
    paths = {"nargs": "+", "required": True, "type": Path, "metavar": "PATH"}
    argument("--models", **paths, help="runs (fold<k>), an arm, an export, or weights of a 3D DenseNet-121")
    argument("--center", help="which center's model to use; for the arm local_only")
    argument("--size", type=int, default=96, help="edge of the cube, for bare weights (default: 96)")
    argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    argument("--json", action="store_true", help="print JSON instead of a table")
    argument("--picture", type=Path, metavar="FILE", help="write ROI and probabilities as PNG")

    argument = add("export", export_arm, "copy an arm's trained models, with a model card")
    argument("arm", type=Path, metavar="ARM", help="<outputs>/runs/<task>/<modality>/<arm>")
    argument("target", metavar="TARGET", **new_folder)

    add("params", print_params, "print every setting, its default (the paper's protocol) and its meaning")

    cli.add(commands)
    return parser


def run_profile(options: argparse.Namespace) -> int:
    """Run the notebooks of a profile and print where the results are."""
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


def print_params(options: argparse.Namespace) -> int:
    """Print all settings from the schema."""
    import pandas as pd

    from ipmn_core import params

    print(pd.DataFrame(params.table()).to_markdown(index=False, disable_numparse=True))
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Write the report of a profile again, from its executed notebooks, and print its path."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    with pipeline.locked(p):
        print(f"report in {pipeline.write_report(p)}")
    return 0


def check_cohort(options: argparse.Namespace) -> int:
    """Print the problems of a data set, its table 1, and a last line that says whether it can be used."""
    from ipmn_core import data

    scans, problems = data.inspect(options.root, volumes=True)
    if len(problems):
        print(problems.map(_in_one_cell).to_markdown(index=False, disable_numparse=True))
    errors = int((problems["severity"] == "error").sum())
    if not errors:
        print(f"\n{data.table1(scans).to_markdown(index=False)}")
    remarks = len(problems) - errors
    print(f"\n{options.root}: {len(scans)} labelled scans, {errors} error(s), {remarks} other remark(s)")
    return 1 if errors else 0


def _in_one_cell(text: str) -> str:
    """The text for a cell of a Markdown table on a terminal: what does not print, and the bar, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace("|", r"\|")


def fetch_cohort(options: argparse.Namespace) -> int:
    """Download the real data set, list what could not be verified, and check it like `ipmn check`."""
    from ipmn_core.data import osf

    options.root, unverified = osf.fetch(options.root, partial(_confirmed, options.yes))
    for name in unverified:
        print(f"not verified, OSF gives no checksum: {name}")
    return check_cohort(options)


def _confirmed(yes: bool, question: str) -> bool:
    if yes:
        print(question, "yes (--yes)")
        return True
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise RuntimeError("no terminal to ask at; `--yes` downloads without a question") from None


def predict_case(options: argparse.Namespace) -> int:
    """Print the probabilities of a case by each model, their mean and spread, and warnings."""
    from ipmn_core import data, predict

    given = options.image, options.mask, options.models, options.center, options.size, options.device
    result = predict.predict(*given)
    if options.picture:
        from ipmn_core import views

        roi = data.load_roi(options.image, options.mask, result.case)
        views.prediction(result, roi).savefig(options.picture)
    if options.json:
        print(predict.to_json(result))
    else:
        print(predict.table(result).to_markdown(index=False, floatfmt=".3f"))
        print("", *result.warnings, predict.NOTICE, sep="\n")
    return 0


def export_arm(options: argparse.Namespace) -> int:
    """Write an arm's models and their card, and print where."""
    from ipmn_core import card

    print(f"models and their card (README.md) in {card.export(options.arm, options.target)}/")
    return 0


def write_phantom(options: argparse.Namespace) -> int:
    """Write the phantom cohort and print where."""
    from ipmn_core import phantom

    settings = ("seed", "layout", "max_per_cell", "shortcut", "jobs")
    root = phantom.write(options.root, **{name: getattr(options, name) for name in settings})
    print(f"phantom cohort in {root}/; its truth in {root / 'truth.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
