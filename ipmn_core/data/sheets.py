"""Read one table from a workbook or a CSV file and report what had to be chosen.

In a workbook only visible worksheets count, and a visible column is preferred to a hidden one. Hidden rows
are read, because the paper's code reads them and a filter is easily forgotten; a warning lists them.
"""

import csv
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

NA = ("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "null", "none")  # cells that mean "missing"
HEADER_ROWS = 10  # the header must be in the first ten rows


class CohortError(ValueError):
    """A cohort that cannot be used, raised with where, problem and remedy."""

    def __str__(self):
        return ": ".join(map(str, self.args))


class Table(NamedTuple):
    """A table: its file (and worksheet), header, rows as (row number in the file, cells), hidden columns."""

    where: str
    header: tuple[str, ...]
    rows: list[tuple[int, tuple]]
    hidden: frozenset[int] = frozenset()


class _Sheet(NamedTuple):
    title: str
    rows: list[tuple]
    visible: bool = True
    hidden_rows: frozenset[int] = frozenset()
    hidden_columns: frozenset[int] = frozenset()


def read_table(path, patterns, problems) -> Table:
    """The table of a workbook or CSV file whose header has one column per pattern.

    Patterns are matched to headers in lower case. Cells of a CSV file are text, those of a workbook are what
    Excel stores (`text` converts them); blank rows are left out. Choices are appended to `problems` as
    (severity, where, problem, remedy). Raises CohortError for a file that cannot be read or is unclear.
    """
    path = Path(path)
    try:
        is_csv = path.suffix.lower() in (".csv", ".tsv", ".txt")
        sheets = [_Sheet("", _csv_rows(path, patterns))] if is_csv else _worksheets(path)
    except UnicodeDecodeError as error:
        raise CohortError(path, "is not UTF-8 text", "save it as CSV UTF-8") from error
    except Exception as error:  # zip, XML and cells of a damaged workbook raise many kinds
        raise CohortError(path, f"cannot be read ({error})", "save or download the sheet again") from error
    sheet = _choose(path, sheets, patterns, problems)
    where = f"{path.name}, worksheet {sheet.title!r}," if len(sheets) > 1 else path.name
    start = _header_row(sheet.rows, patterns) or 0
    header, *rows = sheet.rows[start:] or [()]
    if start:
        problems.append(("note", where, f"the header is row {start + 1}", "none needed if it is"))
    rows = [(n, cells) for n, cells in enumerate(rows, start + 2) if any(map(text, cells))]
    for number, cells in rows:
        if any(map(text, cells[len(header) :])):
            problem = f"has more cells than the header's {len(header)}"
            raise CohortError(f"{where} row {number}", problem, "quote a cell that holds the separator")
    if hidden := [n for n, _ in rows if n in sheet.hidden_rows]:
        remedy = "show them, and delete those that are not part of the cohort"
        which = f"{len(hidden)} hidden or filtered rows are read: {', '.join(map(str, hidden))}"
        problems.append(("warning", where, which, remedy))
    width = len(header)
    rows = [(n, tuple(cells[:width]) + (None,) * (width - len(cells))) for n, cells in rows]
    return Table(where, tuple(map(text, header)), rows, sheet.hidden_columns)


def column(table, pattern, what, problems, fallback=None):
    """The index of the only column whose header matches `pattern`, or of the only visible one.

    With no such column: `fallback`, or CohortError with the headers.
    """
    found = matching = [i for i, header in enumerate(table.header) if re.search(pattern, _words(header))]
    if len(found) != 1:
        found = [i for i in found if i not in table.hidden]
    if len(found) != 1 and fallback is not None and fallback in (matching or [fallback]):
        found = [fallback]
    if len(found) != 1:
        which = " or ".join(repr(table.header[i]) for i in matching) or "none"
        text = f"the {what} may be in {which} of the headers {list(table.header)}"
        raise CohortError(table.where, text, "rename the headers")
    chosen, others = found[0], [table.header[i] for i in matching if i != found[0]]
    if found != matching or chosen in table.hidden:
        name = repr(table.header[chosen]) + (" (hidden)" if chosen in table.hidden else "")
        problem = (
            f"the {what} is read from column {chosen + 1}, {name}; other headers that fit: {others or 'none'}"
        )
        problems.append(("warning", table.where, problem, "rename the headers if this is wrong"))
    return chosen


def text(cell) -> str:
    """A cell as text without outer blanks: "" for an empty cell, "1" for the 1.0 that Excel stores."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell).strip()


def is_blank(cell) -> bool:
    """Whether a cell is empty or means "missing"."""
    return text(cell).casefold() in NA


def _words(header):
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", header).lower()  # PatientID: two words


def _header_row(rows, patterns):
    """The index of the first of the top rows with one column per pattern, or None."""
    for i, row in enumerate(rows[:HEADER_ROWS]):
        fits = [[bool(re.search(p, _words(cell))) for p in patterns] for cell in map(text, row) if cell]
        if sum(map(any, fits)) >= len(patterns) and all(map(any, zip(*fits, strict=True))):
            return i
    return None


def _choose(path, sheets, patterns, problems):
    """The one visible worksheet with the right header, or the only worksheet."""
    fitting = [s for s in sheets if s.visible and _header_row(s.rows, patterns) is not None]
    if len(fitting) > 1:
        names = " and ".join(repr(s.title) for s in fitting)
        remedy = "keep one, or hide the others"
        raise CohortError(path, f"the worksheets {names} both have the headers of the table", remedy)
    if len(sheets) == 1:
        return sheets[0]
    titles = [(s, repr(s.title) + ("" if s.visible else " (hidden)")) for s in sheets]
    if not fitting:
        named = "; ".join(f"{title}: {[*map(text, (s.rows or [()])[0])]}" for s, title in titles)
        remedy = "name the headers of the right worksheet, and show it"
        raise CohortError(path, f"no visible worksheet has the headers of the table: {named}", remedy)
    others = ", ".join(title for s, title in titles if s is not fitting[0])
    problem = f"the worksheet {fitting[0].title!r} is read; not read: {others}"
    problems.append(("note", path, problem, "none needed if this is the right one"))
    return fitting[0]


def _worksheets(path):
    """The worksheets of a workbook; a formula is its last value or, if never computed, its text.

    `pandas.read_excel` reads uncomputed formulas and errors such as #REF! as blank cells.
    """
    import openpyxl

    def load(data_only):
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about drawings and validation rules, which are not read
            return openpyxl.load_workbook(file, data_only=data_only, keep_links=False).worksheets

    sheets = []
    for computed, typed in zip(load(data_only=True), load(data_only=False), strict=True):
        pairs = zip(computed.values, typed.values, strict=True)
        rows = [tuple(t if c is None else c for c, t in zip(*pair, strict=True)) for pair in pairs]
        hidden = {n for n, row in typed.row_dimensions.items() if row.hidden}
        groups = [d for d in typed.column_dimensions.values() if d.hidden]
        columns = {i - 1 for d in groups for i in range(d.min, d.max + 1)}
        visible = typed.sheet_state == "visible"
        sheets.append(_Sheet(typed.title, rows, visible, frozenset(hidden), frozenset(columns)))
    return sheets


def _csv_rows(path, patterns):
    """The rows of a CSV file; the separator (comma, semicolon, tab) is the one that fits the header."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        content = file.read()
    top = content.splitlines()[:HEADER_ROWS] or [""]
    cells = {d: [[cell.strip(' "') for cell in line.split(d)] for line in top] for d in ",;\t"}
    fitting = {d: _header_row(cells[d], patterns) for d in cells if patterns}
    fitting = {d: row for d, row in fitting.items() if row is not None}
    delimiter = min(fitting or cells, key=lambda d: (fitting.get(d, 0), -len(cells[d][0])))
    return list(map(tuple, csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)))
