"""Read the real data set, in any of its three layouts, into one table with one row per labeled scan.

    first    IPMN_labels_t{1,2}_total.xlsx    t{1,2}_clean_ROI/NAME.nii.gz
    second   IPMN_labels_total.xlsx           IPMN_images_masks/t{1,2}/{images,masks}/NAME.nii.gz
    third    IPMN_Classification/ with the sheets of both and t{1,2}/NAME.nii.gz, scaled ROI;
             IPMN_images_masks/ as in the second; data splits/classification/{2,3}-class/t{1,2}.csv

The table has the columns `SCAN_COLUMNS`, T1 rows first, in sheet order. `mask` is "" for an image that is
already masked and cropped. Any part of the third layout is enough; images with masks are preferred to ROIs.
"""

import re
from collections import defaultdict
from contextlib import contextmanager
from itertools import product

import pandas as pd

from ipmn_core.data.sheets import CohortError, column, is_blank, read_table
from ipmn_core.data.sheets import text as as_text
from ipmn_core.names import CENTERS, MODALITIES

SCAN_COLUMNS = ["case_id", "patient_id", "center", "modality", "label"]
SCAN_COLUMNS += ["fold_multiclass", "fold_binary", "image", "mask"]
FOLD = "(?i)fold|split|test|val|train"  # in the header of a column of folds
LABELS = ("0", "1", "2")
SPLITS = {"multiclass": ("3-class", 5), "binary": ("2-class", 4)}  # the release's folder and number of folds

# Words in a scan's name that give its center; CAD scans come from Mayo Clinic Florida.
CENTER_WORDS = {center.lower(): center for center in CENTERS} | {"cad": "MCF", "northwestern": "NU"}

# Release -> label sheet -> {field: pattern of its header}.
NAME, T1, T2 = r"(?<![a-z])(patient|id|name|case)(?![a-z])", r"(?<![a-z])t1(?!\d)", r"(?<![a-z])t2(?!\d)"
FIRST = {f"IPMN_labels_{m}_total.xlsx": {m: NAME, "label": "risk"} for m in MODALITIES}
SECOND = {"IPMN_labels_total.xlsx": {"t1": T1, "t2": T2, "label": "risk"}}
THIRD = {f"IPMN_Classification/{sheet}": wanted for sheet, wanted in (FIRST | SECOND).items()}
SHEETS = {"first": FIRST, "second": SECOND, "third": THIRD}
# Release -> modality -> its parts, the preferred one first: folders of images and masks, or of ROIs.
VOLUMES = {m: [f"IPMN_images_masks/{m}/images", f"IPMN_images_masks/{m}/masks"] for m in MODALITIES}
PARTS = {
    "first": {m: [[f"{m}_clean_ROI"]] for m in MODALITIES},
    "second": {m: [VOLUMES[m]] for m in MODALITIES},
    "third": {m: [VOLUMES[m], [f"IPMN_Classification/{m}"]] for m in MODALITIES},
}


def case_name(raw):
    """The name of a case: a cell or a file name without .nii, .nii.gz and nnU-Net's trailing _0000."""
    return re.sub(r"(_0000)?(\.nii(\.gz)?)?$", "", str(raw).strip(), flags=re.IGNORECASE).strip()


def read_release(root, problems, cohort="all"):
    """Usable scans of the release in `root`, dicts with `SCAN_COLUMNS`, and {modality: unlabeled scans}.

    `cohort="histology"` leaves out scans whose follow-up information contains "no change", as the authors'
    code does. `fold_multiclass` and `fold_binary` are the release's own folds, "" if a scan has none or
    several. Problems are appended to `problems` as (severity, where, problem, remedy).
    """
    scans, unlabelled = [], dict.fromkeys(MODALITIES, 0)
    with _noting_errors(problems):
        release = _release(root)
        here = [sheet for sheet in SHEETS[release] if (root / sheet).exists()]
        sheets = {sheet: _sheet_rows(root / sheet, SHEETS[release][sheet], problems) for sheet in here}
        left_out = _followed_up(root, sheets) if cohort == "histology" else set()
        for m, rows in _listed(release, sheets, problems).items():
            unlabelled[m] = sum(is_blank(scan["label"]) for same_name in rows.values() for scan in same_name)
            with _noting_errors(problems):
                found = _found_scans(root, release, m, rows, problems)
                used = [scan for scan in found if scan["case_id"].casefold() not in left_out]
                scans += used
                if len(used) < len(found):
                    text = f"{len(found) - len(used)} {m} scans are followed up without change and left out"
                    problems.append(("note", root, text, "none needed: `cohort` is histology"))
        for task, m in product(SPLITS, MODALITIES):
            _add_folds(root, task, m, [scan for scan in scans if scan["modality"] == m], problems)
        if not scans and not any(severity == "error" for severity, *_ in problems):
            raise CohortError(root, "no labeled scan has its files here", "download images")
    return scans, unlabelled


