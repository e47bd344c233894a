"""The command `ipmn`: run a profile, check a data set, write the phantom cohort, time it all."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

EPILOG = """examples:
  ipmn run params/demo.yaml        all four notebooks on the phantom cohort: tables 1-3, figures
  ipmn check data/ipmn             is this copy of the data set usable?
  ipmn phantom /tmp/cohort         a synthetic cohort with known truth, in the data set's own layout
  ipmn bench --only 32             speed beside the plain pipeline, cubes of 32^3 only
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 a fault that the message explains, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; finished training runs are kept, the same command goes on from there",
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
        print(f"ipmn: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipmn",
        description="Risk of pancreatic cysts (IPMN) from MRI, centralized and federated: tables 1-3.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run the four notebooks of a profile and write its tables and figures"
    )
    run.add_argument("params", type=Path, metavar="PARAMS", help="a profile, for instance params/demo.yaml")
    run.add_argument(
        "--fresh", action="store_true", help="discard this profile's finished training runs first"
    )
    run.set_defaults(command=run_profile)

    check = commands.add_parser(
        "check", help="print what is wrong with a copy of the data set; exit 1 on errors"
    )
    check.add_argument("root", type=Path, metavar="ROOT", help="the folder that holds the label sheets")
    check.add_argument(
        "--columns", choices=("header", "position"), default="header", help="how to find the sheets' columns"
    )
    check.set_defaults(command=check_cohort)

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

    bench = commands.add_parser(
        "bench", help="time this package beside the plain pipeline, and its cost against the size of things"
    )
    bench.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="median of N (default: 3)")
    bench.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    bench.add_argument("--growth", action="store_true", help="instead: cost against scans, cases, clients")
    bench.set_defaults(command=run_bench)
    return parser


def run_profile(options: argparse.Namespace) -> int:
    """Runs the notebooks of a profile and says where everything lies."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    start = time.perf_counter()
    pipeline.prepare(p, options.fresh)
    for path in pipeline.run(p):
        print(f"{time.perf_counter() - start:6.0f} s  {path.stem} done", flush=True)
    print(f"\n{(p.folder / 'tables' / 'table3_beside_paper.md').read_text()}")
    for what in ("tables", "figures", "notebooks"):
        print(f"{what:>10}  {p.folder / what}/")
    return 0


def check_cohort(options: argparse.Namespace) -> int:
    """Prints the problems of a data set, its table 1, and a last line that says whether it can be used."""
    from ipmn_core import cohort

    scans, problems = cohort.inspect(options.root, options.columns, volumes=True, progress=True)
    if len(problems):
        print(problems.to_markdown(index=False))
    errors = int((problems["severity"] == "error").sum())
    if not errors:
        print(f"\n{cohort.table1(scans).to_markdown(index=False)}")
    remarks = len(problems) - errors
    print(f"\n{options.root}: {len(scans)} labelled scans, {errors} error(s), {remarks} other remark(s)")
    return 1 if errors else 0


def run_bench(options: argparse.Namespace) -> int:
    """Prints the bench's table, or that of growth, and writes it as JSON if asked."""
    import json

    import pandas as pd

    if options.json and not options.json.parent.is_dir():
        raise FileNotFoundError(f"--json {options.json}: no such folder; make it first")
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: at least 1")
    if options.growth:
        from ipmn_core import growth

        results = growth.run()
    else:
        from ipmn_core import bench

        results = bench.run(options.only, options.repeats, options.jobs)
        print("matrix product:", *(f"{v:.0f} GFLOP/s {k}" for k, v in results["gemm_gflops"].items()))
    print(pd.DataFrame(results["rows"]).to_markdown(index=False, floatfmt=".4g"))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def write_phantom(options: argparse.Namespace) -> int:
    """Writes the phantom cohort and says where."""
    from ipmn_core import phantom

    root = phantom.write(
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
