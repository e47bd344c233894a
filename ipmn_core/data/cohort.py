"""The cohort: the table of scans, one row per labeled scan, its classes, and a cube for each row."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ipmn_core.data import folds, manifest, releases
from ipmn_core.data.cubes import RECIPE, load_cubes, volume_problems
from ipmn_core.data.releases import SCAN_COLUMNS, CohortError
from ipmn_core.names import CENTERS, LABELS, TASKS, binary_names, fusion, single
from ipmn_core.params import Params

PAPER = dict(zip("012", LABELS, strict=True))  # label in the sheets of the real data set -> class
PROBLEM_COLUMNS = ["severity", "where", "problem", "remedy"]
TAKEN = {"center", "modality", "total"}  # columns of table 1
SEVERITIES = ["error", "warning", "note"]


@dataclass(frozen=True)
class Cohort:
    """Scans, their classes in order, and one cube per scan (N, S, S, S); None if cubes are not loaded.

    `scans` has the columns `releases.SCAN_COLUMNS`, where `label` is the index of the class in `classes`, and
    two more: `class` (its name) and `positive` (whether it is in `positive`). Rows are sorted by modality,
    then center. `is_paper`: centers and classes are the paper's. `key` is a SHA-256 of files, recipe and rows
    as loaded; a subset of the cohort keeps it.
    """

    name: str
    scans: pd.DataFrame
    classes: tuple[str, ...]
    positive: tuple[str, ...]
    is_paper: bool = False
    cubes: np.ndarray | None = None
    key: str = ""

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def centers(self) -> tuple[str, ...]:
        """The centers, in their order."""
        return tuple(self.scans["center"].unique())

    @property
    def about(self) -> str:
        """Name, counts, centers and classes, to print at the start of a chapter."""
        counts = ", ".join(f"{n} {m}" for m, n in self.scans["modality"].value_counts(sort=False).items())
        classes = ", ".join(f"{k} {name}" for k, name in enumerate(self.classes))
        return (
            f"cohort {self.name}: {len(self)} labeled scans ({counts})\n"
            f"{len(self.centers)} centers: {', '.join(self.centers)}\n"
            f"classes: {classes}; positive: {', '.join(self.positive)}"
        )

    def where(self, keep) -> "Cohort":
        """The scans for which the boolean array `keep` (N,) is true, with their cubes."""
        keep = np.asarray(keep)
        cubes = None if self.cubes is None else self.cubes[keep]
        return replace(self, scans=self.scans[keep].reset_index(drop=True), cubes=cubes)

    def of(self, modality: str) -> "Cohort":
        """The scans of one modality, with their cubes.

        A fused modality (`names.fusion`) needs a paired cohort. It has one row per patient, that of the
        second modality's scan, and cubes (N, 2, S, S, S).
        """
        parts, how = fusion(modality)
        if how:
            mine = [self.of(part) for part in parts]
            cubes = None if self.cubes is None else np.stack([one.cubes for one in mine], axis=1)
            return replace(mine[-1], scans=mine[-1].scans.assign(modality=modality), cubes=cubes)
        return self.where(self.scans["modality"] == modality)

    def names(self, task: str) -> tuple[str, ...]:
        """Names of the classes of a task, `multiclass` or `binary`, in the order of its labels."""
        return binary_names(self.positive) if task == "binary" else self.classes


def classes_of(
    p: Params, known: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Class of each label, all classes in order, and the positive classes.

    They come from the profile, or else from `known`. Two labels may share one class. Raises CohortError
    unless some classes, but not all, are positive, and for names that tables cannot tell apart.
    """
    naming = p.classes or dict(known)
    classes = tuple(dict.fromkeys(naming.values()))
    positive = p.positive or classes[-1:]
    if not set(positive) < set(classes) or len(classes) < 2:
        text = f"positive {', '.join(positive) or 'none'} of the classes {', '.join(classes) or 'none'}"
        raise CohortError("classes", text, "have two classes or more, and set `positive` to some of them")
    columns = [name.replace(" ", "_").casefold() for name in classes]
    if len(TAKEN.union(columns)) < len(TAKEN) + len(columns):
        text = f"the names {', '.join(map(repr, classes))} are too similar, or one of {', '.join(TAKEN)}"
        raise CohortError("classes", text, "rename them with `classes`, a mapping {label: class}")
    return naming, classes, tuple(name for name in classes if name in positive)