@contextmanager
def _noting_errors(problems, severity="error"):
    """End the block at a CohortError and append it to `problems`."""
    try:
        yield
    except CohortError as error:
        problems.append((severity, *error.args))


def _release(root):
    """The release in `root`: "first", "second" or "third"."""
    own = {"first": [*FIRST, "t1_clean_ROI", "t2_clean_ROI"], "second": SECOND}
    own["third"] = ["IPMN_Classification"]
    found = [release for release, names in own.items() if any((root / name).exists() for name in names)]
    if len(found) != 1 and root.resolve().name in ("IPMN_Classification", "IPMN_images_masks"):
        raise CohortError(root, "is a part of a release", "give the folder above it")
    if len(found) != 1:
        text = f"has parts of two releases, {' and '.join(found)}" if found else "has no label sheets"
        parts = ", ".join(f"{next(iter(names))} ({release} release)" for release, names in own.items())
        remedy = f"give the folder that holds one of {parts}, each release in its own; or a manifest"
        raise CohortError(root, text, remedy)
    return found[0]


# Label sheets


def _sheet_rows(path, wanted, problems):
    """The rows of a label sheet: where, names {modality: name}, label, follow-up (None if not a column)."""
    table, places = read_table(path, wanted.values(), problems), {}
    authors = (0, 5) if len(wanted) == 2 else (0, 1, 6)  # the columns that the authors' code reads
    for (field, pattern), i in zip(wanted.items(), authors, strict=True):
        cells = [cells[i] for _, cells in table.rows if i < len(cells) and not is_blank(cells[i])]
        fits = cells and all(_label(c) in LABELS if field == "label" else _centers(as_text(c)) for c in cells)
        fallback = i if fits and path.parent.name == "IPMN_Classification" else None
        what = "label" if field == "label" else f"{field} name"
        places[field] = column(table, pattern, what, problems, fallback)
    follow = [i for i, header in enumerate(table.header) if re.search("(?i)follow.?up", header)]
    rows = []
    for number, cells in table.rows:
        names = {m: case_name(as_text(cells[i])) for m, i in places.items() if not is_blank(cells[i])}
        names.pop("label", None)
        label, where = cells[places["label"]], f"{table.where} row {number}"
        if not names and not is_blank(label):
            names = {next(iter(wanted)): ""}
        follow_up = " ".join(as_text(cells[i]) for i in follow) if follow else None
        rows.append({"where": where, "names": names, "label": label, "follow-up": follow_up})
    return rows


def _listed(release, sheets, problems):
    """{modality: {name in lower case: its scans}}, from the modality's own sheet or else the shared one.

    The sheet of both modalities says which scans belong to one patient; without it, the names say so.
    """
    total = next((sheet for sheet in sheets if sheet.endswith("IPMN_labels_total.xlsx")), None)
    listed, both = {m: defaultdict(list) for m in MODALITIES}, {}
    for row in sheets.get(total, []):
        patient = patient_name(*next(iter(row["names"].items()), ("", "")))
        for m, name in row["names"].items():
            both.setdefault((m, name.casefold()), (patient, row))
    for m in MODALITIES:
        sheet = next((s for s, wanted in SHEETS[release].items() if m in wanted and s in sheets), None)
        for row in [row for row in sheets.get(sheet, []) if m in row["names"]]:
            name, label = row["names"][m], _label(row["label"])
            patient, other = both.get((m, name.casefold()), (patient_name(m, name), row))
            scan = {"modality": m, "case_id": name, "patient_id": patient, "label": row["label"]}
            listed[m][name.casefold()].append(scan | {"where": row["where"]})
            if sheet != total and label != _label(other["label"]):
                text = f"{name} has the label {label!r}, but {_label(other['label'])!r} in {other['where']}"
                problems.append(("warning", row["where"], f"{text}: the first is used", "correct the other"))
    return listed


def _followed_up(root, sheets):
    """Lower-case names of the scans whose follow-up says "no change"; a missing cell counts as confirmed."""
    rows = [row for of_sheet in sheets.values() for row in of_sheet]
    if not any(row["follow-up"] is not None for row in rows):
        text = "no label sheet has a column follow-up information, which `cohort: histology` needs"
        raise CohortError(root, text, "add IPMN_labels_total.xlsx of today's release, or set `cohort: all`")
    rows = [row for row in rows if "no change" in (row["follow-up"] or "")]
    return {name.casefold() for row in rows for name in row["names"].values()}


