"""Live views: their data against the files, and what a page shows of them in Chromium."""

import base64
import itertools
import zlib
from io import BytesIO
from pathlib import Path

import browser
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from drawn import MM, ORIENTATIONS, stored
from made_up import paper_cohort
from playwright.sync_api import expect
from sklearn.metrics import confusion_matrix, roc_auc_score

from ipmn_core import metrics, views
from ipmn_core.data import load_roi, to_cube
from ipmn_core.metrics import centers
from ipmn_core.params import Preprocessing
from ipmn_core.views import by_hand, explorer, live
from ipmn_core.views.gradcam import Look
from ipmn_core.views.scans import widest_slice

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
SIZE = 16  # edge of the cubes
HOW = Preprocessing(SIZE)
COHORT = paper_cohort(pd.DataFrame({"label": []}))  # its classes alone
HOSTILE = '</script><!--<img src="x" onerror="window.hacked=1"><script>window.hacked=1</script>&amp;$x$'
ARMS = {"Centralized": "centralized", "FedProx (μ=0.1)": "fedprox_0.1", "Local only": "local_only"}
PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # axes across and down
CROSS = (0x56, 0xB4, 0xE9)


@pytest.fixture(scope="module")
def tables(binary_predictions):
    """Selected predictions and their summary: both tasks, an arm whose models are a center's own."""
    first = binary_predictions[binary_predictions["arm"] == "centralized"]
    three = first[first["modality"] == "t2"].assign(task="multiclass", arm="densenet121")
    three["y_true"] = np.arange(len(three)) % 3
    prob = np.random.default_rng(1).multinomial(8, (0.3, 0.3, 0.4), len(three)) / 8  # with many ties
    three[["prob_0", "prob_1", "prob_2"]] = prob
    wrong = most_wrong(first[(first["modality"] == "t2") & (first["center"] == "NYU")])
    predictions = pd.concat([binary_predictions, first.assign(arm="local_only"), three], ignore_index=True)
    predictions["case_id"] = predictions["case_id"].replace(wrong["case_id"].iloc[0], HOSTILE)
    selected = centers.by_rules(predictions)
    return selected, centers.summary(selected, n_resamples=50)


def most_wrong(rows):
    """The 8 cases of one arm with the lowest probability of their true class, as the explorer lists them."""
    y, prob = metrics.y_and_prob(rows)
    found = rows.assign(predicted=prob.argmax(axis=1), probability=prob[np.arange(len(y)), y])
    return found.sort_values("probability", kind="stable").head(8).reset_index(drop=True)


