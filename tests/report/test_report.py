import base64
import hashlib
import json
import re
import sys
from io import BytesIO
from pathlib import Path

import bs4
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.translators import PythonTranslator

from ipmn_core import params, pipeline, report, views
from ipmn_core.metrics import tables

ROOT = Path(__file__).parents[2]
VIEW = "application/vnd.jupyter.widget-view+json"
HOSTILE = "<script>alert(1)</script><img src=http://x.test/a.png>"
STYLED = '<style>#T_1 {color: red}</style><table id="T_1"><thead><tr><th>&nbsp;</th><th>auc</th></tr></thead>'
FRAME = (
    '<div><style scoped>.dataframe {}</style><table border="1" class="dataframe"><thead><tr><th></th>'
    "<th>center</th></tr></thead><tbody><tr><th>0</th><td>NYU</td></tr></tbody></table></div>"
)
EMPTY = "<table><thead><tr><th>reason</th></tr></thead><tbody></tbody></table>"
DATA = '<script type="application/json">{"a":"<b>"}</script>'
LIVE = f'<div class="ipmn-view" data-view="none"><p>frames</p>{DATA}</div>'
RECORD = {
    "settings": {"task": "binary", "arm": "fedavg", "device": "cpu", "bfloat16": False},
    "data": "3dc82393c319",
    "cohort": "phantom",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "monai": "1.6.1"},
    "device": "x86_64",
}
CHAPTERS = (
    [  # sources: a text is Markdown, a pair code with its outputs
        "# 1 · The cohort\n\nSee [the next](02_three_class_benchmark.ipynb), [this](../docs/federation.md), "
        "[OSF](https://osf.io/74vfs). ![x](http://x.test/b.png)\n\n## Same heading\n\n## Same heading",
        ("views.save(views.scanners(facts), 'scanners')", [{"image/png": 0, "text/plain": "<Figure>"}]),
        ("widgets.roi_viewer(scans)", [{VIEW: {"model_id": "a"}, "text/plain": "VBox()"}]),
        ("widgets.center_explorer(selected)", [{VIEW: {}, "text/html": LIVE, "text/plain": "VBox()"}]),
        ("bar", [{VIEW: {}, "text/plain": "  3%|3   | 1/30 [00:01<00:29]"}]),
    ],
    [
        "# 2 · Benchmark\n\n*Try it.* Double it.\n\n**Caveat: few.** Cases.\n\n## Same heading\n\n"
        f"$$\\ell(f, y) = -\\log p_y$$\n\nwith $\\mu < 1$.\n\n$${' + '.join('abcdefghijklmnopqrstuvwxyz')}$$",
        ("frame", [{"text/html": FRAME, "text/plain": "x"}]),
        ("left_out", [{"text/html": EMPTY}]),
        ("styled", [{"text/html": STYLED + "<tbody><tr><th>t1</th><td>0.5</td></tr></tbody></table>"}]),
        ("odd", [{"application/x-odd": "?"}]),
        ("nothing", [{}]),
    ],
    ["# 3 · Federation\n\n## Names", ("name", [{"text/plain": HOSTILE}]), ("print(name)", [HOSTILE])],
    ["# 4 · Review\n\n## Tables 2 & 3 <3", ("1 + 1", [{"text/plain": "2"}])],
)


def picture(seed):
    with BytesIO() as buffer:
        plt.imsave(buffer, np.random.default_rng(seed).random((6, 8)))
        return buffer.getvalue()


def output(content):
    """A stream of stdout for a text, else a result."""
    if isinstance(content, str):
        return new_output("stream", name="stdout", text=content)
    if "stderr" in content:
        return new_output("stream", name="stderr", text=content["stderr"])
    encoded = {"image/png": lambda seed: base64.b64encode(picture(seed)).decode() + "\n"}
    data = {kind: encoded.get(kind, lambda value: value)(value) for kind, value in content.items()}
    return new_output("execute_result", data=data, execution_count=1)