def patient_name(modality, name):
    """A patient's name: the scan's name in lower case without its modality (CAD_28_T1: cad_28)."""
    bare = re.sub(rf"(?i)(?<![a-z])[\s_.-]*{re.escape(modality)}w?(?![a-z0-9])", "", name)
    return (bare.strip(" _.-") or name).casefold()


def _centers(name):
    return {CENTER_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in CENTER_WORDS}


def _label(cell):
    """A label as text: "" for none, "1" for 1, 1.0 and " 1.0 " (compared as text, because True == 1)."""
    return "" if is_blank(cell) else re.sub(r"(?<=^\d)\.0*$", "", as_text(cell))


# Files


def _found_scans(root, release, m, rows, problems):
    """The scans of one modality that have a label, a unique name and all their files."""
    parts = [[root / folder for folder in part] for part in PARTS[release][m]]
    index = {folder: files_by_case(folder) for part in parts for folder in part}
    begun = [part for part in parts if any(folder.is_dir() for folder in part)]
    n = sum(not is_blank(scan["label"]) for same_name in rows.values() for scan in same_name)
    if not begun:
        if n:
            names = " or ".join(str(part[0].relative_to(root)) for part in parts)
            remedy = f"none needed if you do not use {m}"
            problems.append(("note", root, f"{n} labeled {m} scans are left out: no folder {names}", remedy))
        return []
    if not any(m in SHEETS[release][sheet] and (root / sheet).exists() for sheet in SHEETS[release]):
        names = " or ".join(sheet for sheet, wanted in SHEETS[release].items() if m in wanted)
        raise CohortError(root, f"no label sheet for the {m} scans", f"add {names}")
    folders = next((part for part in begun if all(index[folder] for folder in part)), begun[0])
    for folder in folders:
        if not folder.is_dir():
            raise CohortError(folder, "no such folder", "put the scans' images, or masks, there")
        strays = [folder / name for key, names in index[folder].items() if key not in rows for name in names]
        remedy = "none needed if it is not part of the cohort; otherwise add a row"
        problems += [("warning", path, "no row in the label sheet", remedy) for path in strays]
    scans, missing = [], []
    for key, same_name in rows.items():
        with _noting_errors(problems):
            scan = _checked_scan(same_name)
            if scan and release == "third" and not any(key in index[folder] for folder in folders):
                missing.append(scan["case_id"])
            elif scan:
                paths = [_file_of(scan, folder, index[folder].get(key, [])) for folder in folders]
                scans.append(scan | {"image": paths[0], "mask": "".join(paths[1:])})
    if missing:  # the first ten by name
        text = f"{len(missing)} of {n} labeled {m} scans have no file here: {', '.join(missing[:10])}"
        remedy = "none needed if you downloaded only a part; otherwise download them again"
        problems.append(("warning" if scans else "error", folders[0], text, remedy))
    if release == "third":
        used = " and ".join(str(folder.relative_to(root)) for folder in folders)
        others = [f", not from {part[0].relative_to(root)}" for part in begun if part is not folders]
        text = f"{len(scans)} {m} scans are read from {used}{''.join(others)}"
        problems.append(("note", root, text, "none needed: images with masks are preferred to ROIs"))
    return scans


def _checked_scan(rows):
    """The scan in the sheet rows of one name, with label and center; None without a label."""
    scan = rows[0]
    where, name, label = scan["where"], scan["case_id"], _label(scan["label"])
    if len(rows) > 1:
        wheres = " and ".join(row["where"] for row in rows)
        raise CohortError(wheres, f"both have the {scan['modality']} name {name!r}", "keep one row per scan")
    if not label:
        return None
    if label not in LABELS:
        text = f"the label {scan['label']!r} of {name} is not 0, 1 or 2"
        raise CohortError(where, text, "correct it, or clear it to leave the scan out")
    centers = _centers(name)
    if len(centers) != 1:
        found = " and ".join(sorted(centers)) or "no center"
        text = f"the name {name!r} gives {found}; known prefixes: {', '.join(CENTER_WORDS)}"
        raise CohortError(where, text, "rename the scan in the sheet and on disk")
    return scan | {"label": int(label), "center": centers.pop()}


def files_by_case(folder):
    """{case name in lower case: NIfTI file names} of a folder, without hidden files (._NAME of macOS)."""
    index = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if re.search(r"(?is)^[^.].*\.nii(\.gz)?$", path.name) and path.is_file():
            index[case_name(path.name).casefold()].append(path.name)
    return index