def rows_of(table, **wanted):
    """The rows whose columns have these values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def unpacked(item):
    """The arrays of a case on a page, by name."""
    found = {}
    for name, _, text in item["arrays"]:
        values = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
        if name == "inside":
            values = np.unpackbits(values, count=np.prod(item["shape"]), bitorder="little")
        shape = item["shape"] if name in ("voxels", "inside") else (SIZE,) * 3
        found[name] = values.reshape(shape, order="F")
    return found


def look_of(scan):
    """A look at the middle of the cube of `scan`."""
    heat = np.zeros((SIZE,) * 3, np.float32)
    heat[4:12, 4:12, 4:12] = 1
    names = scan[["case_id", "center", "label", "class"]]
    turn = nib.io_orientation(nib.load(scan["image"]).affine)
    about = {"modality": scan["modality"], "classes": COHORT.names("binary"), "prob": 0.25, "heat": heat}
    return Look(*names, heat, heat, np.ones(3), turn, HOW, **about)


def canonical(path):
    return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj)


# ---- the viewer's data


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_case_on_a_page_is_in_ras_whatever_is_stored(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    item = live.on_page(scan, HOW)
    found, image, mask = unpacked(item), canonical(scan["image"]), canonical(scan["mask"])
    low, high = np.percentile(image, (1, 99.5))
    np.testing.assert_allclose(found["voxels"], np.interp(image, (low, high), (0, 255)), atol=0.501)
    np.testing.assert_array_equal(found["inside"], mask)
    assert mask[tuple(item["at"])] and item["at"][2] == widest_slice(mask)
    np.testing.assert_allclose(item["spacing"], MM, rtol=1e-6)
    assert item["window"] == [low, high] and item["whole"] == item["shape"] == [20, 16, 6]
    assert dict(item["facts"])["axes"] == orientation and item["box"] == [[4, 14], [3, 11], [1, 4]]
    roi = load_roi(scan["image"], scan["mask"])
    cube = to_cube(np.asanyarray(roi.dataobj), SIZE).astype(float)
    turned = nib.apply_orientation(cube, nib.io_orientation(roi.affine))
    np.testing.assert_allclose(found["cube"], 255 * turned, atol=0.6)  # float16's last bit is 0.06 of 255
    nib.save(roi, scan["image"])
    clean = live.on_page(pd.Series({**scan, "mask": ""}), HOW)
    assert "inside" not in unpacked(clean) and clean["box"] == [[0, 14], [0, 11], [0, 4]]


def test_an_image_is_averaged_in_blocks_and_a_mask_thinner_than_these_is_no_obstacle(tmp_path, monkeypatch):
    scan, mask = stored(tmp_path, "LPS"), np.zeros((20, 16, 6), np.uint8)
    mask[:, 8, [0, 5]] = 1
    nib.save(nib.Nifti1Image(mask, nib.load(scan["image"]).affine), scan["mask"])
    monkeypatch.setattr(live, "VOXELS", 300)
    item = live.on_page(scan, HOW)
    assert item["start"] == [0, 0, 0] and item["step"] == [3, 2, 1]
    grey = torch.tensor(np.interp(canonical(scan["image"]), item["window"], (0, 255)))
    means = torch.nn.functional.avg_pool3d(grey[None], item["step"])[0]
    np.testing.assert_allclose(unpacked(item)["voxels"], means, atol=1)  # rounded before and after
    assert not unpacked(item)["inside"].any() and len(item["at"]) == 3


@pytest.mark.parametrize(("kept", "sent"), [("int16", "int16"), ("float64", "float32")])
def test_the_kernel_sends_the_stored_voxels_or_why_there_are_none(tmp_path, kept, sent):
    scan, answers = stored(tmp_path, "LPS"), []
    viewer, image = views.roi_viewer(pd.DataFrame([scan]), HOW), nib.load(scan["image"])
    viewer.send = lambda *answer: answers.append(answer)
    nib.save(nib.Nifti1Image(image.get_fdata().astype(kept), image.affine), scan["image"])
    voxels = canonical(scan["image"]).astype(sent)
    viewer._reply(viewer, {"number": 7, "question": 0}, [])
    Path(scan["image"]).write_bytes(b"no image")
    viewer._reply(viewer, {"number": 8, "question": 0}, [])
    (answer, buffers), (failed, none) = answers
    assert [answer["number"], failed["number"]] == [7, 8]
    assert answer["about"]["arrays"] == [["voxels", sent], ["cube", "uint8"], ["inside", "uint8"]]
    assert answer["about"]["scale"] == [0, 1] and buffers[0] == voxels.tobytes(order="F")
    assert scan["image"] in failed["about"]["wrong"] and none == []


def test_an_output_holds_a_picture_and_the_cases_of_a_page(phantom_scans):
    cases = phantom_scans[phantom_scans["center"].isin(["NYU", "AHN"])]
    viewer = views.roi_viewer(cases, HOW)
    data, _ = viewer._repr_mimebundle_()
    state = data[live.MIME]["state"]
    assert [case[1:] for case in state["cases"]] == [["NYU", "t2", 2], ["AHN", "t2", 2]]
    assert set(state["held"]) == {0, 1} and "wrong" not in state["held"][0]
    assert plt.imread(BytesIO(base64.b64decode(data["image/png"]))).ndim == 3 and not plt.get_fignums()
    assert len(viewer.state["cases"]) == len(cases) and viewer.state["held"] == {}  # live, it asks


def test_a_look_brings_its_heat_map_and_what_the_network_said(phantom_scans):
    scan = rows_of(phantom_scans, modality="t2", label=2).iloc[0]
    viewer = views.attention_viewer([look_of(scan)], phantom_scans)
    assert [case[0] for case in viewer.state["cases"]] == [scan["case_id"]]
    about, arrays = viewer.answer(0)
    assert set(np.unique(arrays["heat"])) == {0, 255} and (arrays["heat"] == 255).sum() == 8**3
    assert dict(about["facts"])["Grad-CAM of"] == "high risk, probability 0.25"


# ---- the data of FedProx by hand


@pytest.fixture(scope="module")
def walks():
    return by_hand.fedprox_by_hand().state


def test_the_walks_are_those_of_the_functions_that_train(walks):
    mu, steps, apart = (values[1] for _, values in walks["choices"])
    paths = by_hand.paths(by_hand.draw_centers(apart), mu, steps)
    found = walks["settings"]["1,1,1"]
    for client, walks_of in (found["walks"] | {"server": [found["server"]]}).items():
        mine = rows_of(paths, client=client)[by_hand.WEIGHTS]
        np.testing.assert_allclose(np.concatenate(walks_of), mine, atol=5.1e-4)  # three decimals
    far = by_hand.drift(paths).pivot(index="client", columns="round", values="distance")
    np.testing.assert_allclose([found["drift"][client] for client in far.index], far, atol=5.1e-4)


# ---- in Chromium


@pytest.fixture(scope="module")
def shown(tmp_path_factory, phantom_scans, tables, walks):
    """The cases of a page, what it holds of them, and its file."""
    folder = tmp_path_factory.mktemp("page")
    mirror = stored(folder, "LPS", HOSTILE)
    large = rows_of(phantom_scans, center="MCF", modality="t2", label=2).iloc[0]
    small = rows_of(phantom_scans, center="AHN", modality="t1", label=0).iloc[0]
    other = {"case_id": "broken", "label": 0, "class": "no risk", "image": str(folder / "none.nii.gz")}
    broken = pd.Series({**mirror, **other})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "VOXELS", 20_000)  # so that a phantom is cut and averaged
        cut = live.on_page(large, HOW, look_of(large))
    held = [live.on_page(mirror, HOW), cut, live.on_page(small, HOW), live.on_page(broken, HOW)]
    cases = pd.DataFrame([mirror, large, small, broken])
    viewer = live.viewer_state(cases, HOW) | {"held": dict(enumerate(held))}
    states = {"viewer": viewer, "explorer": explorer.explorer_state(*tables, COHORT), "by_hand": walks}
    return cases, held, browser.write_page(folder / "page.html", states)


@pytest.fixture
def page(chromium, shown):
    """The live page in a separate window; at the end it has logged no error and requested nothing."""
    with chromium.new_context(viewport={"width": 900, "height": 900}, offline=True) as context:
        (errors, requests), page = browser.listen(context), context.new_page()
        page.goto(shown[2].as_uri())
        page.wait_for_selector(".ipmn-view .plane")  # the last to come to life
        yield page
        assert errors == requests == [] and page.evaluate("window.hacked") is None


def choose(page, view="explorer", **chosen):
    for label, option in chosen.items():
        control = page.locator(f"[data-view={view}]").get_by_label(label.replace("_", " "), exact=True)
        control.select_option(option)


def open_case(page, shown, k):
    scan = shown[0].iloc[k]
    choose(page, view="viewer", center=scan["center"], modality=scan["modality"], case=str(k))
    page.locator("dd", has_text=f"{scan['center']} {scan['case_id']}").wait_for()


def pixels(page, kind="image"):
    """The canvases of the image or the cube, axial, coronal, sagittal: (H, W, 3), 0 to 255."""
    found = page.locator(f"canvas[aria-label*='plane of the {kind}']")
    texts = found.evaluate_all("all => all.map(canvas => canvas.toDataURL().split(',')[1])")
    return [np.rint(plt.imread(BytesIO(base64.b64decode(t)))[..., :3] * 255).astype(int) for t in texts]


def sliders(page):
    """Positions of the sliders sagittal, coronal, axial: the voxel's indices."""
    return [int(page.get_by_label(name, exact=True).input_value()) for name in reversed(PLANES)]