def chapter(p, sources, tags=()):
    """A notebook as papermill leaves it."""
    settings = "\n".join(f"{key} = {value!r}  # about {key}" for key, value in p.model_dump().items())
    cells = [
        new_code_cell(settings, metadata={"tags": ["parameters"]}),
        new_code_cell(settings + "\ninjected = 1", metadata={"tags": ["injected-parameters"]}),
    ]
    for source in sources:
        if isinstance(source, str):
            cells.insert(0 if source.startswith("# ") else len(cells), new_markdown_cell(source))
        else:
            code, outputs = source
            cells.append(new_code_cell(code, outputs=[*map(output, outputs)], metadata={"tags": [*tags]}))
    for cell in cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    papermill = {"parameters": p.model_dump(mode="json"), "end_time": "2025-01-02T03:04:05", "duration": 1.0}
    state = {"application/vnd.jupyter.widget-state+json": {"state": {"a": {"secret": "widget state"}}}}
    return new_notebook(cells=cells, metadata={"papermill": papermill, "widgets": state})


def profile(folder, chapters=CHAPTERS, **settings):
    """The settings of a profile that has run: notebooks, tables, two figures and a run below `folder`."""
    p = params.validate({"profile": "mine", "outputs": str(folder), **settings}, "test")
    for name in ("notebooks", "tables", "figures", "runs/binary/t2/fedavg/fold0"):
        (p.folder / name).mkdir(parents=True)
    for stem, sources in zip(pipeline.NOTEBOOKS, chapters, strict=True):
        nbformat.write(chapter(p, sources), p.folder / "notebooks" / f"{stem}.ipynb")
    for n in tables.KEYS:
        ours = tables.paper(n).query("modality == 't2'")
        tables.write(tables.beside_paper(ours, n), f"table{n}_beside_paper", p.folder / "tables")
    for seed, stem in enumerate(("table2", "forest_beside_paper"), 10):
        (p.folder / "figures" / f"{stem}.png").write_bytes(picture(seed))
    record(p, 0, 20.5)
    return p


def record(p, fold, seconds, **changes):
    path = p.folder / "runs" / "binary" / "t2" / "fedavg" / f"fold{fold}" / "run.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**RECORD, **changes, "seconds": seconds}))


def paths(p):
    return [p.folder / "notebooks" / f"{stem}.ipynb" for stem in pipeline.NOTEBOOKS]


