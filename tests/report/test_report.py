import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import bs4
import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ipmn_core import params, pipeline, report
from ipmn_core.metrics import tables
from ipmn_core.views import live

PNG = (  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MODULE = "for (const view of document.querySelectorAll('.ipmn-view')) view.dataset.live = 'a < b'"
HOSTILE = "<script>alert(1)</script><img src=http://x.test/a.png>"
VIEW = {"view": "none", "alt": 'Three planes & "more" <b>', "state": {"case": HOSTILE}}
RECORD = {
    "settings": {"task": "binary", "arm": "fedavg", "device": "cpu", "bfloat16": False},
    "data": "3dc82393c319",
    "cohort": "phantom",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "monai": "1.6.1"},
    "device": "x86_64",
}


def result(data):
    return new_output("execute_result", data=data, execution_count=1)


def stream(text, name="stdout"):
    return new_output("stream", text=text, name=name)


CHAPTERS = (
    [  # Markdown, then code with its outputs
        "# 1 · The cohort\n\nSee [the next](02_three_class_benchmark.ipynb), [this](../docs/federation.md), "
        "[OSF](https://osf.io/74vfs).\n\n## Same heading\n\n## Same heading",
        ("views.scanners(facts)", result({"image/png": PNG, "text/plain": "<Figure>"})),
        ("views.roi_viewer(scans)", result({live.MIME: VIEW, "image/png": PNG, "text/plain": "Viewer()"})),
    ],
    [
        "# 2 · Benchmark\n\n$$\\ell(f, y) = -\\log p_y$$\n\nwith $\\mu < 1$, not $x^2^3$.\n\n"
        f"$${' + '.join('abcdefghijklmnopqrstuvwxyz')}$$",
        ("frame", result({"text/html": pd.DataFrame([["words " * 20] * 9]).to_html(), "text/plain": "x"})),
    ],
    ["# 3 · Federation", ("name", result({"text/plain": HOSTILE})), ("print(name)", stream(HOSTILE))],
    ["# 4 · Review\n\n## Tables 2 & 3 <3", ("1 + 1", result({"text/plain": "2"}))],
)


def chapter(p, words, *code):
    """A notebook as papermill leaves it."""
    cells = [new_code_cell(source, outputs=outputs, execution_count=1) for source, *outputs in code]
    for tag, source in (("parameters", "demo"), ("injected-parameters", f"{p.folder}/params.yaml")):
        source = f'profile = "{source}"'
        cells.insert(0, new_code_cell(source, execution_count=1, metadata={"tags": [tag]}))
    cells.insert(0, new_markdown_cell(words))
    for n, cell in enumerate(cells):
        cell.id = str(n)
    return new_notebook(cells=cells, metadata={"papermill": {"end_time": "2025-01-02T03:04:05"}})


def profile(folder, first=CHAPTERS[0], **settings):
    """The settings of a profile that has run: notebooks, tables and a run below `folder`."""
    p = params.validate({"profile": "mine", "outputs": str(folder), **settings}, "test")
    for name in ("notebooks", "tables"):
        (p.folder / name).mkdir(parents=True)
    (p.folder / "params.yaml").write_text(yaml.safe_dump(p.model_dump(mode="json")))
    for path, sources in zip(paths(p), [first, *CHAPTERS[1:]], strict=True):
        nbformat.write(chapter(p, *sources), path)
    for n in tables.KEYS:
        ours = tables.paper(n).query("modality == 't2'").drop(columns="name", errors="ignore")
        tables.write(ours, n, p.folder / "tables", is_paper=True)
    record(p, "fold0", seconds=20.5)
    return p


def record(p, folder, **changes):
    path = p.folder / "runs" / "binary" / "t2" / "fedavg" / folder / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**RECORD, **changes}))


def paths(p):
    return [p.folder / "notebooks" / f"{stem}.ipynb" for stem in pipeline.NOTEBOOKS]


def parsed(p):
    return bs4.BeautifulSoup(report.page_of(p, paths(p)), "html.parser")


def after(page, caption):
    """The table below the caption that begins with these words, as lists of the texts of its rows."""
    table = page.find("p", string=re.compile(caption)).find_next("table")
    return [[cell.get_text() for cell in row(["th", "td"])] for row in table("tr")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A profile that has run."""
    return profile(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module", autouse=True)
def module():
    """A module for all live views that is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "module", lambda: MODULE)
        yield


@pytest.fixture(scope="module")
def page(small):
    return parsed(small)


