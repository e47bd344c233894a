"""The command `ipmn`; the commands of a federation across machines are in `flower.cli`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ipmn_core.flower import cli

SHOWN = 20  # printed rows of a long table
NEW_FOLDER = {"type": Path, "help": "the folder to write; it must not exist yet"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0 on success, 1 for an explained error, 2 for wrong usage, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept: `ipmn run` resumes from there", file=sys.stderr)
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
    argument("--fresh", action="store_true", help="first discard this profile's finished training runs")

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
    argument("root", type=Path, help="the folder of a release, a manifest, or a profile (.yaml)")

    argument = add(phantom)
    argument("root", **NEW_FOLDER)
    text = "layout of a release, or manifest: scans.csv with other centers and classes (default: second)"
    argument("--layout", choices=("second", "first", "third", "manifest"), default="second", help=text)
    argument("--centers", nargs="+", metavar="NAME", help="centers of a manifest, any names")
    argument("--axes", action="store_true", help="store the voxels of each center along different axes")
    argument("--seed", type=int, default=0)
    argument("--max-per-cell", type=int, metavar="N", help="at most N cases per center and class")
    text = "tie the protocol to high risk: its AUC within a center is (1 + Q) / 2 (default: 0, off)"
    argument("--shortcut", type=float, default=0.0, metavar="Q", help=text)
    argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")

    argument = add(fetch)
    argument("root", type=Path, help="the folder for the data set; a profile's `data` can name it")
    text = "fetch only this part; may be given several times (default: images with masks, labels, splits)"
    argument("--only", action="append", choices=("roi", "images", "labels", "splits"), help=text)
    argument("--modality", choices=("t1", "t2"), help="only volumes of this modality (default: both)")
    argument("--cases", type=int, metavar="N", help="only volumes of the first N cases per modality")
    argument("--yes", action="store_true", help="do not ask before downloading")


def _add_models(add) -> None:
    """Add the commands of trained models."""
    argument = add(predict)
    text = "an image, a folder of images, or a manifest without labels; with masks, or clean ROIs"
    argument("scans", type=Path, metavar="SCANS", help=text)
    argument("--mask", type=Path, help="mask of the pancreas on the image's grid; or the folder of masks")
    _add_weights(argument)
    argument("--center", help="which center's model to use, for arms with one model per center")
    argument("--table", type=Path, metavar="FILE", help="write the table as CSV; it must not exist yet")
    argument("--picture", type=Path, metavar="FILE", help="write ROI and probabilities of one scan as PNG")

    argument = add(score)
    argument("params", type=Path, help="the profile of the cohort and its folds")
    _add_weights(argument)
    argument("--arm", help="name of the new arm (default: scored_<arm>, or released for files)")
    argument("--modality", help="modality of the weights, if their run does not say it")
    text = "folds that the files test, in order (default: k in a folder fold<k>, or 0, 1, ... for all folds)"
    argument("--folds", nargs="+", type=int, metavar="K", help=text)
    argument("--whole", action="store_true", help="test every case with the mean over all weights")

    argument = add(export)
    argument("arm", type=Path, help="<outputs>/runs/<task>/<modality>/<arm>")
    argument("target", **NEW_FOLDER)
    argument("--center", help="which center's model to export, for arms with one model per center")


def _add_weights(argument) -> None:
    """Add the options for given weights."""
    text = "runs (fold<k>), an arm, a bundle, or files of weights with 1 to 3 outputs"
    argument("--models", nargs="+", required=True, type=Path, metavar="PATH", help=text)
    argument("--network", help="network of bare weights (default: densenet121)")
    for name, kind in {"size": int, "spacing": float, "intensity": str, "orientation": str}.items():
        argument(f"--{name}", type=kind, help=f"for bare weights: the setting `{name}`, see `ipmn params`")
    argument("--device", help="auto, cpu, cuda, cuda:1 (default: the profile's, or auto)")


def _how(options: argparse.Namespace):
    """The preprocessing of the options, or None."""
    from ipmn_core.params import Preprocessing

    asked = {name: getattr(options, name) for name in asdict(Preprocessing())}
    asked = {name: value for name, value in asked.items() if value is not None}
    return Preprocessing(**asked) if asked else None


def init(options: argparse.Namespace) -> None:
    """Copy the notebooks and profiles to a folder to work in."""
    from ipmn_core import pipeline

    files = pipeline.init(options.folder)
    print(f"{len(files)} files in {options.folder}/params and {options.folder}/notebooks. There:")
    print("  ipmn run params/demo.yaml    # tables, figures and report, in minutes\n  jupyter lab notebooks")


def run(options: argparse.Namespace) -> None:
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
    for path in [path for path in paths if path.exists()][:1]:
        print(f"\n{path.read_text()}")
    print(f"tables, figures and notebooks are in {p.folder}/, the report is {page}")


def report(options: argparse.Namespace) -> None:
    """Write a profile's report.html again, from its executed notebooks."""
    from ipmn_core import params, pipeline

    p = params.load(options.params)
    with pipeline.locked(p):
        print(f"report in {pipeline.write_report(p)}")