def parsed(p):
    return bs4.BeautifulSoup(report.page_of(p, paths(p)), "html.parser")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A profile that has run."""
    return profile(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def page(small):
    return parsed(small)


def section(page, number):
    """The text of a chapter."""
    return page.find(id=f"chapter-{number}").find_parent("section")


def test_every_picture_is_there_and_told_in_words(page):
    shown = {img["src"].removeprefix("data:image/png;base64,").strip(): img["alt"] for img in page("img")}
    assert {base64.b64decode(text) for text in shown} == {picture(0), picture(10), picture(11)}
    alt = shown[base64.b64encode(picture(0)).decode()]
    assert views.scanners.__doc__.splitlines()[0].rstrip(".") in alt and "(Same heading)" in alt
    assert all(shown.values())


def test_a_live_view_without_another_form_says_which_it_is_and_how_to_open_it(page):
    (told,) = section(page, 1).select("p.elsewhere")
    words = told.get_text()
    assert (
        "widgets.roi_viewer(scans)" in words and "01_data_exploration.ipynb" in words and "make lab" in words
    )
    assert "VBox" not in page.get_text() and "widget state" not in str(page)


def test_a_live_view_with_html_beside_it_is_that_html(page):
    (view,) = page.select(".ipmn-view")
    assert view.p.get_text() == "frames" and json.loads(view.script.string) == {"a": "<b>"}


def test_no_output_is_blank_and_what_cannot_be_shown_says_so(page):
    outputs = page.select(".output")
    assert len(outputs) == 10 and all(o.get_text().strip() or o.img for o in outputs)
    (told,) = section(page, 2).select("p.elsewhere")
    assert "application/x-odd" in told.get_text()
    assert "no rows" in section(page, 2).find("th", string="reason").find_parent("table").get_text()


def test_progress_is_left_out_and_warnings_stay(tmp_path):
    bar = {"stderr": "train:   0%|   | 0/9\rtrain: 100%|###| 9/9 [00:01<00:00]\n\r12it [00:03, 4.0it/s]\n"}
    mixed = {"stderr": "\r 50%|#  | 1/2\nUserWarning: few cases\n"}
    p = profile(
        tmp_path, [["# A", ("a", [bar]), ("b", [mixed]), ("c", ["old\rnew\n| 50%|\n"])], *CHAPTERS[1:]]
    )
    texts = [pre.get_text().strip() for pre in section(parsed(p), 1).select(".output pre")]
    assert texts == ["UserWarning: few cases", "new\n| 50%|"]


def test_code_is_folded_and_the_settings_of_the_chapter_are_those_it_ran_with(page):
    folded = section(page, 1).select("details.code")
    assert [one.summary.get_text() for one in folded] == ["settings of this chapter"] + ["code"] * 4
    assert "injected = 1" in folded[0].get_text() and not any(one.has_attr("open") for one in folded)
    assert all(code.find_parent("details") for code in page.select(".highlight"))


def test_exercises_and_caveats_are_marked(page, tmp_path):
    words = section(page, 2)
    assert words.select_one("p.try-it").get_text() == "Try it. Double it."
    assert words.select_one("p.caveat").get_text() == "Caveat: few. Cases."
    p = profile(tmp_path)
    nbformat.write(chapter(p, CHAPTERS[3], tags=["try-it"]), paths(p)[3])
    (exercise,) = section(parsed(p), 4).select(".cell.try-it")
    assert exercise.summary.get_text() == "code to try" and exercise.pre.get_text().strip() == "1 + 1"


def test_equations_are_mathml(page):
    block, inline, _ = section(page, 2)("math")
    assert (block["display"], inline["display"]) == ("block", "inline")
    assert block.get_text() == "ℓ(f,y)=−logpy" and inline.get_text() == "μ<1"


@pytest.mark.parametrize("stem", pipeline.NOTEBOOKS)
def test_every_equation_of_the_notebooks_can_be_converted(stem):
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    words = "\n\n".join(cell.source for cell in notebook.cells)
    body = bs4.BeautifulSoup(report.chapter.chapter(stem, notebook, {stem: "chapter-1"}).body, "html.parser")
    shown = body("math")
    assert len(shown) == len(re.findall(r"\$\$.+?\$\$|\$.+?\$", words, re.DOTALL))
    assert not [math for math in shown if "\\" in math.get_text() or not math.get_text().strip()]
    for unread in body(["code", "pre"]):
        unread.decompose()
    assert "$" not in body.get_text()


def test_an_equation_that_cannot_be_converted_stays_as_it_was_written(tmp_path):
    p = profile(tmp_path, [["# A\n\n$x^2^3$ and $a<b>$"], *CHAPTERS[1:]])
    assert section(parsed(p), 1).find("code", string="x^2^3")


def test_contents_lead_to_every_chapter_and_section(page):
    ids = [tag["id"] for tag in page(id=True)]
    assert len(ids) == len(set(ids))
    inside = [a["href"] for a in page("a", href=True) if a["href"].startswith("#")]
    assert {href[1:] for href in inside} <= set(ids)
    listed = [a.get_text() for a in page.nav("a")]
    assert listed == [heading.get_text() for heading in page.main(["h2", "h3"])]
    assert "Tables 2 & 3 <3" in listed and listed.count("Same heading") == 3
    assert len(page("h1")) == 1 and page.html["lang"] == "en"


def test_links_between_chapters_lead_within_the_page_and_those_to_files_become_text(page):
    first = section(page, 1)
    links = {a.get_text(): a["href"] for a in first("a")}
    assert links == {"the next": "#chapter-2", "OSF": "https://osf.io/74vfs"}
    assert "this (docs/federation.md)" in first.get_text()


def test_nothing_asks_for_another_file_and_only_the_pages_own_scripts_may_run(page):
    assert not page("link", href=lambda href: href != "data:,") and not page(["iframe", "object", "embed"])
    assert not [tag for tag in page(src=True) if not tag["src"].startswith("data:")]
    assert not re.search(r"@import|url\(", "".join(style.get_text() for style in page("style")))
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    for script in page("script", type=None):
        digest = hashlib.sha256(script.string.encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert page.find("script", string=re.compile("Contents|contents"))


def test_an_output_can_neither_lead_away_nor_send_anything(tmp_path):
    html = """<meta http-equiv="refresh" content="0; url=http://x/"><base href="http://x/"><p>stays</p>"""
    shown = parsed(profile(tmp_path, [["# A", ("a", [{"text/html": html}])], *CHAPTERS[1:]]))
    assert not shown.main(["meta", "base", "link"]) and "stays" in section(shown, 1).get_text()
    policy = shown.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert "base-uri 'none'" in policy and "form-action 'none'" in policy


def test_text_of_a_name_is_never_markup(page, tmp_path):
    shown = [pre.get_text().strip() for pre in section(page, 3).select(".output pre")]
    assert shown == [HOSTILE, HOSTILE]
    p = profile(tmp_path, data=HOSTILE)
    record(p, 1, 1.0, device=HOSTILE, cohort=HOSTILE)
    hostile = parsed(p)
    assert len(hostile("script", type=None)) == len(page("script", type=None))
    assert len(hostile("img")) == len(page("img")) and hostile.get_text().count(HOSTILE) >= 5


@pytest.mark.parametrize("name", ["j\u00fcrgen & <jo>"])
def test_no_folder_of_this_machine_stands_in_the_page(tmp_path, monkeypatch, name):
    home, secret = tmp_path / "people" / name, tmp_path / "secret" / name
    monkeypatch.setenv("HOME", str(home))
    told = f"{home}/.venv/x.py:3: UserWarning\nfile://{home}/y {[str(secret / 'ipmn')]} {sys.prefix}/z"
    code = f"data = {PythonTranslator.translate(str(secret / 'ipmn'))}"  # as papermill puts it in
    cells = ["# A", ("a", [{"stderr": told}]), (code, [{"text/plain": repr(told)}])]
    p = profile(secret / "results", [cells, *CHAPTERS[1:]], data=str(secret / "ipmn"))
    shown = parsed(p)
    texts = (shown.get_text(), str(shown))
    assert not [word for word in ("secret", name, "people", sys.prefix) for t in texts if word in t]
    first, second = (one.get_text().strip() for one in section(shown, 1).select(".output"))
    prefix = Path(sys.prefix).name
    assert (
        first == f"~/.venv/x.py:3: UserWarning\nfile://~/y ['ipmn'] {prefix}/z" and "\\nfile://~/y" in second
    )
    assert "cohort ipmn" in shown.header.get_text() and "data = 'ipmn'" in section(shown, 1).get_text()
    rows = shown.find("table", attrs={"aria-labelledby": "the-settings"}).tbody("tr")
    cells = {row.th.get_text(): row.td.get_text() for row in rows}
    assert (cells["data"], cells["outputs"]) == ("ipmn", "results")


def test_no_folder_that_a_relative_path_names_stands_in_the_page(tmp_path):
    data = "../clinic_of_alice/ipmn"
    cells = ["# A", (f'data = "{data}"', [{"text/plain": repr(str(params.project_root() / data))}])]
    shown = parsed(profile(tmp_path, [cells, *CHAPTERS[1:]], data=data))
    assert "alice" not in str(shown) and "cohort ipmn" in shown.header.get_text()


@pytest.mark.parametrize("home", ["/", "/osf.io"])
def test_a_folder_is_not_looked_for_in_tags_addresses_and_other_paths(small, page, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert str(parsed(small)) == str(page)


def test_pictures_and_data_of_views_keep_what_looks_like_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    pixels = base64.b64encode(base64.b64decode("AAA+/home/alice+/home/alice/AAAA")).decode()
    view = LIVE.replace('"<b>"', '"/home/alice/"')
    shows = [
        {"image/png": 0},
        {"text/html": view},
        {"text/html": f'<img src="data:image/png;base64,{pixels}">'},
    ]
    p = profile(tmp_path, [["# A", ("a", [*shows, "/home/alice/x"])], *CHAPTERS[1:]])
    first = section(parsed(p), 1)
    assert base64.b64decode(first.img["src"].partition(",")[2]) == picture(0)
    assert first("img")[1]["src"].endswith(f",{pixels}") and "+/home/alice+/home/alice/" in pixels
    assert json.loads(first.script.string) == {"a": "/home/alice/"}
    assert first.select(".output pre")[-1].get_text().strip() == "~/x"


def test_half_a_character_of_a_broken_name_does_not_stop_the_page(tmp_path):
    p = profile(tmp_path)
    path = paths(p)[3]
    path.write_text(path.read_text().replace('"2"', '"case \\ud83d"'))
    assert "case ?" in report.write(p, paths(p), p.folder / "report.html").read_text()


def test_tables_say_what_their_headers_head_and_scroll_in_a_box_of_their_own(page):
    for table in page("table"):
        assert table.find_parent("div", class_="wide")["tabindex"] == "0"
        assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in table("th"))
    frame = section(page, 2).find("td", string="NYU").find_parent("table")
    assert not frame.attrs and frame.thead.find("td") and frame.find("th", string="0")["scope"] == "row"


def test_columns_of_words_are_told_from_those_of_numbers(tmp_path):
    words = "It cannot be told for want of cases."
    cells = [("t1", "0.50 ± 0.10", "n/a", ""), ("t2", "-1e-3", "nan", words)]
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    head = "<tr><th>modality</th><th>auc</th><th>acc</th><th>undefined</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    shown = section(parsed(profile(tmp_path, [["# A", ("a", [{"text/html": table}])], *CHAPTERS[1:]])), 1)
    kinds = [[cell.get("class") for cell in row(["th", "td"])] for row in shown.find("table")("tr")]
    assert kinds == [[["words"], None, None, ["words", "long"]]] * 3


def printed(row, digits):
    return [
        f"{row[f'{metric}_mean']:.{digits}f} ± {row[f'{metric}_std']:.{digits}f}" for metric in ("acc", "auc")
    ]


@pytest.mark.parametrize(("n", "digits"), [(2, 2), (3, 4)])
def test_the_papers_numbers_stand_below_ours_as_printed(page, n, digits):
    rows = page.find("table", attrs={"aria-labelledby": f"table-{n}"})("tr")
    ours = [[td.get_text() for td in row("td")] for row in rows if "ours" in row.get("class", [])]
    theirs = [[td.get_text() for td in row("td")] for row in rows if "theirs" in row.get("class", [])]
    keys = [key for key in tables.KEYS[n] if key != "modality"]
    expected = [
        [text for _, row in group.sort_values("modality").iterrows() for text in printed(row, digits)]
        for _, group in tables.paper(n).fillna(-1).groupby(keys, sort=False)
    ]
    expected = [["n/a" if text.startswith("-1") else text for text in row] for row in expected]
    assert [row[-4:] for row in theirs] == expected
    assert [row[-4:] for row in ours] == [["n/a", "n/a", *row[2:]] for row in expected]


def test_the_counts_of_table_1_stand_beside_the_papers(page):
    first = page.find("table", attrs={"aria-labelledby": "table-1"}).tbody
    assert [th.get_text() for th in first("th")] == ["NYU", "this run", "paper"]
    ours, theirs = ([td.get_text() for td in row("td")] for row in first("tr"))
    counts = tables.paper(1).query("center == 'NYU'").set_index("modality")
    assert theirs == [str(counts.loc[m, c]) for m in ("t1", "t2") for c in tables.COUNTS]
    assert ours == ["n/a"] * 4 + theirs[4:]


def test_every_setting_stands_beside_default_and_meaning(tmp_path):
    p = profile(tmp_path, size=48, epochs_by_model={"resnet34": 2}, arms=["fedavg", "local_only"])
    cells = {
        row.th.get_text(): [td.get_text() for td in row("td")]
        for row in parsed(p).find("table", attrs={"aria-labelledby": "the-settings"}).tbody("tr")
    }
    assert list(cells) == list(params.Params.model_fields)
    assert (
        cells["size"] == ["48", "96", "edge of the ROI cube, voxels"] and cells["max_per_cell"][1] == "null"
    )
    assert cells["epochs_by_model"][0] == "{resnet34: 2}" and cells["arms"][0] == "[fedavg, local_only]"
    assert all(meaning for _, _, meaning in cells.values())


def test_data_machine_and_versions_are_those_of_the_runs(tmp_path):
    p = profile(tmp_path)
    record(p, 1, 10.0, versions={**RECORD["versions"], "torch": "2.14.0"})
    page = parsed(p)
    rows = page.find("table", attrs={"aria-labelledby": "versions"})("tr")
    facts = {row.th.get_text(): row.td.get_text() for row in rows}
    assert facts["torch (training)"] == "2.13.0; 2.14.0" and facts["processor"] == "x86_64"
    assert "3dc82393c319" in facts.values() and facts["notebooks executed"] == "2025-01-02 03:04 UTC"
    effort = page.find("table", attrs={"aria-labelledby": "runs"}).tbody
    assert [cell.get_text() for cell in effort(["th", "td"])] == ["binary", "FedAvg", "2", "30"]


def test_runs_that_the_profile_no_longer_asks_for_are_not_counted(small, page, tmp_path):
    p = profile(tmp_path)
    for folder in ("binary/t2/fedprox_0.5/fold0", "binary/t2/fedavg/fold9", "other/t2/fedavg/fold0"):
        path = p.folder / "runs" / folder / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**RECORD, "seconds": 98765, "data": "left over"}))
    shown = parsed(p)
    assert "left over" not in shown.get_text() and "987" not in shown.get_text()


def test_a_phantom_is_called_synthetic_and_nothing_is_for_clinical_use(page, tmp_path):
    head = page.header.get_text()
    assert "synthetic" in head and "Not for clinical use" in head and "mine" in head and "phantom" in head
    real = parsed(profile(tmp_path, data="data/ipmn")).header.get_text()
    assert "synthetic" not in real and "Not for clinical" in real and "data/ipmn" in real
    assert "images of patients" in real and "images of patients" not in head


def test_the_same_files_give_the_same_bytes(small):
    target = small.folder / "report.html"
    first = pipeline.write_report(small).read_bytes()
    assert pipeline.write_report(small) == target and target.read_bytes() == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"03_federated_binary\.ipynb: no such notebook; `ipmn run`"),
        ("{", r"03_federated_binary\.ipynb: not a whole notebook.*`ipmn run` executes it again"),
    ],
)
def test_a_missing_or_broken_notebook_is_named_and_no_page_is_written(tmp_path, text, message):
    p = profile(tmp_path)
    paths(p)[2].write_text(text) if text else paths(p)[2].unlink()
    with pytest.raises(pipeline.NotebookError, match=message):
        pipeline.write_report(p)
    assert not (p.folder / "report.html").exists()


def test_notebooks_of_other_settings_are_refused_but_not_of_another_number_of_jobs(tmp_path):
    p = profile(tmp_path)
    report.page_of(p.model_copy(update={"jobs": 7}), paths(p))
    with pytest.raises(ValueError, match=r"01_data.*other settings \(size: 96 there, 48 now\); `ipmn run`"):
        report.page_of(p.model_copy(update={"size": 48}), paths(p))


def test_a_missing_table_and_half_a_record_are_named(tmp_path):
    p = profile(tmp_path)
    record = p.folder / "runs" / "binary" / "t2" / "fedavg" / "fold0" / "run.json"
    record.write_text("{")
    with pytest.raises(ValueError, match=r"fold0/run\.json is damaged; delete"):
        report.page_of(p, paths(p))
    record.unlink()
    (p.folder / "tables" / "table2_beside_paper.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"table2_beside_paper\.csv: no such file; `ipmn run`"):
        report.page_of(p, paths(p))


# ---- in a browser


@pytest.fixture(params=[1280, 420])
def opened(request, chromium, small):
    """The page in Chromium without a network, at a width; and what it asked for and complained of."""
    noise, context = [], chromium.new_context(offline=True, viewport={"width": request.param, "height": 900})
    shown = context.new_page()
    shown.on("request", lambda asked: noise.append(asked.url))
    shown.on("console", lambda line: noise.append(line.text))
    shown.on("pageerror", lambda error: noise.append(str(error)))
    shown.goto(pipeline.write_report(small).as_uri())
    yield shown, [url for url in noise if not url.startswith("data:")]
    context.close()


def test_a_browser_shows_every_picture_and_asks_for_nothing(opened):
    page, noise = opened
    widths = page.locator("img").evaluate_all("all => all.map(img => img.complete ? img.naturalWidth : 0)")
    assert len(widths) == 3 and all(widths)
    assert noise == [page.url]


def test_no_part_of_the_page_is_wider_than_the_window(opened):
    page, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_contents_work_by_keyboard(opened):
    page, _ = opened
    contents = page.locator("nav details")
    wide = page.viewport_size["width"] > 1000
    assert (contents.get_attribute("open") is not None) == wide
    if not wide:
        contents.locator("summary").press("Enter")
    link = contents.get_by_role("link", name="4 · Review", include_hidden=True)
    link.press("Enter")
    page.locator('nav [aria-current]:text-is("4 · Review")').wait_for(state="attached")
    top = page.locator("#chapter-4").evaluate("heading => heading.getBoundingClientRect().top")
    assert 0 <= top < 120
    assert (contents.get_attribute("open") is not None) == wide


def test_code_opens_on_a_click_and_stays_closed_on_paper(opened):
    page, _ = opened
    code = page.locator("details.code").first
    assert not code.locator("pre").is_visible()
    code.locator("summary").click()
    assert code.locator("pre").is_visible()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator("details.code").last.is_visible()
