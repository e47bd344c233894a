"""The report and the live notebooks as a person meets them: in Chromium and JupyterLab, without a network."""

import statistics
from functools import partial

import browser
import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import expect

from ipmn_core.params import Preprocessing
from ipmn_core.views import live

NOTEBOOKS = ("01_data_exploration", "03_federated_binary", "large")
LARGE = (384, 384, 80)
_FRAMES = """async view => { // ms from an input event to the second frame after it
    const times = []
    for (let i = 0; i < 30; i++) {
        const range = view.querySelectorAll('input[type=range]')[i % 3]
        range.value = Number(range.value) + (i % 2 ? 1 : -1)
        const start = performance.now()
        range.dispatchEvent(new Event('input'))
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
        times.push(performance.now() - start)
    }
    return times
}"""
_ANOTHER = """view => new Promise(done => { // ms from the choice of the other case to its picture
    const list = [...view.querySelectorAll('select')].at(-1)
    const fact = () => view.querySelector('dd').textContent
    const [before, start] = [fact(), performance.now()]
    list.selectedIndex = 1 - list.selectedIndex
    list.dispatchEvent(new Event('change'))
    const look = () => fact() === before ? setTimeout(look, 2)
        : requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)))
    look()
})"""


def lines(texts):
    """The texts whole, one per line, for an assertion's message: pytest itself shortens them."""
    return "\n".join(texts)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two scans of `LARGE` voxels, int16."""
    folder, rng, rows = tmp_path_factory.mktemp("large"), np.random.default_rng(0), []
    mask = np.zeros(LARGE, np.uint8)
    mask[150:250, 180:260, 30:50] = 1
    for case in ("one", "two"):
        row = {"case_id": case, "center": "NYU", "modality": "t2", "label": 0, "class": "no risk"}
        for kind, voxels in (("image", rng.normal(300, 60, LARGE).astype(np.int16)), ("mask", mask)):
            row[kind] = str(folder / f"{case}_{kind}.nii.gz")
            nib.save(nib.Nifti1Image(voxels, np.diag([-0.9, -0.9, 3, 1])), row[kind])
        rows.append(row)
    return pd.DataFrame(rows)


# ---- pages that are files


def test_the_report_works_as_a_file_without_a_network(chromium, smoke):
    with chromium.new_context(offline=True, viewport={"width": 1200, "height": 1000}) as context:
        noise, page = browser.listen(context), context.new_page()
        page.goto((smoke.folder / "report.html").as_uri(), wait_until="load")
        widths = page.locator("img").evaluate_all(
            "images => Promise.all(images.map(i => { i.loading = 'eager'; return i.decode() }))"
            ".then(() => images.map(i => i.naturalWidth))"
        )
        assert len(widths) >= 4 and min(widths) > 0
        for kind in ("viewer", "by_hand"):
            view = browser.views(page, kind).first
            browser.act(view, lambda: view.get_by_role("slider").first.press("ArrowLeft"))  # noqa: B023
        view = browser.views(page, "explorer")
        browser.act(view, lambda: view.get_by_label("center", exact=True).select_option("MCF"))
        assert noise.asked == [], lines(noise.asked)
        assert noise.errors == [], lines(noise.errors)


def test_a_large_scan_follows_the_slider(chromium, large, tmp_path, capfd):
    about, arrays = live.answering(large, Preprocessing(32))(0)
    held = {"held": {0: about | {"arrays": live.packed(arrays)}}}
    state = live.viewer_state(large.head(1), Preprocessing(32)) | held
    path = browser.write_page(tmp_path / "large.html", {"viewer": state})
    with chromium.new_context(viewport={"width": 1000, "height": 900}) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        expect(page.locator("canvas").first).to_be_visible(timeout=60_000)
        found = statistics.median(browser.views(page, "viewer").evaluate(_FRAMES))
    with capfd.disabled():
        print(f"\n{LARGE} voxels: slider to picture {found:.0f} ms (median of 30)")
    assert found < 1000  # for a machine that does something else as well


# ---- JupyterLab


@pytest.fixture(scope="module")
def lab(smoke, large, tmp_path_factory):
    """JupyterLab in a copy of the smoke run's project, with a notebook more that views the large scans."""
    folder = tmp_path_factory.mktemp("lab")
    project = browser.live_project(smoke.root, folder / "project")
    code = (
        "import pandas as pd\nfrom ipmn_core import params, views\n"
        f"views.roi_viewer(pd.DataFrame({large.to_dict()}), params.Preprocessing(32))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, project / "notebooks" / "large.ipynb")
    with browser.jupyter_lab(project, folder) as lab:
        yield lab


@pytest.fixture(scope="module")
def opened(chromium, lab):
    """The pages of `NOTEBOOKS`, their code cells after a run of all, and what they logged and asked for."""
    with chromium.new_context(viewport={"width": 1280, "height": 1000}) as context:
        noise = browser.listen(context)
        pages = [browser.open_notebook(context, lab, stem) for stem in NOTEBOOKS]
        yield pages, browser.run_all(pages), noise


@pytest.fixture
def views(opened):
    """The live views of both chapters: viewer, explorer, heat maps, by hand."""
    (first, third, _), *_ = opened
    kinds = ("explorer", "viewer", "by_hand")
    return [browser.views(first, "viewer"), *(browser.views(third, kind) for kind in kinds)]


@pytest.mark.slow
def test_all_cells_run_live(opened):
    cells = [cell for of_one in opened[1] for cell in of_one]
    errors = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert errors == [], lines(f"{out['ename']}: {out['evalue']}" for out in errors)
    assert [cell["source"] for cell in cells if cell["execution_count"] is None] == []


@pytest.mark.slow
def test_a_key_on_any_slider_of_a_view_changes_a_picture_and_the_other_key_undoes_it(views):
    viewer, _, _, by_hand = views
    for view in (viewer, by_hand):
        before = browser.pictures(view)
        for slider in view.get_by_role("slider").all():
            browser.act(view, partial(slider.press, "ArrowLeft"))
            assert browser.act(view, partial(slider.press, "ArrowRight")) == before


@pytest.mark.slow
def test_another_center_brings_its_own_cases_to_the_viewer(views):
    viewer, *_ = views
    center, case = (viewer.get_by_label(name, exact=True) for name in ("center", "case"))
    found = []
    for name in center.locator("option").all_inner_texts()[1:4]:
        browser.act(viewer, partial(center.select_option, name))
        found.append(tuple(case.locator("option").all_inner_texts()))
    assert len(set(found)) == 3 and all(found)


@pytest.mark.slow
def test_choices_change_the_explorer_and_a_wrong_case_opens_in_a_viewer(views):
    _, explorer, *_ = views
    for label, option in (("metric", "accuracy"), ("center", "MCF"), ("metric", "AUC"), ("center", "NYU")):
        control = explorer.get_by_label(label, exact=True).filter(visible=True)
        browser.act(explorer, partial(control.select_option, option))
    button = explorer.get_by_role("button", name="show").first
    name = button.get_attribute("aria-label").removeprefix("show ")
    button.click()
    expect(explorer.locator("dd").first).to_contain_text(name, timeout=30_000)
    expect(explorer.locator("canvas").first).to_be_visible()


@pytest.mark.slow
def test_the_heat_map_goes_with_one_click_and_comes_back_with_another(views):
    _, _, heat_maps, _ = views
    switch, before = heat_maps.get_by_label("Grad-CAM"), browser.pictures(heat_maps)
    browser.act(heat_maps, switch.click)
    assert browser.act(heat_maps, switch.click) == before


@pytest.mark.slow
def test_nothing_of_a_live_view_is_cut_off(views):
    for view in views:
        assert browser.cut_off(view) == []  # Lab hides what is too wide


@pytest.mark.slow
def test_another_large_scan_comes_from_the_kernel(opened, capfd):
    page = opened[0][2]
    page.bring_to_front()
    view = browser.views(page, "viewer")
    expect(view.locator("canvas").first).to_be_visible(timeout=60_000)
    page.wait_for_timeout(3000)  # the viewer has asked for the next case by then
    ahead, *asked = (view.evaluate(_ANOTHER) for _ in range(4))
    with capfd.disabled():
        print(f"\n{LARGE} voxels: another scan from the kernel to the picture", end=" ")
        print(f"{statistics.median(asked):.0f} ms (median of 3), the next in the list {ahead:.0f} ms")


@pytest.mark.slow
def test_the_live_notebooks_ask_no_other_host_and_log_no_error(opened):
    noise = opened[2]
    assert len(noise.requests) > 10  # it does listen
    elsewhere = [url for url in noise.requests if browser.ELSEWHERE.match(url)]
    assert elsewhere == [], lines(elsewhere)
    assert noise.errors == [], lines(noise.errors)