def check(options: argparse.Namespace) -> int:
    """Print the problems of a cohort, and its table 1; exit 1 on errors."""
    from ipmn_core import data, params

    p = params.load(options.root) if options.root.suffix == ".yaml" else None
    root = p.cohort_root if p else options.root
    cohort, problems = data.inspect(root, p, volumes=True)
    print(*data.told(problems), sep="\n")
    errors = int((problems["severity"] == "error").sum())
    if not errors:
        print(f"\n{data.table1(cohort).to_markdown(index=False)}")
    remarks = len(problems) - errors
    print(f"\n{root}: {len(cohort)} labeled scans, {errors} error(s), {remarks} other remark(s)")
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
    """Print probabilities of one scan by each model, or of many scans, and warnings; not for clinical use."""
    from ipmn_core import data, disk, predict, views

    if options.table and (options.table.exists() or not options.table.absolute().parent.is_dir()):
        raise ValueError(f"{options.table} exists, or its folder does not; give a new file")
    scans = data.unlabelled(options.scans, options.mask, problems := [])
    if options.picture and len(scans) > 1:
        raise ValueError(f"--picture draws one scan, but {options.scans} has {len(scans)}; leave it out")
    asked = options.models, options.center, _how(options), options.device or "auto", options.network
    results = []
    try:
        results.extend(predict.predict_each(scans, *asked))
    finally:  # keeps finished predictions, also after an interrupt
        if options.table and results:
            with disk.atomic(options.table) as tmp:
                predict.by_case(scans.iloc[: len(results)], results).to_csv(tmp, index=False)
    table = predict.by_case(scans, results)
    said = [f"{severity}: {where}: {problem}; {remedy}" for severity, where, problem, remedy in problems]
    if len(scans) > 1:
        said += _of_many(table)
    elif isinstance(results[0], ValueError):
        raise results[0]
    else:
        one, how = results[0], results[0].how
        about = f"\naxes as stored: {one.axes}; cube: {predict.in_words(how)}\n"
        said += [predict.table(one).to_markdown(index=False, floatfmt=".3f"), about, *one.warnings]
        if options.picture:
            roi = data.load_roi(*scans.loc[0, ["image", "mask", "case_id"]], how)
            views.prediction(one, roi).savefig(options.picture)
    said += [f"all rows are in {options.table}"] if options.table else []
    text = "\n".join([*said, predict.NOTICE])
    print("".join(c if c.isprintable() or c == "\n" else "?" for c in text))  # file names may be hostile
    return int(table["error"].any())


def _of_many(table) -> list[str]:
    """The output for many scans: one row for each of the first ones, the first warnings, all errors."""
    used, failed = table[table["error"] == ""], table[table["error"] != ""]
    shown = used.drop(columns=["image", "warnings", "error"]).head(SHOWN)
    said = [shown.to_markdown(index=False, floatfmt=".3f", disable_numparse=[0]), ""] if len(used) else []
    for text, cases in [*used.groupby("warnings", sort=False)["case_id"]][:SHOWN]:
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        said += [f"{cases.iloc[0]}{more}: {text}"] if text else []
    said += [f"error: {text}" for text in failed["error"]]
    n, doubtful = len(table), (used["warnings"] != "").sum()
    counts = f"{len(used)} of {n} scans predicted, {doubtful} with warnings; {len(failed)} cannot be used"
    return [*said, counts]


def score(options: argparse.Namespace) -> None:
    """Test given weights on a cohort, without training, and write the results as runs."""
    from ipmn_core import params, pipeline, predict

    p = params.load(options.params)
    p = p.model_copy(update={"device": options.device or p.device})
    asked = {name: getattr(options, name) for name in ("arm", "modality", "folds", "whole", "network")}
    with pipeline.locked(p):
        scored = predict.score(p, options.models, how=_how(options), **asked)
    print(scored.folds.to_markdown(index=False, floatfmt=".4f"))
    print("", *(f"note: {remark}" for remark in scored.remarks), sep="\n")
    print(f"results are in {scored.arm}/; `ipmn run {options.params}` shows them with the others")


def export(options: argparse.Namespace) -> None:
    """Write an arm's trained networks as a MONAI bundle, with a model card."""
    from ipmn_core import bundle

    target = bundle.export(options.arm, options.target, options.center)
    print(f"MONAI bundle in {target}/; its model card is docs/README.md")


def phantom(options: argparse.Namespace) -> None:
    """Write the synthetic cohort."""
    from ipmn_core import phantom

    settings = ("seed", "layout", "max_per_cell", "shortcut", "centers", "axes", "jobs")
    root = phantom.write(options.root, **{name: getattr(options, name) for name in settings})
    print(f"phantom cohort in {root}/; its truth in {root / 'truth.csv'}")


def params(options: argparse.Namespace) -> None:
    """Print every setting, its default (the paper's protocol) and its meaning."""
    from ipmn_core.params import Params

    for name, field in Params.model_fields.items():
        print(f"{name}: {json.dumps(field.default)}  # {field.description}")


if __name__ == "__main__":
    sys.exit(main())
