"""Tables 1-3 of the paper as CSV, Markdown and LaTeX, with and without the paper's numbers."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pandas as pd

from ipmn_core import data, disk
from ipmn_core.names import display_name

KEYS = {1: ["center", "modality"], 2: ["model", "modality"], 3: ["center", "method", "modality"]}
NUMBERS = ["acc_mean", "acc_std", "auc_mean", "auc_std"]
COMPLEXITY = {"macs_g": "MACs (G)", "params_m": "Params (M)"}
UNDEFINED = "n/a"
FOLDER = Path(__file__).parents[1] / "paper"
PAPER = "_paper"  # suffix of the paper's columns


def paper(n: int) -> pd.DataFrame:
    """The paper's table `n` (1: counts, 2: percent, 3: fractions), with the columns of our table."""
    return pd.read_csv(FOLDER / f"table{n}.csv")


table1 = data.table1


def complexity(counted: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """MACs (10^9) and parameters (10^6) of each model as printed text, ours and the paper's."""
    theirs = paper(2).groupby("model").first()
    printed = pd.DataFrame({"Model": [display_name(name) for name in counted]})
    for i, (column, heading) in enumerate(COMPLEXITY.items()):
        printed[heading] = [f"{numbers[i]:.2f}" for numbers in counted.values()]
        printed[f"{heading} (paper)"] = _fixed(theirs[column].reindex(list(counted)), 2).to_numpy()
    return printed


def table2(summary: pd.DataFrame, complexity: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """The benchmark of all classes in percent, rounded to 2 decimals, in the paper's row order.

    Columns model, macs_g, params_m, modality, acc_mean, acc_std, auc_mean, auc_std. `summary` comes from
    `metrics.over_folds` (only its global multiclass rows are used). `complexity` gives each model's MACs
    (10^9) and parameters (10^6). Raises KeyError naming a model without them.
    """
    rows = summary[(summary["task"] == "multiclass") & (summary["center"] == "global")]
    table = rows.rename(columns={"arm": "model"}).assign(
        macs_g=[round(complexity[model][0], 2) for model in rows["arm"]],
        params_m=[round(complexity[model][1], 2) for model in rows["arm"]],
        **(100 * rows[NUMBERS]).round(2),
    )
    return _in_order(table[["model", "macs_g", "params_m", "modality", *NUMBERS]], 2)


def table3(summary: pd.DataFrame) -> pd.DataFrame:
    """The binary task by center and globally, in fractions of 4 decimals, in the paper's row order.

    Columns center, method, modality, acc_mean, acc_std, auc_mean, auc_std. `summary` comes from
    `metrics.over_folds` (only its binary rows are used). `local_only` is left out: the paper lacks it.
    """
    table = summary[(summary["task"] == "binary") & (summary["arm"] != "local_only")]
    table = table.rename(columns={"arm": "method"})
    return _in_order(table[[*KEYS[3], *NUMBERS]].round(4), 3)


def _in_order(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """The rows of `table` sorted by its keys: the paper's names in its order, then others as they appear.

    If some centers are not the paper's, all centers stay as they appear, with "global" last.
    """
    for key in reversed(KEYS[n]):
        theirs, ours = (list(dict.fromkeys(one[key])) for one in (paper(n), table))
        if key == "center" and not set(ours) <= set(theirs):
            theirs = sorted(ours, key=lambda name: name == "global")
        order = {name: place for place, name in enumerate(dict.fromkeys([*theirs, *ours]))}
        table = table.sort_values(key, key=lambda names, order=order: names.map(order), kind="stable")
    return table.reset_index(drop=True)


def beside_paper(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """Table `n` with the paper's numbers in columns with the suffix `_paper`.

    A row that one side lacks is NaN there. Names are in the paper's order, then others.
    """
    ours, theirs = table.set_index(KEYS[n]), paper(n).set_index(KEYS[n])
    both = _in_order(ours.join(theirs[list(ours)].add_suffix(PAPER), how="outer").reset_index(), n)
    return both.astype({column: "Int64" for column in both if n == 1 and column not in KEYS[1]})


def as_printed(table: pd.DataFrame) -> pd.DataFrame:
    """Table 1, 2 or 3 as text, with one row per center, model, or center and method.

    Modalities are side by side; "58.69 ± 4.28" is mean ± standard deviation; an undefined number is "n/a".
    With the paper's columns (see `beside_paper`) the paper's cell follows each cell.
    """
    keys = [key for key in ("center", "model", "method") if key in table]
    sides = {"": ""} | ({PAPER: " (paper)"} if any(name.endswith(PAPER) for name in table) else {})
    counts = [name for name in table if "total" in table and name not in KEYS[1] and PAPER not in name]
    printed = table[keys].drop_duplicates().set_index(keys)
    if "model" in table:
        per_model = table.groupby("model").first()  # MACs and parameters are the same for both modalities
        for (column, heading), (side, whose) in product(COMPLEXITY.items(), sides.items()):
            printed[heading + whose] = _fixed(per_model[column + side], 2)
    for modality in sorted(table["modality"].unique()):
        rows = table[table["modality"] == modality].set_index(keys)
        for name, (side, whose) in product(counts or ("acc", "auc"), sides.items()):
            if counts:
                heading, text = name.replace("_", " "), _fixed(rows[name + side], 0)
            else:  # table 2 is in percent, table 3 in fractions
                heading, text = name.upper(), _mean_std(rows, name, side, 2 if "model" in table else 4)
            printed[f"{display_name(modality)} {heading}{whose}"] = text
    printed = printed.fillna(UNDEFINED).reset_index()
    names = {key: printed[key].map(display_name) for key in keys}
    return printed.assign(**names).rename(columns={key: key.capitalize() for key in keys})


def _fixed(numbers: pd.Series, digits: int) -> pd.Series:
    """Numbers as text with `digits` decimals, "n/a" for NaN."""
    return numbers.map(lambda number: UNDEFINED if pd.isna(number) else f"{number:.{digits}f}")


def _mean_std(rows: pd.DataFrame, metric: str, side: str, digits: int) -> pd.Series:
    """Mean ± standard deviation as text, "n/a" where the mean is undefined."""
    mean, std = (_fixed(rows[f"{metric}_{name}{side}"], digits) for name in ("mean", "std"))
    return (mean + " ± " + std).where(mean != UNDEFINED, UNDEFINED)


def write(table: pd.DataFrame, n: int, folder, is_paper: bool) -> pd.DataFrame:
    """Write table `n`, and for the paper's cohort also `table<n>_beside_paper`; return the last as text.

    Each as .csv (machine columns), .md and .tex (as text); an undefined number is "n/a" in all three.
    """
    written = {f"table{n}": table}
    if is_paper:
        written[f"table{n}_beside_paper"] = beside_paper(table, n)
    for stem, one in written.items():
        printed = as_printed(save(one, stem, folder))
        # numbers are strings: without disable_numparse 1.30 becomes 1.3
        markdown = printed.to_markdown(index=False, disable_numparse=True) + "\n"
        for suffix, text in (("md", markdown), ("tex", _latex(printed))):
            with disk.atomic(Path(folder) / f"{stem}.{suffix}") as tmp:
                tmp.write_text(text, encoding="utf-8")
    return printed


def save(table: pd.DataFrame, stem: str, folder) -> pd.DataFrame:
    """Write a table as `<stem>.csv`, with "n/a" for undefined numbers, and return it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with disk.atomic(Path(folder) / f"{stem}.csv") as tmp:
        table.to_csv(tmp, index=False, na_rep=UNDEFINED)
    return table


def _latex(printed: pd.DataFrame) -> str:
    """A booktabs tabular in plain ASCII, which any pdflatex accepts."""
    layout = "".join("l" if name in ("Center", "Model", "Method") else "r" for name in printed)
    style = printed.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    tabular = style.to_latex(hrules=True, column_format=layout)
    return "% needs \\usepackage{booktabs}\n" + tabular.replace("±", r"$\pm$").replace("μ", r"$\mu$")