def test_contents_and_links_between_chapters_lead_within_the_page_and_those_to_files_are_text(page):
    ids = [tag["id"] for tag in page(id=True)]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page("a", href=re.compile("^#"))} <= set(ids)
    listed = [a.get_text() for a in page.nav("a")]
    assert listed == [heading.get_text() for heading in page.main(["h2", "h3"])]
    assert "Tables 2 & 3 <3" in listed and listed.count("Same heading") == 2
    assert len(page("h1")) == 1 and page.html["lang"] == "en"
    links = {a.get_text(): a["href"] for a in page.select(".text a")}
    assert links == {"the next": "#chapter-2", "OSF": "https://osf.io/74vfs"}
    assert page.find(id="chapter-2").get_text() == "2 · Benchmark"
    assert "this (docs/federation.md)" in page.get_text()


def test_equations_are_mathml_or_else_stay_as_they_were_written(page):
    block, inline, _ = page("math")
    assert (block["display"], inline["display"]) == ("block", "inline")
    assert block.get_text() == "ℓ(f,y)=−logpy" and inline.get_text() == "μ<1"
    assert page.find("code", string="x^2^3")


def test_figures_and_live_views_are_pictures_told_in_words(page):
    shown = {img["alt"]: img["src"].removeprefix("data:image/png;base64,") for img in page("img")}
    assert shown == {"Figure (Same heading)": PNG, VIEW["alt"]: PNG}
    (view,) = page.select(".ipmn-view")
    assert json.loads(view.script.string) == VIEW["state"]


def test_code_is_folded_and_the_cells_of_parameters_are_left_out(page):
    folded = page.select("details.code")
    assert folded[0].pre.get_text().strip() == "views.scanners(facts)"
    assert not any(one.has_attr("open") for one in folded)
    assert all(code.find_parent("details") for code in page.select(".highlight"))


def test_progress_is_left_out_and_warnings_stay(tmp_path):
    bar, mixed = "train: 100%|###| 9/9 [00:01<00:00]\n", " 50%|#  | 1/2\nUserWarning: few cases\n"
    first = ["# A", ("a", stream(bar, "stderr"), stream(mixed, "stderr")), ("b", stream("| 50%|\n"))]
    shown = parsed(profile(tmp_path, first)).find(id="chapter-2").find_all_previous(class_="output_area")
    assert [one.get_text().strip() for one in shown] == ["| 50%|", "UserWarning: few cases"]


def test_nothing_asks_for_another_file_and_only_the_module_of_live_views_may_run(page):
    assert not page("link", href=lambda href: href != "data:,") and not page(["iframe", "object", "embed"])
    assert not [tag for tag in page(src=True) if not tag["src"].startswith("data:")]
    assert not re.search(r"@import|url\(", "".join(style.get_text() for style in page("style")))
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    (script,) = page("script", type=lambda kind: kind != "application/json")
    digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
    assert script.string == MODULE and f"script-src 'sha256-{digest}';" in policy
    for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in policy


def test_text_of_a_name_is_never_markup(page, tmp_path):
    p = profile(tmp_path, data="<b>&amp;")
    record(p, "fold1", seconds=1.0, device=HOSTILE, cohort=HOSTILE)
    hostile = parsed(p)
    for name in ("script", "img"):
        assert len(hostile(name)) == len(page(name))
    assert page.get_text().count(HOSTILE) == 2 and hostile.get_text().count(HOSTILE) == 4
    assert "cohort <b>&amp;" in hostile.header.get_text()


@pytest.mark.parametrize("name", ["jürgen", "a b"])
def test_no_folder_of_this_machine_stands_in_the_page(tmp_path, monkeypatch, name):
    home, secret = tmp_path / "people" / name, tmp_path / "secret" / name
    monkeypatch.setenv("HOME", str(home))
    told = f"{home}/.venv/x.py:3: UserWarning {[str(secret / 'ipmn')]} {sys.prefix}/z /home"
    html = f"<p>{secret}/ipmn/t1.nii.gz</p>"
    first = ["# A", ("a", stream(told), result({"text/plain": told}), result({"text/html": html}))]
    shown = parsed(profile(secret / "results", first, data=str(secret / "ipmn")))
    assert not [word for word in ("secret", name, "people", sys.prefix) if word in str(shown)]
    *texts, last = (one.get_text().strip() for one in shown.select(".output_area")[:3])
    assert texts == [f"~/.venv/x.py:3: UserWarning ['ipmn'] {Path(sys.prefix).name}/z /home"] * 2
    assert last == "ipmn/t1.nii.gz" and "cohort ipmn" in shown.header.get_text()
    cells = {name: here for name, here, *_ in after(shown, "Settings that differ")}
    assert (cells["data"], cells["outputs"]) == ("ipmn", "results")


def test_no_folder_that_a_relative_path_names_stands_in_the_page(tmp_path):
    data = "../clinic_of_alice/ipmn"
    first = ["# A", ("a", stream(f"{params.project_root() / data} {data}"))]
    shown = parsed(profile(tmp_path, first, data=data))
    assert "alice" not in str(shown) and "cohort ipmn" in shown.header.get_text()