def click(page, plane, x, y, kind="image"):
    """A click at a share of a canvas' width and height."""
    canvas = page.locator(f"canvas[aria-label^='{plane} plane of the {kind}']")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def check(pictures, volume, at, mm):
    """Pictures are the planes through voxel `at`: right, front, head first, a voxel's pixel in its middle."""
    for picture, (across, down) in zip(pictures, PLANES.values(), strict=True):
        axis, (height, width, _) = 3 - across - down, picture.shape
        expected = np.moveaxis(volume, axis, 0)[at[axis]][::-1, ::-1].T
        rows, columns = expected.shape
        assert width / height == pytest.approx(columns * mm[across] / (rows * mm[down]), rel=0.01)
        y, x = (np.arange(rows) + 0.5) / rows * height, (np.arange(columns) + 0.5) / columns * width
        colors = picture[np.ix_(y.astype(int), x.astype(int))]
        inner = np.outer(np.minimum(y, height - y) > 40, np.minimum(x, width - x) > 40)  # no letters
        cross = np.zeros(expected.shape, bool)
        cross[-1 - at[down]] = cross[:, -1 - at[across]] = True
        wanted = np.where(cross[..., None], CROSS, expected[..., None])
        assert (inner & ~cross).mean() > 0.3
        np.testing.assert_allclose(colors[inner], wanted[inner], atol=1)


