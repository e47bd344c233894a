"""The report and the live notebooks as a person meets them: in Chromium and JupyterLab, without a network."""

from functools import partial

import browser
import pytest
from playwright.sync_api import expect

CHAPTERS = ("01_data_exploration", "03_federated_binary")


def lines(texts):
    """The texts whole, one per line, for an assertion's message: pytest itself shortens them."""
    return "\n".join(texts)


def test_the_report_works_as_a_file_without_a_network(chromium, smoke):
    with chromium.new_context(offline=True, viewport={"width": 1200, "height": 1000}) as context:
        noise, page = browser.listen(context), context.new_page()
        page.goto((smoke.folder / "report.html").as_uri(), wait_until="load")
        widths = page.locator("img").evaluate_all(
            "images => Promise.all(images.map(i => { i.loading = 'eager'; return i.decode() }))"
            ".then(() => images.map(i => i.naturalWidth))"
        )
        assert len(widths) >= 4 and min(widths) > 0
        viewer = page.locator(".ipmn-view[data-view=viewer]").first
        slider, canvas = viewer.locator("input[type=range]").first, viewer.locator("canvas").first
        slider.scroll_into_view_if_needed()
        assert browser.spread(canvas) > 0.02
        before = canvas.screenshot()
        slider.press("ArrowRight")
        browser.until(lambda: canvas.screenshot() != before)
        explorer = page.locator(".ipmn-view[data-view=explorer]").first
        picture = explorer.locator("svg").first
        drawn = picture.evaluate("svg => svg.outerHTML")
        explorer.get_by_label("center", exact=True).select_option("MCF")
        browser.until(lambda: picture.evaluate("svg => svg.outerHTML") != drawn)
        asked = [url for url in noise.requests if url != page.url and not url.startswith("data:")]
        assert asked == [], lines(asked)
        assert noise.errors == [], lines(noise.errors)


@pytest.fixture(scope="module")
def context(chromium):
    with chromium.new_context(viewport={"width": 1280, "height": 1000}) as context:
        yield context


@pytest.fixture(scope="module")
def noise(context):
    return browser.listen(context)


@pytest.fixture(scope="module")
def chapters(context, noise, smoke, tmp_path_factory):
    """The pages of the notebooks with live views, and their code cells after a run of all."""
    project = browser.live_project(smoke.root, tmp_path_factory.mktemp("live") / "project")
    with browser.jupyter_lab(project, tmp_path_factory.mktemp("home")) as lab:
        pages = [browser.open_notebook(context, lab, stem) for stem in CHAPTERS]
        cells = browser.run_all(pages)
        yield dict(zip(CHAPTERS, zip(pages, cells, strict=True), strict=True))


@pytest.fixture
def viewer(chapters):
    return browser.output_with(chapters["01_data_exploration"][0], "center", "case")


@pytest.fixture
def explorer(chapters):
    return browser.output_with(chapters["03_federated_binary"][0], "center", "metric")


@pytest.fixture
def heat_maps(chapters):
    """The viewer that has heat maps; that of the explorer has the switch, too, but disabled."""
    page, _ = chapters["03_federated_binary"]
    return browser.output_with(page, "case", page.get_by_role("button", name="Grad-CAM", disabled=False))


@pytest.fixture
def by_hand(chapters):
    return browser.output_with(chapters["03_federated_binary"][0], "mu", "heterogeneity")


@pytest.mark.slow
@pytest.mark.parametrize("stem", CHAPTERS)
def test_all_cells_of_a_chapter_run_live(chapters, stem):
    _, cells = chapters[stem]
    assert len(cells) > 8
    errors = [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert errors == [], lines(f"{out['ename']}: {out['evalue']}" for out in errors)
    assert [cell["source"] for cell in cells if cell["execution_count"] is None] == []


@pytest.mark.slow
def test_a_key_on_any_slider_of_a_view_changes_a_picture_and_the_other_key_undoes_it(viewer, by_hand):
    moved = [(viewer, slider) for slider in browser.sliders(viewer)]
    moved.append((by_hand, browser.control(by_hand, "mu").get_by_role("slider")))
    assert len(moved) >= 2
    for view, slider in moved:
        before = browser.pictures(view)
        browser.act(view, partial(slider.press, "ArrowRight"))
        assert browser.act(view, partial(slider.press, "ArrowLeft")) == before and all(before)


@pytest.mark.slow
def test_another_center_brings_its_own_cases_to_the_viewer(viewer):
    cases = []
    for name in browser.options(viewer, "center")[1:4]:
        browser.act(viewer, partial(browser.choose, viewer, "center", name))
        cases.append(tuple(browser.options(viewer, "case")))
    assert len(set(cases)) == 3 and all(cases)


@pytest.mark.slow
def test_choices_change_the_explorer_and_a_wrong_case_opens_in_a_viewer(explorer):
    for description, option in (("center", "NYU"), ("metric", "ACC"), ("center", "MCF"), ("metric", "AUC")):
        browser.act(explorer, partial(browser.choose, explorer, description, option))
    before = sum(map(bool, browser.pictures(explorer)))
    browser.choose(explorer, "most wrong", browser.options(explorer, "most wrong")[1])
    browser.until(lambda: sum(map(bool, browser.pictures(explorer))) == before + 1)


@pytest.mark.slow
def test_the_heat_map_goes_with_one_click_and_comes_back_with_another(heat_maps):
    switch, before = heat_maps.get_by_role("button", name="Grad-CAM"), browser.pictures(heat_maps)
    browser.act(heat_maps, switch.click)
    assert browser.act(heat_maps, switch.click) == before and all(before)


@pytest.mark.slow
def test_nothing_of_a_live_view_is_cut_off(viewer, explorer, heat_maps, by_hand):
    for view in (viewer, explorer, heat_maps, by_hand):
        assert browser.cut_off(view) == []  # Lab hides what is too wide


@pytest.mark.slow
def test_niivue_draws_the_case_in_three_dimensions(viewer):
    pytest.importorskip("ipyniivue")
    viewer.get_by_role("button", name="NiiVue").click()
    canvas = viewer.locator("canvas").first
    expect(canvas).to_be_visible(timeout=30_000)
    browser.until(lambda: browser.spread(canvas) > 0.02, seconds=30)  # neither blank nor of one color


@pytest.mark.slow
def test_the_live_notebooks_ask_no_other_host_and_log_no_error(chapters, noise):
    assert len(noise.requests) > 10  # it does listen
    assert noise.elsewhere == [], lines(noise.elsewhere)
    assert noise.errors == [], lines(noise.errors)
