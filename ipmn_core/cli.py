"""The command `ipmn`; its commands of a federation across machines are in `flower.cli`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from ipmn_core.flower import cli

NEW_FOLDER = {"type": Path, "help": "the folder to write; it must not exist yet"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0 if done, 1 after an explained error, 2 for wrong usage, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError, EOFError) as error:
        if os.environ.get("IPMN_DEBUG"):
            raise
        print(f"ipmn: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    text = "Risk of pancreatic cysts (IPMN) from MRI, centralized and federated: tables 1-3."
    parser = argparse.ArgumentParser(prog="ipmn", description=text)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = partial(cli.command, commands)
    profile = {"type": Path, "help": "a profile, for instance params/demo.yaml"}

    argument = add(init)
    argument("folder", type=Path, help="where to put params/ and notebooks/")

    argument = add(run)
    argument("params", **profile)
    argument("--fresh", action="store_true", help="discard this profile's finished training runs first")

    argument = add(report)
    argument("params", **profile)

    _add_data(add)
    _add_models(add)
    add(params)
    cli.add(commands)
    return parser


def _add_data(add) -> None:
    """Add the commands of cohorts."""
    argument = add(check)
    argument("root", type=Path, help="a release's folder, a manifest, or a profile (.yaml)")

    argument = add(phantom)
    argument("root", **NEW_FOLDER)
    text = "a release's layout, or manifest: scans.csv with other centers and classes (default: second)"
    argument("--layout", choices=("second", "first", "third", "manifest"), default="second", help=text)
    argument("--centers", nargs="+", metavar="NAME", help="centers of a manifest, any names")
    argument("--axes", action="store_true", help="store the voxels of each center along axes of its own")
    argument("--seed", type=int, default=0)
    argument("--max-per-cell", type=int, metavar="N", help="at most N cases per center and class")
    text = "tie the protocol to high risk: its AUC within a center is (1 + Q) / 2 (default: 0, off)"
    argument("--shortcut", type=float, default=0.0, metavar="Q", help=text)
    argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")

    argument = add(fetch)
    argument("root", type=Path, help="the folder to put it in; `data` of a profile takes it as it is")
    text = "fetch this part only; may be given several times (default: images with masks, labels, splits)"
    argument("--only", action="append", choices=("roi", "images", "labels", "splits"), help=text)
    argument("--modality", choices=("t1", "t2"), help="volumes of this modality only (default: both)")
    argument("--cases", type=int, metavar="N", help="volumes of the first N cases per modality only")
    argument("--yes", action="store_true", help="do not ask before downloading")


def _add_models(add) -> None:
    """Add the commands of trained models."""
    argument = add(predict)
    argument("image", type=Path, help="a scan with --mask, or a clean ROI")
    argument("--mask", type=Path, help="the pancreas, on the image's grid")
    text = "runs (fold<k>), an arm, a bundle, or weights of a 3D DenseNet-121"
    argument("--models", nargs="+", required=True, type=Path, metavar="PATH", help=text)
    argument("--center", help="which center's model to use; for the arm local_only")
    for name, kind in {"size": int, "spacing": float, "intensity": str, "orientation": str}.items():
        argument(f"--{name}", type=kind, help=f"for bare weights: as the setting `{name}`, see `ipmn params`")
    argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    argument("--picture", type=Path, metavar="FILE", help="write ROI and probabilities as PNG")

    argument = add(export)
    argument("arm", type=Path, help="<outputs>/runs/<task>/<modality>/<arm>")
    argument("target", **NEW_FOLDER)
    argument("--center", help="which center's model to export; for the arm local_only")


def init(options: argparse.Namespace) -> int:
    """Copy the notebooks and profiles into a folder, to work on."""
    from ipmn_core import pipeline

    files = pipeline.init(options.folder)
    print(f"{len(files)} files in {options.folder}/params and {options.folder}/notebooks. There:")
    print("  ipmn run params/demo.yaml    # tables, figures and report, in minutes\n  jupyter lab notebooks")
    return 0


def run(options: argparse.Namespace) -> int:
    """Run a profile's four notebooks; write its tables, figures and report."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    start = time.perf_counter()
    with pipeline.locked(p):
        pipeline.prepare(p, options.fresh)
        for path in pipeline.run(p):
            print(f"{time.perf_counter() - start:6.0f} s  {path.stem} done", flush=True)
        page = pipeline.write_report(p)
    paths = [p.folder / "tables" / f"{name}.md" for name in ("table3_beside_paper", "table3")]
    print(f"\n{next(path for path in paths if path.exists()).read_text()}")
    print(f"tables, figures and notebooks are in {p.folder}/, the report is {page}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Write a profile's report.html again, from its executed notebooks."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    with pipeline.locked(p):
        print(f"report in {pipeline.write_report(p)}")
    return 0


def check(options: argparse.Namespace) -> int:
    """Print what is wrong with a cohort, and its table 1; exit 1 on errors."""
    from ipmn_core import data, params

    p = params.load(options.root) if options.root.suffix == ".yaml" else None
    root = p.cohort_root if p else options.root
    cohort, problems = data.inspect(root, p, volumes=True)
    print(*data.told(problems), sep="\n")
    errors = int((problems["severity"] == "error").sum())
    if not errors:
        print(f"\n{data.table1(cohort).to_markdown(index=False)}")
    remarks = len(problems) - errors
    print(f"\n{root}: {len(cohort)} labelled scans, {errors} error(s), {remarks} other remark(s)")
    return 1 if errors else 0


def fetch(options: argparse.Namespace) -> int:
    """Download the real data set or parts of it from Hugging Face, verify and check it."""
    from ipmn_core import fetch

    def confirmed(question: str) -> bool:
        print(question, flush=True)
        return options.yes or input("[y/N] ").strip().lower() in ("y", "yes")

    parts = options.only or fetch.DEFAULT
    files = fetch.fetch(options.root, confirmed, parts, options.modality, options.cases)
    print(f"{options.root}: {files} files, size and checksum as on the hub", flush=True)
    return check(options)


def predict(options: argparse.Namespace) -> int:
    """Print a case's probabilities by each model, mean and spread, and warnings; not for clinical use."""
    from dataclasses import fields

    from ipmn_core import predict, views
    from ipmn_core.params import Preprocessing

    asked = {field.name: getattr(options, field.name) for field in fields(Preprocessing)}
    asked = {name: value for name, value in asked.items() if value is not None}
    how = Preprocessing(**asked) if asked else None
    given = options.image, options.mask, options.models, options.center, how, options.device
    result = predict.predict(*given)
    if options.picture:
        views.prediction(result, result.scan.roi).savefig(options.picture)
    print(predict.table(result).to_markdown(index=False, floatfmt=".3f"))
    print(f"\naxes as stored: {result.scan.axes}; cube: {predict.in_words(result.how)}")
    print("", *result.warnings, predict.NOTICE, sep="\n")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write an arm's trained networks as a MONAI bundle, with a model card."""
    from ipmn_core import bundle

    target = bundle.export(options.arm, options.target, options.center)
    print(f"MONAI bundle in {target}/; its model card is docs/README.md")
    return 0


def phantom(options: argparse.Namespace) -> int:
    """Write the synthetic cohort."""
    from ipmn_core import phantom

    settings = ("seed", "layout", "max_per_cell", "shortcut", "centers", "axes", "jobs")
    root = phantom.write(options.root, **{name: getattr(options, name) for name in settings})
    print(f"phantom cohort in {root}/; its truth in {root / 'truth.csv'}")
    return 0


def params(options: argparse.Namespace) -> int:
    """Print every setting, its default (the paper's protocol) and its meaning."""
    from ipmn_core.params import Params

    for name, field in Params.model_fields.items():
        print(f"{name}: {json.dumps(field.default)}  # {field.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