@pytest.mark.parametrize("n", tables.KEYS)
def test_the_papers_numbers_stand_below_ours_as_printed(small, page, n):
    path = small.folder / "tables" / f"table{n}_beside_paper.csv"
    printed = tables.as_printed(pd.read_csv(path)).iloc[:, len(tables.KEYS[n]) - 1 :].to_numpy()
    _, *rows = after(page, f"Table {n}")
    numbers = [row[-printed.shape[1] // 2 :] for row in rows]
    assert numbers[::2] == printed[:, ::2].tolist() and numbers[1::2] == printed[:, 1::2].tolist()
    assert {row[-len(numbers[0]) - 1] for row in rows[::2]} == {"this run"}
    assert numbers[0] != numbers[1] and "n/a" in numbers[0]


def test_the_page_of_another_cohort_has_its_own_tables_and_a_title_that_is_true_for_it(tmp_path):
    p = profile(tmp_path)
    shutil.rmtree(p.folder / "tables")
    for n in tables.KEYS:
        ours = tables.paper(n).query("modality == 't2'").drop(columns="name", errors="ignore")
        ours = ours.replace({"center": {"NYU": "007"}}) if "center" in ours else ours
        tables.write(ours, n, p.folder / "tables", is_paper=False)
    page = parsed(p)
    assert "IPMN" not in page.h1.get_text() and "IPMN" not in page.title.get_text()
    _, first, *_ = after(page, "Table 1")
    assert first[0] == "007" and not [row for row in after(page, "Table 3") if "paper" in row]


def test_settings_that_differ_stand_beside_default_and_meaning(tmp_path):
    p = profile(tmp_path, size=48, epochs_by_model={"resnet34": 2})
    cells = {name: row for name, *row in after(parsed(p), "Settings that differ")}
    assert list(cells) == ["Setting", "profile", "outputs", "size", "epochs_by_model"]
    assert cells["size"] == ["48", "96", "edge of the ROI cube, voxels"]
    assert cells["epochs_by_model"][:2] == ["{'resnet34': 2}", "{}"]


def test_versions_and_effort_are_those_of_the_runs_that_the_profile_asks_for(tmp_path):
    p = profile(tmp_path)
    record(p, "fold1", seconds=10.0, versions={**RECORD["versions"], "torch": "2.14.0"})
    record(p, "fold9", seconds=98765.0, data="left over")
    page = parsed(p)
    facts = dict(after(page, "Data, machine"))
    assert facts["torch (training)"] == "2.13.0; 2.14.0" and facts["processor"] == "x86_64"
    assert "3dc82393c319" in facts.values() and facts["notebooks executed"] == "2025-01-02 03:04 UTC"
    assert after(page, "Runs and probes")[1:] == [["binary", "FedAvg", "2", "30"]]
    shutil.rmtree(p.folder / "runs")
    assert dict(after(parsed(p), "Data, machine"))["torch (training)"] == ""


@pytest.mark.parametrize("data", ["phantom", "data/phantom"])
def test_only_the_phantom_is_called_synthetic_and_nothing_is_for_clinical_use(tmp_path, data):
    head = parsed(profile(tmp_path, data=data)).header.get_text()
    assert "Not for clinical" in head and "mine" in head
    assert ("synthetic" in head) == (data == "phantom") != ("images of patients" in head)


def test_the_same_files_give_the_same_bytes(small):
    target = small.folder / "report.html"
    first = pipeline.write_report(small).read_bytes()
    assert pipeline.write_report(small) == target and target.read_bytes() == first


def test_notebooks_of_other_settings_are_refused_but_not_of_another_number_of_jobs(small):
    report.page_of(small.model_copy(update={"jobs": 7}), paths(small))
    with pytest.raises(ValueError, match=r"notebooks.*other settings \(size: 96 there, 48 now\); `ipmn run`"):
        report.page_of(small.model_copy(update={"size": 48}), paths(small))


@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_runs_views_scrolls_down_only_and_needs_no_mouse(chromium, small, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.goto(pipeline.write_report(small).as_uri())
    assert page.locator(".ipmn-view").get_attribute("data-live") == "a < b"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    link, (code, *_) = page.get_by_role("link", name="4 · Review"), page.locator("details.code").all()
    if width < 1000:
        assert not link.is_visible()
        page.locator("nav summary").press("Enter")
    link.press("Enter")
    assert abs(page.locator("#chapter-4").evaluate("heading => heading.getBoundingClientRect().top")) < 900
    assert not code.locator("pre").is_visible()
    code.locator("summary").press("Enter")
    assert code.locator("pre").is_visible()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator("details.code").last.is_visible()
    page.close()
