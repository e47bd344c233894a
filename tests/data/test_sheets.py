"""The one table of a workbook or CSV file, and what is said of the choices."""

import openpyxl
import pytest

from ipmn_core.data.sheets import CohortError, column, read_table, text

WANTED = ("name", "risk")
HEADER, ROWS = ("Name", "Risk"), [("a_1", 0), ("b_2", 2)]


def workbook(path, **sheets):
    """A workbook of worksheets by title, each its rows, and what saves it and gives its path."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    return book, lambda: (book.save(path), path)[1]


def read(path, patterns=WANTED):
    problems = []
    table = read_table(path, patterns, problems)
    assert all(len(problem) == 4 and all(problem) for problem in problems)
    return table, [" | ".join(map(str, problem)) for problem in problems]


def refused(path, *parts, patterns=WANTED):
    with pytest.raises(CohortError) as error:
        read_table(path, patterns, [])
    for part in (path.name, *parts):
        assert part in str(error.value)


# Workbooks


def test_a_workbook_of_one_worksheet_is_read_without_a_word(tmp_path):
    _, save = workbook(tmp_path / "a.xlsx", Sheet1=[HEADER, *ROWS, (None, None)])
    table, said = read(save())
    assert table == ("a.xlsx", HEADER, [(2, ("a_1", 0)), (3, ("b_2", 2))], frozenset()) and not said


@pytest.mark.parametrize("state", ["hidden", "veryHidden"])
def test_a_hidden_worksheet_is_never_read_and_named(tmp_path, state):
    old = [HEADER, ("a_1", 1), ("b_2", 1)]
    book, save = workbook(tmp_path / "a.xlsx", old=old, final=[HEADER, *ROWS])
    book["old"].sheet_state = state
    table, (said,) = read(save())
    assert [cells[1] for _, cells in table.rows] == [0, 2] and "'final'" in table.where
    assert said.startswith("note") and "'final' is read" in said and "'old' (hidden)" in said
    book["old"].sheet_state, book["final"].sheet_state = "visible", state
    assert read(save())[0].rows[0][1] == ("a_1", 1)


def test_two_worksheets_that_fit_and_none_that_fits_are_refused_by_name(tmp_path):
    book, save = workbook(tmp_path / "a.xlsx", May=[HEADER, *ROWS], June=[HEADER, *ROWS], Notes=[("x",)])
    refused(save(), "'May' and 'June'", "hide")
    book["May"].sheet_state = book["June"].sheet_state = "hidden"
    refused(save(), "'May' (hidden)", "'June' (hidden)", "'Notes': ['x']", "show it")


@pytest.mark.parametrize(
    ("sheets", "header", "first", "parts"),
    [
        ({"README": [("See",)], "Data": [HEADER, *ROWS]}, HEADER, 2, ["'Data' is read; not read: 'README'"]),
        ({"A": [("Risk of IPMN by patient name",), (), HEADER, *ROWS]}, HEADER, 4, ["note", "row 3"]),
        ({"A": [("x", None), *ROWS]}, ("x", ""), 2, []),  # without the headers row 1 is the header
    ],
)
def test_the_headers_are_found_on_any_worksheet_below_any_title(tmp_path, sheets, header, first, parts):
    table, said = read(workbook(tmp_path / "a.xlsx", **sheets)[1]())
    assert table.header == header and table.rows == [(first, ROWS[0]), (first + 1, ROWS[1])]
    assert len(said) == bool(parts) and all(part in said[0] for part in parts)


@pytest.mark.parametrize("how", ["by hand", "by a filter"])
def test_hidden_rows_are_read_with_a_warning_that_lists_them(tmp_path, how):
    book, save = workbook(tmp_path / "a.xlsx", Sheet1=[HEADER, *ROWS, ("c_3", 1)])
    sheet = book["Sheet1"]
    for row in (3, 4, 9):  # row 9 is empty
        sheet.row_dimensions[row].hidden = True
    if how == "by a filter":
        sheet.auto_filter.ref = "A1:B4"
        sheet.auto_filter.add_filter_column(1, ["0"])
    table, (said,) = read(save())
    assert [number for number, _ in table.rows] == [2, 3, 4]
    assert said.startswith("warning | a.xlsx") and "2 hidden" in said and "3, 4 |" in said


def test_a_visible_column_comes_before_a_hidden_one_and_both_are_said(tmp_path):
    book, save = workbook(tmp_path / "a.xlsx", Sheet1=[("Name", "Risk", "x", "New risk"), ("a_1", 0, 5, 2)])
    table, _ = read(save())
    with pytest.raises(CohortError, match=r"a.xlsx: the label may be in 'Risk' or 'New risk'"):
        column(table, "risk", "label", [])
    columns = book["Sheet1"].column_dimensions
    columns["B"].hidden = True
    problems = []
    assert column(read(save())[0], "risk", "label", problems) == 3
    assert "column 4, 'New risk'; other headers that fit: ['Risk']" in problems[0][2]
    book["Sheet1"]["D1"] = "y"  # the hidden one is the only one
    assert column(read(save())[0], "risk", "label", problems) == 1
    assert problems[1][0] == "warning" and "column 2, 'Risk' (hidden)" in problems[1][2]


def test_a_cell_as_text_has_no_decimal_point_that_nobody_typed():
    cells = [1, 1.0, 1.5, " 1 ", "1.0", "007", None, True, ""]
    assert list(map(text, cells)) == ["1", "1", "1.5", "1", "1.0", "007", "", "True", ""]


def test_a_file_that_is_no_workbook_or_is_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"no workbook")
    for name in ("a.xlsx", "nowhere.xlsx", "nowhere.csv"):
        refused(tmp_path / name, "cannot be read")


# CSV


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_of_a_csv_file_are_its_text(tmp_path, separator, encoding, end):
    rows = [("Name", "Risk", "Center"), ("007", "NA", "Köln"), ("2024-01-02", "1e5", '"a, b; c"')]
    rows.append(("x", "", ""))
    content = end.join(separator.join(row) for row in rows) + end
    (tmp_path / "a.csv").write_bytes(content.encode(encoding))
    table, said = read(tmp_path / "a.csv")
    assert table.header == rows[0] and not said
    assert [cells for _, cells in table.rows] == [rows[1], ("2024-01-02", "1e5", "a, b; c"), rows[3]]


def test_blank_and_short_rows_of_a_csv_file_keep_their_numbers(tmp_path):
    (tmp_path / "a.csv").write_text('Table 1\nName,Risk\n\na_1\n"b\n2",2\n')
    table, (said,) = read(tmp_path / "a.csv")
    assert table.rows == [(4, ("a_1", None)), (5, ("b\n2", "2"))] and "the header is row 2" in said


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("Name,Risk\na_1,1,Köln\n".encode(), ["row 2", "more cells than the header's 2", "quote"]),
        (b'Name,Risk\n"a_1,1\n', ["cannot be read"]),
        ("Name,Risk\nKöln,1\n".encode("cp1252"), ["UTF-8"]),
        ("Name,Risk\n".encode("utf-16"), ["UTF-8"]),
    ],
)
def test_a_csv_file_that_is_not_what_it_seems_is_refused(tmp_path, content, parts):
    (tmp_path / "a.csv").write_bytes(content)
    refused(tmp_path / "a.csv", *parts)
    (tmp_path / "a.csv").write_bytes(b"")
    assert read(tmp_path / "a.csv")[0] == ("a.csv", (), [], frozenset())