def test_the_canvases_show_the_voxels_radiologically_and_true_to_millimetres(page, shown):
    item = shown[1][0]
    found, (low, high), box = unpacked(item), item["window"], np.array(item["box"])
    page.get_by_label("outline").uncheck()
    check(pixels(page), found["voxels"], item["at"], MM)
    for name, value in (("axial", "3"), ("coronal", "11"), ("sagittal", "15")):
        page.get_by_label(name, exact=True).fill(value)
    for name in ("window", "level"):
        page.get_by_label(name, exact=True).press("PageDown")
    width, level = (float(page.get_by_label(name, exact=True).input_value()) for name in ("window", "level"))
    assert width < high - low and level < (low + high) / 2
    values, ends = low + (high - low) / 255 * found["voxels"], (level - width / 2, level + width / 2)
    check(pixels(page), np.interp(values, ends, (0, 255)), (15, 11, 3), MM)
    cell = ((np.array((15, 11, 3)) + 0.5 - box[:, 0]) / box[:, 1] * SIZE).astype(int)
    check(pixels(page, "cube"), found["cube"], cell, (1, 1, 1))


def test_keys_and_the_wheel_step_through_slices_and_the_slider_says_slice_and_millimetres(page):
    axial, canvas = page.get_by_label("axial", exact=True), page.locator("canvas").first
    axial.fill("1")
    axial.press("ArrowRight")
    said = axial.get_attribute("aria-valuetext")
    assert said == "slice 3 of 6, 10.0 mm from the foot end" and page.get_by_text(said).is_visible()
    canvas.press("ArrowUp")
    assert sliders(page)[2] == 3
    canvas.hover()
    page.mouse.wheel(0, 100)
    browser.until(lambda: sliders(page)[2] == 2)


def test_a_click_moves_the_cross_hair_in_image_and_cube(page):
    click(page, "axial", 2.5 / 20, 4.5 / 16)  # third column from the right side, fifth row from the front
    click(page, "sagittal", 12.5 / 16, 1.5 / 6)
    assert sliders(page) == [17, 3, 4]
    click(page, "axial", 4.5 / SIZE, 11.5 / SIZE, kind="cube")  # cells 11 and 4 from the left and the back
    assert sliders(page)[:2] == [4 + int(11.5 / SIZE * 14), 3 + int(4.5 / SIZE * 11)]  # in the ROI's box
    assert not page.get_by_text("is outside the cube").is_visible()
    page.get_by_label("axial", exact=True).fill("0")
    assert page.get_by_text("is outside the cube").is_visible()


def test_the_outline_runs_round_the_mask(page, shown):
    page.get_by_label("axial", exact=True).fill("2")
    inside = np.argwhere(unpacked(shown[1][0])["inside"][::-1, ::-1, 2].T)
    with_it = pixels(page)[0]
    page.get_by_label("outline").uncheck()
    changed = np.argwhere((pixels(page)[0] != with_it).any(axis=2))
    scale = np.array(with_it.shape[:2]) / (16, 20)
    np.testing.assert_allclose(changed.min(axis=0), inside.min(axis=0) * scale, atol=3)
    np.testing.assert_allclose(changed.max(axis=0) + 1, (inside.max(axis=0) + 1) * scale, atol=3)


def test_a_close_up_shows_the_pancreas_and_12_mm_around_it(page, shown):
    open_case(page, shown, 2)
    page.get_by_label("close-up").check()
    click(page, "axial", 0.001, 0.001)  # farthest to the right and the front
    corner = np.sum(shown[1][2]["box"], axis=1) + 12 / np.array(shown[1][2]["spacing"])
    np.testing.assert_allclose(sliders(page)[:2], corner[:2], atol=1.5)


def test_a_heat_map_goes_and_comes_back_with_its_switch(page, shown):
    viewer, switch = page.locator("[data-view=viewer]"), page.get_by_label("Grad-CAM")
    assert switch.is_disabled()
    open_case(page, shown, 1)
    with_it = browser.pictures(viewer)
    browser.act(viewer, switch.uncheck)
    assert browser.act(viewer, switch.check) == with_it