def inspect(root, p: Params | None = None, volumes: bool = False) -> tuple[Cohort, pd.DataFrame]:
    """What can be used of the cohort at `root`, and its problems (`PROBLEM_COLUMNS`), errors first.

    `root` is the folder of a release, or a manifest. `p` names classes and centers and says how cases are
    split (default: as in the paper). Errors keep a scan, or the whole cohort, from being used. Scans without
    a label are left out and counted in `scans.attrs["unlabelled"]`. With `volumes`, every volume is read as
    well (`cubes.volume_problems`).
    """
    how, p, root, problems = p and p.preprocessing, p or Params(), Path(root), []
    of_release = root.is_dir()
    if of_release:
        found, unlabelled = releases.read_release(root, problems, p.cohort)
    else:
        found, unlabelled = manifest.read(root, problems, p.classes or ())
    labels = {str(scan["label"]) for scan in found}
    try:
        naming, classes, positive = classes_of(p, PAPER if of_release else manifest.naming(labels))
    except CohortError as error:
        if found or not problems:  # without a scan there is no class either
            problems.append(("error", *error.args))
        naming, classes, positive = {label: label for label in labels}, tuple(sorted(labels)), ()
    known = [scan for scan in found if str(scan["label"]) in naming]
    for scan in (scan for scan in found if str(scan["label"]) not in naming):
        text = f"label {scan['label']!r} of {scan['case_id']} is none of {', '.join(naming)}"
        problems.append(("error", scan["where"], text, "correct it, clear it, or list it in `classes`"))
    scans = _table(known, p, naming, classes, of_release)
    scans["class"] = scans["label"].map(dict(enumerate(classes)))
    scans["positive"] = scans["class"].isin(positive)
    scans.attrs["unlabelled"] = unlabelled
    is_paper = of_release and not (p.classes or p.positive or p.center_names)
    cohort = Cohort("phantom" if root == p.phantom_root else root.name, scans, classes, positive, is_paper)
    problems += [*_names(cohort, root, p, of_release), *_disagreements(cohort)]
    if p.paired and len(scans):
        try:
            used = scans["modality"].isin(single(p.modalities))
            cohort = paired(cohort.where(used), root, problems)
        except CohortError as error:
            problems.append(("error", *error.args))
    for task in TASKS if positive else ():
        problems += folds.problems(cohort, p.folds(task), p.fold_rule, task)
    if any(unlabelled.values()):
        counts = " and ".join(f"{n} {m} scans" for m, n in unlabelled.items())
        problems.append(("note", root, f"{counts} have no label", "none needed: they are left out"))
    problems += volume_problems(scans, how) if volumes else []
    return cohort, _errors_first(problems)


def _errors_first(problems: list[tuple]) -> pd.DataFrame:
    """Problems as a table, each once, errors first."""
    table = pd.DataFrame(problems, columns=PROBLEM_COLUMNS).astype(str).drop_duplicates()
    order = table["severity"].map(SEVERITIES.index).sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def told(problems: pd.DataFrame) -> list[str]:
    """One printable line per problem; characters that cannot be printed become question marks."""
    lines = [f"{row.severity}: {row.where}: {row.problem}; {row.remedy}" for row in problems.itertuples()]
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]