def _file_of(scan, folder, files):
    """The path of a scan's only file; names are looked up in the folder, never joined to a path."""
    name, kind = scan["case_id"], "mask" if folder.name == "masks" else "image"
    if len(files) != 1:
        found = f"{len(files)} {kind}s of {name!r} in {folder}: {', '.join(files)}"
        text = found if files else f"no {kind} of {name!r} in {folder}"
        remedy = f"keep one, {name}.nii.gz or {name}.nii; or clear the label to leave the scan out"
        raise CohortError(scan["where"], text, remedy)
    return str(folder / files[0])


# Official folds


def _add_folds(root, task, m, scans, problems):
    """Set the fold of one modality's scans in one task from the release's split file, "" without one."""
    (name, n_folds), folds = SPLITS[task], {}
    path = next(root.glob(f"data[ _-]splits/classification/{name}/{m}.csv"), None)
    if path and scans:
        with _noting_errors(problems, "warning"):
            folds = _split_file(path, read_table(path, (), problems), n_folds)
            of_scan = {scan["case_id"]: folds.get(scan["case_id"].casefold(), ()) for scan in scans}
            for few, text in ((True, "have no fold"), (False, "are in two folds")):
                names = [name for name, found in of_scan.items() if len(found) != 1 and few == (not found)]
                if names:
                    text = f"{len(names)} of {len(scans)} {m} scans {text}: {', '.join(names[:10])}"
                    remedy = "none needed unless `fold_rule` is official; then correct the file"
                    problems.append(("note" if few else "warning", path, text, remedy))
    for scan in scans:
        found = folds.get(scan["case_id"].casefold(), ())
        scan[f"fold_{task}"] = "".join(found) if len(found) == 1 else ""


def _split_file(path, table, n_folds):
    """{name in lower case: the folds in which it is tested}, found by the contents of the columns.

    Three forms are known: names and folds, with or without a column of train and test; names, and one column
    of train and test per fold; one column of names per fold. Raises CohortError for any other.
    """
    header = table.header
    text = f"it is unclear which columns hold cases and folds: {list(header)}"
    unclear = CohortError(path, text, "keep a column of names and one of folds, and name them so")
    if not table.rows or any(map(_is_case, header)):
        raise unclear
    cells = pd.DataFrame([map(as_text, row) for _, row in table.rows], columns=range(len(header)), dtype=str)
    cases = cells.map(lambda cell: case_name(re.split(r"[/\\]", cell)[-1]).casefold())
    named = [i for i in cells if 2 * cases[i].map(_is_case).sum() > (cases[i] != "").sum()]
    named = [i for i in named if not any(cases[i].equals(cases[j]) for j in named if j < i)]  # name and path
    filled = [i for i in cells if cells[i].any()]
    uses = [i for i in filled if cells[i].str.fullmatch("(?i)(train|val|test)[a-z]*|").all()]
    numbers = cells.apply(lambda column: column.str.extract(r"(?i)^(?:fold|split)?[ _-]*(\d+)(?:\.0*)?$")[0])
    whole = [i for i in filled if (numbers[i].notna() | (cells[i] == "")).all()]
    consecutive = [[*range(first, first + n_folds)] for first in (0, 1)]
    folds = [i for i in whole if re.search(FOLD, header[i])]
    folds = folds or [i for i in whole if [*sorted(numbers[i].dropna().astype(int).unique())] in consecutive]
    of_header = [" ".join(re.findall(r"\d+", head)) if re.search(FOLD, head) else "" for head in header]
    if len(named) == len(folds) == 1 and len(uses) < 2:
        long = pd.DataFrame({"name": cases[named[0]], "fold": numbers[folds[0]].fillna("")})
        long = long.assign(use=cells[uses[0]] if uses else "")[long["fold"] != ""]
    elif len(named) == 1:
        long = cells[uses].assign(name=cases[named[0]]).melt("name", var_name="fold", value_name="use")
        long["fold"] = long["fold"].map(of_header.__getitem__)
    else:
        long = cases[named].melt(var_name="column", value_name="name")
        long["use"], long["fold"] = (long["column"].map(of.__getitem__) for of in (header, of_header))
    if long.empty or not long["fold"].str.isdecimal().all():
        raise unclear
    use = long["use"].str.lower()
    test = next(word for word in ("test", "val", "") if use.str.contains(word).any())
    held = (long["name"] != "") & use.str.contains(test) & ~use.str.contains("train")
    return long[held].astype({"fold": int}).astype({"fold": str}).groupby("name")["fold"].agg(set).to_dict()


def _is_case(name):
    return bool(re.search(r"\d", name)) and len(_centers(name)) == 1