def test_an_image_cut_and_averaged_keeps_its_numbers_and_its_place_in_the_cube(page, shown):
    item = shown[1][1]
    (first, length), spacing = np.transpose(item["box"]), np.array(item["spacing"])
    assert item["start"] == np.maximum(first - np.ceil(10 / spacing), 0).tolist()  # mm
    assert max(item["start"]) > 0 and max(item["step"]) > 1 and np.prod(item["shape"]) <= 20_000
    open_case(page, shown, 1)
    place = item["start"][0] + 7.5 * item["step"][0] - 0.5
    page.get_by_label("sagittal", exact=True).fill("7")
    said = f"slice {int(place) + 1} of {item['whole'][0]}, {place * spacing[0]:.1f} mm from the left"
    assert page.get_by_text(said, exact=True).is_visible()
    click(page, "axial", 7.5 / SIZE, 0.5, kind="cube")  # cell 8 from the left
    expected = (first[0] + 8.5 / SIZE * length[0] - item["start"][0]) / item["step"][0]
    assert sliders(page)[0] == int(expected)


def test_choices_list_their_cases_and_no_picture_stands_beside_an_empty_or_broken_one(page, shown):
    lists, canvas = page.locator("[data-view=viewer]"), page.locator("canvas").first
    names = lists.get_by_label("case", exact=True).locator("option")
    for center, modality, label in itertools.product(("NYU", "MCF", "AHN"), ("t2", "t1"), ("", "2", "0")):
        choose(page, view="viewer", center=center, modality=modality, **{"class": label})
        wanted = {"center": center, "modality": modality} | ({"label": int(label)} if label else {})
        expected = rows_of(shown[0], **wanted)["case_id"].tolist()
        assert names.all_inner_texts() == expected
        expect(canvas).to_be_visible(visible=expected not in ([], ["broken"]))
        expect(page.get_by_text("no such case")).to_be_visible(visible=not expected)
    choose(page, view="viewer", center="NYU", modality="t2", **{"class": ""}, case="3")
    page.get_by_text("none.nii.gz").wait_for()
    assert not canvas.is_visible()
    open_case(page, shown, 0)
    assert canvas.is_visible() and names.first.inner_text() == HOSTILE  # a name is text


@pytest.mark.parametrize("without", ["scripts", "whole data"])
def test_the_picture_stays_where_scripts_do_not_run_or_data_are_damaged(chromium, shown, tmp_path, without):
    text = shown[2].read_text(encoding="utf-8").replace('["voxels","uint8","', '["voxels","uint8","AAAA', 1)
    (tmp_path / "damaged.html").write_text(text, encoding="utf-8")
    page = chromium.new_page(java_script_enabled=without != "scripts", offline=True)
    page.goto((tmp_path / "damaged.html").as_uri())
    if without != "scripts":
        page.wait_for_selector(".forest")  # the other views are live
    assert page.locator("[data-view=viewer] img").is_visible() and page.locator("canvas").count() == 0
    page.close()


def cells(page, caption):
    """Rows of the table of that caption, as texts."""
    rows = page.locator("table", has_text=caption).locator("tbody tr").all()
    return [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows]


@pytest.mark.parametrize("place", ["binary t1 NYU", "binary t2 AHN", "binary t2 Global", "multiclass t2 MCF"])
def test_the_curves_and_counts_of_a_center_are_those_of_its_rows(page, tables, place):
    task, modality, center = place.split()
    choose(page, task=task, modality=modality, center=center, epoch="last")
    found = cells(page, "AUC of the curve")
    assert [row[0] for row in found] == (list(ARMS) if task == "binary" else ["DenseNet-121"])
    where = {} if center == "Global" else {"center": center}
    for name, auc, _ in found:
        choose(page, method_on_the_right=name)
        here = {"task": task, "modality": modality, "arm": ARMS.get(name, "densenet121"), "rule": "last"}
        rows = rows_of(tables[0], **where, **here)
        y, prob = metrics.y_and_prob(rows)
        matrix = [[int(n) for n in row[1:]] for row in cells(page, "rows: true class")]
        assert matrix == confusion_matrix(y, prob.argmax(axis=1), labels=range(len(prob[0]))).tolist()
        is_high, score = y == len(prob[0]) - 1, prob[:, -1]
        if name == "Local only" and center == "Global":
            assert auc == "n/a, see above" and page.get_by_text("share no scale").is_visible()
        elif not is_high.any():
            assert auc == "n/a: one class only"
        else:
            assert float(auc) == pytest.approx(roc_auc_score(is_high, score), abs=5.01e-4)