def _names(cohort: Cohort, root: Path, p: Params, of_release: bool):
    """Problems with the names of centers, classes and modalities, and notes on what was chosen."""
    scans = cohort.scans
    for column in ("center", "class", "modality"):
        names = pd.Series(scans[column].unique(), dtype=str)
        for _, alike in names.groupby(names.str.casefold()):
            if len(alike) > 1:
                text = f"names of a {column} that differ in capitals only: {', '.join(map(repr, alike))}"
                yield "warning", root, text, "use one spelling if they are the same"
    if "global" in (name.casefold() for name in cohort.centers):
        remedy = "rename it, in the table or with `center_names`"
        yield "error", root, "a center is called global, the name for all centers together", remedy
    listed = dict.fromkeys([*(p.center_names or {}).values(), *(p.classes or {}).values()])
    if absent := [name for name in listed if name not in {*cohort.centers, *scans["class"]}]:
        text = f"no scan belongs to {', '.join(absent)}"
        yield "note", root, text, "none needed unless the profile has a typo"
    if len(scans) and not of_release and not p.classes:
        classes = ", ".join(f"{k} {name}" for k, name in enumerate(cohort.classes))
        text = f"the labels give the classes {classes}; positive: {', '.join(cohort.positive)}"
        yield "note", root, text, "set `classes` and `positive` for another order"
    if p.fold_rule in ("center", "patient") and scans.filter(like="fold_").ne("").any(axis=None):
        remedy = f"set `fold_rule: {'official' if of_release else 'given'}` to use them"
        yield "note", root, "the folds given with the data are not used", remedy


def _table(found: list[dict], p: Params, naming, classes, of_release: bool) -> pd.DataFrame:
    """The cohort's table: labels as indices into `classes`, centers renamed and in order."""
    scans = pd.DataFrame(found, columns=SCAN_COLUMNS)
    scans["label"] = [classes.index(naming[str(label)]) for label in scans["label"]]
    called = p.center_names or {name: name for name in (CENTERS if of_release else ())}
    scans["center"] = scans["center"].map(lambda name: called.get(name, name))
    first = {"center": called.values(), "modality": ()}  # others follow in order of appearance
    order = {of: list(dict.fromkeys([*names, *scans[of]])) for of, names in first.items()}
    places = {"key": lambda names: names.map(order[names.name].index), "ignore_index": True}
    return scans.sort_values(["modality", "center"], **places).astype({"label": int})


def _disagreements(cohort: Cohort) -> list[tuple[str, str, str, str]]:
    """A warning for each patient whose scans differ in class or center."""
    scans, problems = cohort.scans, []
    differ = scans.groupby("patient_id")[["label", "center"]].transform("nunique").max(axis="columns") > 1
    for patient, part in scans[differ].groupby("patient_id", sort=False):
        rows = [f"{s.modality} {s.case_id}: {s.center}, {cohort.classes[s.label]}" for s in part.itertuples()]
        text = f"scans with different labels or centers: {'; '.join(rows)}"
        problems.append(("warning", f"patient {patient}", text, "correct the table if this is a mistake"))
    return problems


def open_cohort(p: Params) -> Cohort:
    """The labeled scans of a profile's cohort and `modalities`; cubes are not loaded.

    Writes the phantom first if it does not exist. Raises CohortError as `read` does, and if a modality has
    no scan.
    """
    root = p.cohort_root
    if p.data == "phantom" and not root.exists():
        from ipmn_core import phantom

        options = {"max_per_cell": p.phantom_max_per_cell, "shortcut": p.phantom_shortcut}
        phantom.write(root, seed=p.phantom_seed, shift=p.phantom_shift, jobs=p.jobs, **options)
    if not root.exists():
        remedy = "set `data` to a manifest, the folder of the real data set (`ipmn fetch`), or phantom"
        raise CohortError(root, "no such file or folder", remedy)
    cohort = read(root, p)
    found, modalities = cohort.scans["modality"].unique(), single(p.modalities)
    if missing := [m for m in modalities if m not in found]:
        text = f"no labeled scan of {' and '.join(missing)}; found: {' and '.join(found) or 'none'}"
        raise CohortError(root, text, f"set `modalities: [{', '.join(found)}]`")
    return cohort.where(cohort.scans["modality"].isin(modalities))


def paired(cohort: Cohort, where: object = "", told: list | None = None) -> Cohort:
    """The patients with a scan of every modality: one scan each, in the same order in all modalities.

    The first scan of a modality is used. Patients whose scans differ in class or center are left out. Both
    choices are added to the problems `told`. Raises CohortError if no patient is left.
    """
    scans, told = cohort.scans, [] if told is None else told
    first = scans.drop_duplicates(["modality", "patient_id"])
    count = first.groupby("patient_id")[["modality", "label", "center"]].nunique()
    every = count.index[count["modality"] == scans["modality"].nunique()]
    agree = every[(count.loc[every, ["label", "center"]] == 1).all(axis="columns")]
    kept = first[first["patient_id"].isin(agree)]
    if kept.empty:
        every = " and ".join(scans["modality"].unique())
        text = f"no patient with a scan of {every} that agree in class and center"
        raise CohortError(where, text, "see that `patient_id` joins the scans, or set `paired: false`")
    if others := sorted(set(every) - set(agree)):
        text = f"left out of the paired cohort because their scans differ: {', '.join(others)}"
        told.append(("warning", where, text, "correct the table if this is a mistake"))
    if len(first) < len(scans):
        again = scans.loc[~scans.index.isin(first.index), "case_id"]
        text = f"further scans of a patient, not used in the paired cohort: {', '.join(again)}"
        told.append(("note", where, text, "none needed: the first of each modality is used"))
    order = np.lexsort([pd.factorize(kept[key])[0] for key in ("patient_id", "modality")])  # last key first
    return replace(cohort, scans=kept.iloc[order].reset_index(drop=True))


def read(root, p: Params | None = None) -> Cohort:
    """The cohort at `root`; raises CohortError with the errors of `inspect`, at most ten."""
    cohort, problems = inspect(root, p)
    errors = problems[problems["severity"] == "error"]
    if errors.empty:
        return cohort
    first = [f"{row.where}: {row.problem}: {row.remedy}" for row in errors.head(10).itertuples()]
    title = f"{len(errors)} error(s) in this cohort; `ipmn check {root}` lists all, these are the first"
    raise CohortError(root, "\n  ".join([title, *first]))


def load_cohort(p: Params) -> Cohort:
    """The scans that a profile trains on: its cohort, cut to `max_per_cell`, with cubes from the cache.

    The cohort's key covers the contents of its files. For a phantom it covers the recipe instead, because
    the last bits of its voxels depend on the processor. Raises CohortError, or ScanError naming the first
    case that cannot be used.
    """
    cohort = subset(open_cohort(p), p.max_per_cell)
    cubes, key = load_cubes(cohort.scans, p.preprocessing, p.folder.parent / "cache", p.jobs)
    if p.data == "phantom":
        key = json.dumps([RECIPE, asdict(p.preprocessing), p.phantom_root.name])
    rows = cohort.scans.drop(columns=["image", "mask"]).to_csv(index=False)
    key = hashlib.sha256((key + rows + json.dumps(cohort.classes)).encode()).hexdigest()
    return replace(cohort, cubes=cubes, key=key)


def subset(cohort: Cohort, max_per_cell: int | None) -> Cohort:
    """The first `max_per_cell` scans of each modality, center and class, in the table's order (None: all)."""
    if max_per_cell is None:
        return cohort
    return cohort.where(cohort.scans.groupby(["modality", "center", "label"]).cumcount() < max_per_cell)


def table1(cohort: Cohort) -> pd.DataFrame:
    """Table 1, scans per center and modality: `center, modality`, one column per class, `total`."""
    scans = cohort.scans
    counts = pd.crosstab([scans["center"], scans["modality"]], scans["label"])
    counts = counts.reindex(columns=range(len(cohort.classes)), fill_value=0)
    counts.columns = [name.replace(" ", "_") for name in cohort.classes]
    counts["total"] = counts.sum(axis="columns")
    names = {key: scans[key].unique() for key in ("center", "modality")}
    present = [(c, m) for c in names["center"] for m in names["modality"] if (c, m) in counts.index]
    return counts.loc[present].reset_index()


def read_truth(p: Params) -> pd.DataFrame:
    """The phantom's `truth.csv`, one row per patient: findings, true probabilities; empty for real data."""
    root = p.cohort_root
    path = (root if root.is_dir() else root.parent) / "truth.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()