def test_the_most_wrong_cases_are_those_of_the_table_and_one_opens_in_the_viewer(page, tables):
    for modality, where in (("t1", {}), ("t1", {"center": "NYU"}), ("t2", {"center": "NYU"})):
        choose(page, modality=modality, **where)
        here = {"task": "binary", "modality": modality, "arm": "centralized", "rule": "best_test"}
        wrong = most_wrong(rows_of(tables[0], **here, **where))
        names = COHORT.names("binary")
        expected = [[w.case_id, w.center, names[w.y_true], names[w.predicted]] for w in wrong.itertuples()]
        found = cells(page, "worst predictions")
        assert [row[:4] for row in found] == expected
        np.testing.assert_allclose([float(row[4]) for row in found], wrong["probability"], atol=5.01e-4)
    open_case_of = page.get_by_role("button", name="show")
    assert open_case_of.get_attribute("aria-label") == f"show {HOSTILE}"  # the only one that is held
    choose(page, view="viewer", center="MCF")
    open_case_of.click()
    page.locator("dd", has_text=HOSTILE).wait_for()
    assert page.locator("[data-view=viewer]").evaluate("view => view.getBoundingClientRect().top") < 450


def test_the_plot_shows_the_summary_and_says_what_is_undefined(page, tables):
    choose(page, modality="t2", center="MCF", epoch="last")
    rows = rows_of(tables[1], task="binary", modality="t2", rule="last", metric="auc", center="MCF")
    rows = rows.set_index("arm").loc[list(ARMS.values())]
    points = page.get_by_role("button", name="MCF", exact=True).locator("rect:not(.ground)")
    x = points.evaluate_all("all => all.map(point => point.x.baseVal.value + 3.5)")
    np.testing.assert_allclose((np.array(x) - 90) / 740, rows["mean"], atol=1e-3)
    said = [row[2].replace("\u00a0", " ") for row in cells(page, "AUC of the curve")]
    assert said == [f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in rows.itertuples()]
    assert "n/a: no positive case" in page.get_by_role("button", name="AHN", exact=True).text_content()


def test_a_row_of_the_plot_chooses_its_center_by_mouse_and_by_key_and_arms_go_one_by_one(page):
    title, curves = page.locator("h4", has_text="ROC"), page.locator(".roc .curve")
    assert title.inner_text() == "ROC, all centers: high risk against the rest"
    page.get_by_role("button", name="MCF", exact=True).click()
    assert title.inner_text() == "ROC, MCF: high risk against the rest"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert title.inner_text() == "ROC, NYU: high risk against the rest"
    assert page.get_by_role("button", name="NYU", exact=True).get_attribute("aria-pressed") == "true"
    for n, name in enumerate(ARMS, 1):
        page.get_by_role("checkbox", name=name).uncheck()
        assert [row[0] for row in cells(page, "AUC of the curve")] == list(ARMS)[n:]
        assert curves.count() == 3 - n and page.locator(".forest .row").count() == 4


def test_mu_moves_the_walks_and_their_drift(page, walks):
    view, mu = page.locator("[data-view=by_hand]"), page.get_by_label("mu", exact=True)
    before = browser.pictures(view)
    browser.act(view, lambda: mu.press("ArrowRight"))
    drift = [[float(far) for far in row[1:]] for row in cells(page, "Drift")]
    np.testing.assert_allclose(drift, list(walks["settings"]["3,2,2"]["drift"].values()), atol=5.01e-3)
    assert browser.act(view, lambda: mu.press("ArrowLeft")) == before
    page.get_by_label("heterogeneity").fill("0")  # some contours are nowhere in the plane


def test_every_control_has_a_name_and_a_phone_shows_the_whole_width(page):
    unnamed = "all => all.filter(c => !c.labels?.length).map(c => c.outerHTML)"
    assert page.locator(".ipmn-view :is(input, select)").evaluate_all(unnamed) == []
    assert page.locator(".ipmn-view :is(button, [role=button], [role=img]):not([aria-label])").count() == 0
    for width in (900, 420):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
