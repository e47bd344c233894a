import base64
import hashlib
import json
import zlib
from io import BytesIO

import browser
import bs4
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from drawn import MM, ORIENTATIONS, stored
from sklearn.metrics import confusion_matrix

from ipmn_core import metrics, views
from ipmn_core.data import load_roi, to_cube
from ipmn_core.metrics import centers
from ipmn_core.names import CENTERS, LABEL_NAMES
from ipmn_core.views import by_hand, explorer, live
from ipmn_core.views.gradcam import Look
from ipmn_core.views.scans import scan_volumes, widest_slice

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
SIZE = 16  # edge of the cubes
HOSTILE = '</script><!--<img src="x" onerror="window.hacked=1"><script>window.hacked=1</script>&amp;$x$'
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


# ---- material


def three_class(n=24, seed=1):
    """Predictions of one three-class arm, one epoch, two folds."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    prob = rng.multinomial(8, (0.3, 0.3, 0.4), n) / 8  # with many ties
    frame = pd.DataFrame({"case_id": [f"case{k}" for k in range(n)], "center": np.resize(CENTERS[:2], n)})
    frame = frame.assign(modality="t2", task="three_class", arm="densenet121", fold=np.arange(n) % 2, seed=0)
    return frame.assign(epoch=3, y_true=y, **{f"prob_{k}": prob[:, k] for k in range(3)})


@pytest.fixture(scope="module")
def tables(binary_predictions):
    """What the explorer takes: both tasks, an arm more whose models are a center's own, intervals."""
    alone = binary_predictions[binary_predictions["arm"] == "centralized"].assign(arm="local_only")
    predictions = pd.concat([binary_predictions, alone, three_class()], ignore_index=True)
    predictions["case_id"] = predictions["case_id"].replace(_worst_at_nyu(predictions), HOSTILE)
    selected = centers.by_rules(predictions)
    return selected, centers.summary(selected, n_resamples=50)


def _worst_at_nyu(predictions):
    rows = predictions[(predictions["arm"] == "centralized") & (predictions["modality"] == "t2")]
    return centers.most_wrong(rows[rows["center"] == "NYU"])["case_id"].iloc[0]


def arrays_of(item):
    """The arrays of a case on a page, by name: their bytes."""
    found = {name: zlib.decompress(base64.b64decode(text)) for name, _, text in item["arrays"]}
    return {name: np.frombuffer(text, np.uint8) for name, text in found.items()}


def volume_of(item):
    return arrays_of(item)["voxels"].reshape(item["shape"], order="F")


def mask_of(item):
    bits = np.unpackbits(arrays_of(item)["inside"], bitorder="little")[: np.prod(item["shape"])]
    return bits.reshape(item["shape"], order="F").astype(bool)


def look_of(scan):
    """A look at the middle of the cube of `scan`."""
    heat = np.zeros((SIZE,) * 3, np.float32)
    heat[4:12, 4:12, 4:12] = 1
    names = [scan[key] for key in ("case_id", "center", "label")]
    turn = nib.io_orientation(nib.load(scan["image"]).affine)
    seen = {"modality": scan["modality"], "prob": 0.25, "heat": heat}
    return Look(*names, heat, heat, np.ones(3), turn, **seen)


def rows_of(selected, view, arm, rule="best_test", center=None):
    """The rows that the explorer shows for a view's task and modality."""
    rows = selected[(selected["task"] == view["task"]) & (selected["modality"] == view["modality"])]
    rows = rows[(rows["arm"] == arm) & (rows["rule"] == rule)]
    return rows if center is None else rows[rows["center"] == center]


# ---- the viewer's data


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_volumes_are_the_windowed_image_and_the_mask_in_ras_whatever_is_stored(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    item = live.on_page(scan, SIZE)
    image, mask, _ = scan_volumes(scan)
    volume = np.asanyarray(image.dataobj)
    low, high = np.percentile(volume, (1, 99.5))
    shown = volume_of(item)
    np.testing.assert_allclose(shown, np.interp(volume, (low, high), (0, 255)), atol=0.5 + 1e-3)
    np.testing.assert_array_equal(mask_of(item), mask)
    assert mask[tuple(item["at"])] and item["at"][2] == widest_slice(mask)
    np.testing.assert_allclose(item["spacing"], MM, rtol=1e-6)
    assert item["window"] == [low, high] and item["whole"] == item["shape"] == [20, 16, 6]
    assert (np.argwhere(shown == 255) >= (15, 11, 3)).all()  # the marker: right, front, head
    assert dict(item["facts"])["axes"] == orientation and dict(item["facts"])["units"] == "unknown"
    roi = load_roi(scan["image"], scan["mask"])
    cube = to_cube(np.asanyarray(roi.dataobj), SIZE).astype(float)
    turned = nib.apply_orientation(cube, nib.io_orientation(nib.load(scan["image"]).affine))
    # a sum in another order may differ in float16's last bit, 0.06 of 255
    np.testing.assert_allclose(
        arrays_of(item)["cube"].reshape((SIZE,) * 3, order="F"), 255 * turned, atol=0.6
    )
    assert item["box"] == [[4, 14], [3, 11], [1, 4]]


def test_a_clean_roi_without_a_mask_has_no_outline_and_is_its_own_box(phantom_scans, tmp_path):
    scan = phantom_scans.iloc[0].copy()
    nib.save(load_roi(scan["image"], scan["mask"]), tmp_path / "roi.nii.gz")
    scan["image"], scan["mask"] = str(tmp_path / "roi.nii.gz"), ""
    item = live.on_page(scan, SIZE)
    assert "inside" not in arrays_of(item) and item["box"] == [[0, n] for n in item["shape"]]
    assert volume_of(item)[tuple(item["at"])] > 0


def test_a_large_image_is_cut_to_the_pancreas_and_averaged_until_it_fits():
    box = (slice(100, 300), slice(200, 300), slice(0, 20))
    spacing = (0.5, 0.5, 4.0)
    cut, step = live.framing((400, 400, 30), spacing, box, 50_000)
    assert cut == (slice(80, 320), slice(180, 320), slice(0, 23))  # 10 mm more, as far as the image goes
    length = np.array([240, 140, 23])
    assert step == (4, 4, 1) and np.prod(length // step) <= 50_000 < np.prod(length // (3, 3, 1))
    whole, one = live.framing((400, 400, 30), spacing, box, 400 * 400 * 30)
    assert whole == (slice(0, 400), slice(0, 400), slice(0, 30)) and one == (1, 1, 1)


def test_what_is_cut_and_averaged_lies_where_it_lay(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "VOXELS", 300)
    item = live.on_page(stored(tmp_path, "LPS"), SIZE)
    assert (
        item["start"] == [0, 0, 0] and item["step"] == [3, 2, 1] and item["shape"] == [6, 8, 6]
    )  # 10 mm is far
    marker = np.argwhere(volume_of(item) > 200).mean(axis=0)
    place = np.add(item["start"], (marker + 0.5) * item["step"] - 0.5)
    np.testing.assert_allclose(place, (16, 12, 3.5), atol=1)
    assert dict(item["facts"])["shown"].endswith("means of 3 × 2 × 1 voxels")


def test_a_mask_thinner_than_the_blocks_is_no_obstacle(tmp_path, monkeypatch):
    scan, mask = stored(tmp_path, "RAS"), np.zeros((20, 16, 6), np.uint8)
    mask[:, 8, 2] = 1
    nib.save(nib.Nifti1Image(mask, nib.load(scan["image"]).affine), scan["mask"])
    monkeypatch.setattr(live, "VOXELS", 300)
    item = live.on_page(scan, SIZE)
    assert not mask_of(item).any() and len(item["at"]) == 3


def test_averages_are_the_means_of_blocks():
    volume = np.random.default_rng(0).integers(0, 255, (7, 6, 3)).astype(np.uint8)
    means = live.averaged(volume, (2, 3, 1))
    assert means.shape == (3, 2, 3)
    for i, j, k in np.ndindex(means.shape):
        assert means[i, j, k] == np.rint(volume[2 * i : 2 * i + 2, 3 * j : 3 * j + 3, k].mean())


def test_a_unit_that_is_none_of_niftis_is_unknown(tmp_path):
    scan = stored(tmp_path, "RAS")
    plain = tmp_path / "plain.nii"
    nib.save(nib.load(scan["image"]), plain)
    content = bytearray(plain.read_bytes())
    content[123] = 5  # xyzt_units
    plain.write_bytes(content)
    scan["image"] = str(plain)
    item = live.on_page(scan, SIZE)
    assert dict(item["facts"])["units"] == "unknown"


def test_the_kernel_answers_with_the_voxels_as_they_are_stored(tmp_path):
    scan = stored(tmp_path, "LPS")
    whole = nib.load(scan["image"])
    nib.save(nib.Nifti1Image(whole.get_fdata().astype(np.int16), whole.affine), scan["image"])
    viewer, sent = views.roi_viewer(pd.DataFrame([scan]), SIZE), []
    viewer.send = lambda content, buffers: sent.append((content, buffers))
    viewer._reply(viewer, {"number": 7, "question": 0}, [])
    ((content, buffers),) = sent
    about = content["about"]
    assert content["number"] == 7 and about["scale"] == [0, 1] and about["step"] == [1, 1, 1]
    assert about["arrays"] == [["voxels", "int16"], ["cube", "uint8"], ["inside", "uint8"]]
    image = nib.as_closest_canonical(nib.load(scan["image"]))
    voxels = np.frombuffer(buffers[0], np.int16).reshape(about["shape"], order="F")
    np.testing.assert_array_equal(voxels, np.asanyarray(image.dataobj))


def test_a_case_that_cannot_be_read_is_a_sentence(tmp_path):
    scan = stored(tmp_path, "RAS")
    scan["image"] = str(tmp_path / "broken.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    (about, arrays), item = live.answering(pd.DataFrame([scan]), SIZE)(0), live.on_page(scan, SIZE)
    assert about == item and "broken.nii.gz" in item["wrong"] and arrays == {}


def test_an_output_holds_a_picture_and_the_cases_of_a_page(phantom_scans):
    cases = phantom_scans[phantom_scans["center"].isin(["NYU", "AHN"])]
    data, _ = views.roi_viewer(cases, SIZE)._repr_mimebundle_()
    state = data[live.MIME]["state"]
    assert [case[1:] for case in state["cases"]] == [["NYU", "t2", 2], ["AHN", "t2", 2]]
    assert set(state["held"]) == {0, 1} and "wrong" not in state["held"][0]
    assert plt.imread(BytesIO(base64.b64decode(data["image/png"]))).ndim == 3 and not plt.get_fignums()
    every = views.roi_viewer(cases, SIZE).state
    assert len(every["cases"]) == len(cases) and every["held"] == {}


def test_a_look_brings_its_heat_map_and_what_the_network_said(phantom_scans):
    scan = phantom_scans[(phantom_scans["modality"] == "t2") & (phantom_scans["label"] == 2)].iloc[0]
    viewer = views.attention_viewer([look_of(scan)], phantom_scans)
    assert [case[0] for case in viewer.state["cases"]] == [scan["case_id"]]
    about, arrays = viewer.answer(0)
    assert arrays["heat"].max() == 255 and arrays["heat"].shape == arrays["cube"].shape
    assert dict(about["facts"])["Grad-CAM of"] == "high risk, probability 0.25"


# ---- the explorer's data


def test_probabilities_come_back_as_the_networks_gave_them(tables):
    selected, _ = tables
    data = explorer.explorer_state(*tables)
    for view in data["views"]:
        for scored in view["scores"]:
            rows = rows_of(selected, view, view["arms"][scored["arm"]]["name"], scored["rule"])
            table = np.frombuffer(base64.b64decode(scored["p"]), "<f4").reshape(-1, len(view["classes"]))
            place = [view["cases"]["id"].index(case) for case in rows["case_id"]]
            _, prob = metrics.y_and_prob(rows)
            np.testing.assert_array_equal(table[place], np.float32(prob))
            assert np.isfinite(table).all(axis=1).sum() == len(rows)


def test_rows_of_the_summary_keep_their_place_and_say_why_they_are_undefined(tables):
    _, summary = tables
    data = explorer.explorer_state(*tables)
    (view,) = (v for v in data["views"] if (v["task"], v["modality"]) == ("binary", "t2"))
    assert [arm["name"] for arm in view["arms"]] == ["centralized", "fedprox_0.1", "local_only"]
    assert view["centers"] == ["NYU", "MCF", "AHN", "Global"]
    rows = {tuple(row[:4]): row[4:] for row in view["summary"]}
    here = summary[(summary["task"] == "binary") & (summary["modality"] == "t2")]
    assert len(rows) == len(here)
    assert rows[0, "last", "auc", 2][0] is None and "high-risk" in rows[0, "last", "auc", 2][3]
    (mcf,) = here[
        (here["arm"] == "fedprox_0.1")
        & (here["rule"] == "last")
        & (here["metric"] == "acc")
        & (here["center"] == "MCF")
    ].itertuples()
    assert rows[1, "last", "acc", 1][:3] == [round(v, 3) for v in (mcf.mean, mcf.low, mcf.high)]


def test_rows_that_cannot_be_right_are_refused(tables):
    selected, summary = tables
    with pytest.raises(ValueError, match="no results to show"):
        explorer.explorer_state(selected.head(0), summary)
    with pytest.raises(ValueError, match="is given twice"):
        explorer.explorer_state(pd.concat([selected, selected.tail(1)]), summary)
    other = selected.tail(1).assign(arm="resnet34", y_true=lambda t: (t["y_true"] + 1) % 3)
    with pytest.raises(ValueError, match="two labels or centers"):
        explorer.explorer_state(pd.concat([selected, other]), summary)
    with pytest.raises(ValueError, match="not finite"):
        explorer.explorer_state(selected.assign(prob_1=selected["prob_1"].where(selected.index > 0)), summary)


def test_no_name_ends_the_script_or_becomes_an_element(tmp_path, tables):
    scan = stored(tmp_path, "RAS", HOSTILE)
    scan["center"] = HOSTILE
    held = live.viewer_state(pd.DataFrame([scan]), SIZE) | {"held": {0: live.on_page(scan, SIZE)}}
    renamed = {"center": lambda t: t["center"].replace("NYU", HOSTILE)}
    results = explorer.explorer_state(*(table.assign(**renamed) for table in tables))
    for view, state in (("viewer", held), ("explorer", results)):
        html = live.as_html({"view": view, "alt": HOSTILE, "state": state}, "")
        soup = bs4.BeautifulSoup(html, "html.parser")
        assert [tag.name for tag in soup.find_all(True)] == ["div", "img", "script"]
        assert soup.script["type"] == "application/json" and soup.img["alt"] == HOSTILE
        assert not set("<>&") & set(soup.script.string) and soup.script.string.isascii()
        assert HOSTILE in json.dumps(json.loads(soup.script.string)).replace('\\"', '"')


# ---- FedProx by hand


@pytest.fixture(scope="module")
def by_hand_view():
    return by_hand.fedprox_by_hand()


def test_the_walks_are_those_of_the_functions_that_train(by_hand_view):
    state, centers = by_hand_view.state, by_hand.draw_centers(0.5)
    paths = by_hand.paths(centers, by_hand.CHOICES["mu"][1], by_hand.CHOICES["local steps"][1])
    found, server = state["settings"]["1,1,1"], paths[paths["client"] == by_hand.SERVER]
    np.testing.assert_allclose(found["server"], server[by_hand.WEIGHTS], atol=5.1e-4)  # three decimals
    for client, walks in found["walks"].items():
        mine = paths[paths["client"] == client][by_hand.WEIGHTS]
        np.testing.assert_allclose(np.concatenate(walks), mine, atol=5.1e-4)
    far = by_hand.drift(paths).pivot(index="client", columns="round", values="distance")
    np.testing.assert_allclose([found["drift"][c] for c in far.index], far, atol=5.1e-4)
    assert len(state["settings"]) == np.prod([len(values) for _, values in state["choices"]])


# ---- in a browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory, phantom_scans, tables, by_hand_view):
    """The rows of a viewer, and a page that holds it and an explorer under the report's policy, as a file."""
    folder = tmp_path_factory.mktemp("page")
    mirror = stored(folder, "LPS", HOSTILE)
    phantoms = phantom_scans[(phantom_scans["modality"] == "t2") & (phantom_scans["label"] == 2)].head(2)
    scans = pd.concat([pd.DataFrame([mirror]), phantoms], ignore_index=True)
    script, style = live.module(), live.css()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    broken = scans.iloc[[1]].assign(case_id="broken", image=str(folder / "none.nii.gz"))
    listed = pd.concat([scans, broken], ignore_index=True)
    looks = [None, look_of(scans.iloc[1]), None, None]
    rows = zip(listed.iterrows(), looks, strict=True)
    held = [live.on_page(scan, SIZE, look) for (_, scan), look in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "VOXELS", 20_000)  # so that a phantom is cut and averaged
        held[1] = live.on_page(scans.iloc[1], SIZE, looks[1])
    viewer = live.viewer_state(listed, SIZE) | {"held": dict(enumerate(held))}
    states = {"viewer": viewer, "explorer": explorer.explorer_state(*tables), "by_hand": by_hand_view.state}
    states = json.loads(json.dumps(states, sort_keys=True))  # as a notebook on disk has them
    shown = [live.as_html({"view": v, "alt": v, "state": s}, PIXEL) for v, s in states.items()]
    (folder / "page.html").write_text(
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style></head>'
        f'<body>{"".join(shown)}<script type="module">{script}</script></body></html>',
        encoding="utf-8",
    )
    return held, scans, folder / "page.html"


@pytest.fixture(scope="module")
def window(chromium, shown):
    """The page in one window for all tests, and what it said and asked for."""
    context = chromium.new_context(viewport={"width": 900, "height": 900}, offline=True)
    page, noise = context.new_page(), []
    page.on("console", lambda line: noise.append(line.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if request.url[:5] != "data:" else None)
    page.goto(shown[2].as_uri())
    page.wait_for_selector(".ipmn-view canvas")
    yield page, noise
    context.close()


@pytest.fixture
def page(window):
    """The page, live, as it opens."""
    page, noise = window
    noise.clear()
    page.reload()
    page.wait_for_selector(".ipmn-view canvas")
    page.wait_for_selector(".ipmn-view .plane")
    noise[:] = [line for line in noise if line != page.url]
    yield page
    assert noise == [] and page.evaluate("window.hacked") is None


def open_case(page, scan):
    """Choose the center, modality and case of a viewer, as a person does."""
    for label, value in (("center", scan["center"]), ("modality", scan["modality"])):
        page.locator("[data-view=viewer]").get_by_label(label, exact=True).select_option(value)
    page.get_by_label("case", exact=True).select_option(label=scan["case_id"])


def pixels(page, kind="image"):
    """The canvases of the image or the cube, axial, coronal, sagittal: (H, W, 3), 0 to 255."""
    found = page.locator(f"canvas[aria-label*='plane of the {kind}']").all()
    texts = (canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2] for canvas in found)
    pictures = (plt.imread(BytesIO(base64.b64decode(text))) for text in texts)
    return [np.rint(picture[..., :3] * 255).astype(int) for picture in pictures]


def sliders(page):
    """Positions of the sliders in the order of the voxel's indices: sagittal, coronal, axial."""
    names = ("sagittal", "coronal", "axial")
    return [int(page.get_by_label(name, exact=True).input_value()) for name in names]


def move(page, name, value):
    page.get_by_label(name, exact=True).evaluate(
        "(range, value) => { range.value = value; range.dispatchEvent(new Event('input')) }", value
    )


def click(page, plane, x, y, kind="image"):
    """A click at a share of a canvas' width and height."""
    canvas = page.locator(f"canvas[aria-label^='{plane} plane of the {kind}']")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def flat(volume, at):
    """The three planes through voxel `at` from their top left, as radiologists see them."""
    i, j, k = at
    return [volume[::-1, ::-1, k].T, volume[::-1, j, ::-1].T, volume[i, ::-1, ::-1].T]


def at_centers(picture, shape):
    """The color of each voxel, read at the pixel in its middle: (rows, columns, 3)."""
    rows, columns = (
        ((np.arange(n) + 0.5) * length / n).astype(int)
        for n, length in zip(shape, picture.shape[:2], strict=True)
    )
    return picture[np.ix_(rows, columns)]


def test_the_canvases_show_the_voxels_radiologically_and_true_to_millimetres(page, shown):
    item = shown[0][0]
    volume, size = volume_of(item), np.multiply(item["shape"], MM)
    page.get_by_label("outline").uncheck()
    pictures = pixels(page)
    for picture, expected, (down, across) in zip(
        pictures, flat(volume, item["at"]), ((1, 0), (2, 0), (2, 1)), strict=True
    ):
        assert picture.shape[1] / picture.shape[0] == pytest.approx(size[across] / size[down], rel=0.01)
        colors = at_centers(picture, expected.shape)
        grey = (colors == colors[..., :1]).all(axis=2)  # not the cross-hair
        same = np.abs(colors[..., 0] - expected) <= 1
        assert grey.mean() > 0.75 and same[grey].mean() > 0.9  # letters hide some
        columns = (np.arange(grey.shape[1]) + 0.5) / grey.shape[1]
        inner = abs(columns - 0.5) < 0.3  # no letters, which are grey at their edges
        assert not grey[-1 - item["at"][down], inner].any()


def test_the_patients_right_front_and_head_are_on_the_left_and_on_top(page):
    move(page, "axial", 4)
    move(page, "coronal", 12)
    move(page, "sagittal", 16)
    for kind in ("image", "cube"):
        for picture in pixels(page, kind):
            colors = picture.min(axis=2)
            colors = np.where(np.ptp(picture, axis=2) < 3, colors, 0)
            height, width = colors.shape
            rows, columns = np.nonzero(colors > 240)
            inner = (abs(columns / width - 0.5) < 0.42) & (abs(rows / height - 0.5) < 0.42)  # no letters
            assert columns[inner].mean() < 0.4 * width and rows[inner].mean() < 0.45 * height


def test_every_slider_changes_its_picture(page):
    for name, least in (("axial", 1), ("coronal", 3), ("sagittal", 5), ("window", 90), ("level", 110)):
        before, cube = pixels(page), pixels(page, "cube")
        move(page, name, least)
        assert any((a != b).any() for a, b in zip(before, pixels(page), strict=True)), name
        moved = any((a != b).any() for a, b in zip(cube, pixels(page, "cube"), strict=True))
        assert moved == (name not in ("window", "level"))


def test_a_key_moves_a_slice_and_the_label_says_slice_and_millimetres(page):
    move(page, "axial", 1)
    page.get_by_label("axial", exact=True).press("ArrowRight")
    said = page.get_by_label("axial", exact=True).get_attribute("aria-valuetext")
    assert said == "slice 3 of 6, 10.0 mm from the foot end"
    assert page.get_by_text(said).is_visible()


def test_a_click_moves_the_cross_hair_in_the_other_planes(page):
    before = pixels(page)
    click(page, "axial", 2.5 / 20, 4.5 / 16)  # third column from the right side, fifth row from the front
    assert sliders(page)[:2] == [17, 11]
    assert all((a != b).any() for a, b in zip(before, pixels(page), strict=True))
    click(page, "sagittal", 12.5 / 16, 1.5 / 6)
    assert sliders(page) == [17, 3, 4]


def test_the_cross_hair_is_the_same_place_in_the_cube(page):
    click(page, "axial", 4.5 / SIZE, 11.5 / SIZE, kind="cube")  # cells 11 and 4 from the left and the back
    i, j, _ = sliders(page)
    assert i == 4 + int(11.5 / SIZE * 14) and j == 3 + int(
        4.5 / SIZE * 11
    )  # the ROI's box: 14 x 11 from 4, 3
    assert not page.get_by_text("lies outside").is_visible()
    move(page, "axial", 0)
    assert page.get_by_text("lies outside").is_visible()


def test_wheel_and_arrow_keys_step_through_the_slices(page):
    axial = page.locator("canvas[aria-label^='axial plane of the image']")
    before = sliders(page)
    axial.press("ArrowUp")
    assert sliders(page) == [*before[:2], before[2] + 1]
    axial.hover()
    page.mouse.wheel(0, 100)
    browser.until(lambda: sliders(page) == before)


def test_a_close_up_shows_the_pancreas_and_its_surroundings(page, shown):
    open_case(page, shown[1].iloc[2])
    item, before = shown[0][2], pixels(page)
    page.get_by_label("close-up").check()
    shape, (start, length) = pixels(page)[0].shape, np.transpose(item["box"])
    more = 12 / np.array(item["spacing"])
    ends = np.maximum(start - more, 0), np.minimum(start + length + more, item["shape"])
    mm = np.subtract(*ends[::-1]) * item["spacing"]
    assert shape != before[0].shape and shape[1] / shape[0] == pytest.approx(mm[0] / mm[1], rel=0.03)
    click(page, "axial", 0.5, 0.5)
    np.testing.assert_allclose(sliders(page)[:2], np.mean(ends, axis=0)[:2], atol=1.5)
    page.get_by_label("close-up").uncheck()
    assert pixels(page)[0].shape == before[0].shape


def test_a_heat_map_goes_and_comes_back_with_its_switch(page, shown):
    assert page.get_by_label("Grad-CAM").is_disabled()
    open_case(page, shown[1].iloc[1])
    page.locator("dd", has_text="high risk, probability 0.25").wait_for()
    with_it = pixels(page, "cube")
    page.get_by_label("Grad-CAM").uncheck()
    without = pixels(page, "cube")
    assert any((a != b).any() for a, b in zip(with_it, without, strict=True))
    page.get_by_label("Grad-CAM").check()
    assert all((a == b).all() for a, b in zip(with_it, pixels(page, "cube"), strict=True))


def test_the_lists_hold_the_cases_of_center_modality_and_class(page, shown):
    viewer, scans = page.locator("[data-view=viewer]"), shown[1]
    case = page.get_by_label("case", exact=True)
    for center in scans["center"].unique():
        viewer.get_by_label("center", exact=True).select_option(center)
        expected = scans.loc[scans["center"] == center, "case_id"].tolist()
        names = case.locator("option").all_inner_texts()
        assert [name for name in names if name != "broken"] == expected
    viewer.get_by_label("class", exact=True).select_option("2")
    assert len(case.locator("option").all()) == len(names) and page.locator("canvas").first.is_visible()


def test_a_broken_case_is_a_sentence_and_no_other_patients_picture(page):
    canvas = page.locator("canvas").first
    case = page.get_by_label("case", exact=True)
    for center in (
        page.locator("[data-view=viewer]").get_by_label("center", exact=True).locator("option").all()
    ):
        page.locator("[data-view=viewer]").get_by_label("center", exact=True).select_option(
            center.inner_text()
        )
        if "broken" in case.locator("option").all_inner_texts():
            break
    case.select_option(label="broken")
    page.get_by_text("none.nii.gz").wait_for()
    assert not canvas.is_visible()
    case.select_option(index=0)
    browser.until(canvas.is_visible)


def test_mu_moves_the_walk_of_both_clients(page, by_hand_view):
    plane = page.locator(".plane")
    before = plane.evaluate("svg => svg.outerHTML")
    names = page.locator("[data-view=by_hand] label").all_inner_texts()
    assert names == ["mu", "local steps", "heterogeneity"]
    move(page, "mu", 0)
    drawn = plane.evaluate("svg => svg.outerHTML")
    assert drawn != before and page.get_by_label("mu", exact=True).get_attribute("aria-valuetext") == "0"
    server = page.locator(".server").get_attribute("d")  # of mu 0, 20 local steps, heterogeneity 1
    ends = np.array(by_hand_view.state["settings"]["0,2,2"]["server"][-1])
    x, y = map(float, server.rpartition("L")[2].split())
    span = np.subtract(*by_hand.LIMITS[::-1])
    np.testing.assert_allclose(
        [(x - 40) / 420, (430 - y) / 420], (ends - by_hand.LIMITS[0]) / span, atol=1e-3
    )
    move(page, "mu", 2)
    assert plane.evaluate("svg => svg.outerHTML") == before


def test_the_outline_runs_round_the_mask(page, shown):
    _, mask, _ = scan_volumes(shown[1].iloc[0])
    move(page, "axial", 2)
    with_it = pixels(page)[0]
    page.get_by_label("outline").uncheck()
    changed = np.argwhere((pixels(page)[0] != with_it).any(axis=2))
    inside = np.argwhere(flat(mask, (0, 0, 2))[0])
    scale = np.array(with_it.shape[:2]) / (16, 20)
    np.testing.assert_allclose(changed.min(axis=0), inside.min(axis=0) * scale, atol=3)
    np.testing.assert_allclose(changed.max(axis=0) + 1, (inside.max(axis=0) + 1) * scale, atol=3)


def test_a_cut_and_averaged_image_keeps_its_numbers_and_its_place_in_the_cube(page, shown):
    item = shown[0][1]
    assert max(item["start"]) > 0 and max(item["step"]) > 1
    before = pixels(page)
    name = shown[1].iloc[1]["case_id"]
    open_case(page, shown[1].iloc[1])
    page.locator("dd", has_text=name).wait_for()
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(before, pixels(page), strict=True))
    move(page, "sagittal", 7)
    place = item["start"][0] + 7.5 * item["step"][0] - 0.5
    said = page.get_by_label("sagittal", exact=True).get_attribute("aria-valuetext")
    mm = f"{place * item['spacing'][0]:.1f} mm from the left"
    assert said == f"slice {int(place) + 1} of {item['whole'][0]}, {mm}"
    click(page, "axial", 7.5 / SIZE, 0.5, kind="cube")  # cell 8 from the left
    start, length = item["box"][0]
    middle = start + 8.5 / SIZE * length
    assert sliders(page)[0] == int((middle - item["start"][0]) / item["step"][0])


def test_a_hostile_name_is_text(page):
    assert page.get_by_label("case").locator("option").first.inner_text().startswith(HOSTILE)
    assert page.locator("dd", has_text="onerror").inner_text() == f"NYU {HOSTILE}, T2"
    assert page.locator("img").count() == 0


def test_the_picture_stays_where_scripts_do_not_run_or_data_are_damaged(chromium, shown, tmp_path):
    still = chromium.new_context(java_script_enabled=False, offline=True).new_page()
    still.goto(shown[2].as_uri())
    assert [image.is_visible() for image in still.locator(".ipmn-view img").all()] == [True] * 3
    text = shown[2].read_text(encoding="utf-8").replace('["voxels","uint8","', '["voxels","uint8","AAAA', 1)
    (tmp_path / "damaged.html").write_text(text, encoding="utf-8")
    page = chromium.new_context(offline=True).new_page()
    page.goto((tmp_path / "damaged.html").as_uri())
    page.wait_for_selector(".ipmn-view .forest")
    assert page.locator("[data-view=viewer] img").is_visible() and page.locator("canvas").count() == 0
    for tab in (still, page):
        tab.context.close()


def choose(page, **chosen):
    for label, option in chosen.items():
        results = page.locator("[data-view=explorer]")
        results.get_by_label(label.replace("_", " "), exact=True).select_option(option)


def cells(page, caption):
    """Rows of the table of that caption, as texts."""
    rows = page.locator("table", has_text=caption).locator("tbody tr").all()
    return [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows]


NAMES = {"Centralized": "centralized", "FedProx (μ=0.1)": "fedprox_0.1", "Local only": "local_only"}


@pytest.mark.parametrize(("modality", "center"), [("t1", "NYU"), ("t2", "AHN"), ("t2", "Global")])
def test_the_legend_has_the_auc_and_the_matrix_the_counts(page, tables, modality, center):
    choose(page, modality=modality, center=center, epoch="last")
    view, where = {"task": "binary", "modality": modality}, None if center == "Global" else center
    found = {NAMES[name]: auc for name, auc, _ in cells(page, "AUC of the curve")}
    assert list(found) == list(NAMES.values())
    for arm, auc in found.items():
        expected = metrics.auc(*metrics.y_and_prob(rows_of(tables[0], view, arm, "last", where)))
        if arm == "local_only" and center == "Global":
            assert auc == "n/a, see below" and page.get_by_text("share no scale").is_visible()
        elif np.isnan(expected):
            assert auc == "n/a: one class only"
        else:
            assert float(auc) == pytest.approx(expected, abs=5.01e-4)  # three decimals
    for name, arm in NAMES.items():
        choose(page, method_on_the_right=name)
        y, prob = metrics.y_and_prob(rows_of(tables[0], view, arm, "last", where))
        counts = confusion_matrix(y, prob.argmax(axis=1), labels=[0, 1]).tolist()
        assert [list(map(int, row[1:])) for row in cells(page, "rows: true class")] == counts


def test_three_classes_have_their_own_arms_and_counts_and_high_risk_against_the_rest(page, tables):
    choose(page, task="three classes")
    rows = rows_of(tables[0], {"task": "three_class", "modality": "t2"}, "densenet121")
    y, prob = metrics.y_and_prob(rows)
    ((name, auc, _),) = cells(page, "AUC of the curve")
    expected = metrics.auc(y == 2, np.column_stack([1 - prob[:, 2], prob[:, 2]]))
    assert name == "DenseNet-121" and float(auc) == pytest.approx(expected, abs=5.01e-4)
    counts = confusion_matrix(y, prob.argmax(axis=1)).tolist()
    assert [list(map(int, row[1:])) for row in cells(page, "rows: true class")] == counts
    heights = page.locator(".histogram .bar").evaluate_all(
        "bars => bars.map(bar => bar.height.baseVal.value)"
    )
    bins = np.concatenate([np.histogram(prob[y == k, 2], np.linspace(0, 1, 21))[0] for k in range(3)])
    np.testing.assert_allclose(np.array(heights) / max(heights), bins / bins.max(), atol=1e-6)
    guides = page.locator(".forest .guide")  # chance, of an AUC only
    assert guides.count() == page.locator(".forest .row").count() > 0
    choose(page, metric="accuracy")
    assert guides.count() == 0
    assert (
        page.locator(".forest").get_attribute("aria-label") == "accuracy, all test cases, with 95 % interval"
    )


def test_the_most_wrong_cases_are_those_of_the_table_and_names_are_text(page, tables):
    choose(page, modality="t1")
    wrong = centers.most_wrong(rows_of(tables[0], {"task": "binary", "modality": "t1"}, "centralized"))
    expected = [
        [case.case_id, case.center, *(LABEL_NAMES[True][k] for k in (case.y_true, case.predicted))]
        for case in wrong.itertuples()
    ]
    found = cells(page, "cases most wrong")
    assert [row[:4] for row in found] == expected
    np.testing.assert_allclose([float(row[4]) for row in found], wrong["probability"], atol=5.01e-4)
    choose(page, center="NYU", method_on_the_right="FedProx (μ=0.1)")
    for modality in ("t1", "t2"):
        choose(page, modality=modality)
        here = {"task": "binary", "modality": modality}
        wrong = centers.most_wrong(rows_of(tables[0], here, "centralized", center="NYU"))
        assert [row[0] for row in cells(page, "cases most wrong")] == wrong["case_id"].tolist()


def test_a_case_that_the_viewer_holds_opens_there(page):
    choose(page, modality="t2", center="NYU")
    (button,) = page.get_by_role("button", name="show").all()
    assert button.get_attribute("aria-label") == f"show {HOSTILE}"
    button.click()
    page.locator("dd", has_text="onerror").wait_for()
    assert page.get_by_label("case", exact=True).evaluate("list => list.value") == "0"
    assert page.locator("[data-view=viewer]").evaluate("view => view.getBoundingClientRect().top") < 450


def test_a_row_of_the_plot_chooses_its_center_by_mouse_and_by_key(page):
    title = page.locator("h4", has_text="ROC")
    assert title.inner_text() == "ROC, all centers: high risk against the rest"
    page.get_by_role("button", name="MCF", exact=True).click()
    assert title.inner_text() == "ROC, MCF: high risk against the rest"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert title.inner_text() == "ROC, NYU: high risk against the rest"
    assert page.get_by_role("button", name="NYU", exact=True).get_attribute("aria-pressed") == "true"
    center = page.locator("[data-view=explorer]").get_by_label("center", exact=True)
    assert center.locator("option:checked").inner_text() == "NYU"


def test_the_plot_shows_the_summary_and_says_what_is_undefined(page, tables):
    choose(page, modality="t2", metric="AUC", epoch="last")
    _, summary = tables
    rows = summary[
        (summary["task"] == "binary") & (summary["modality"] == "t2") & (summary["rule"] == "last")
    ]
    rows = rows[(rows["metric"] == "auc") & (rows["center"] == "MCF")].set_index("arm")
    row = page.get_by_role("button", name="MCF", exact=True)
    points = row.locator("rect:not(.ground)").evaluate_all("all => all.map(r => r.x.baseVal.value + 3.5)")
    np.testing.assert_allclose((np.array(points) - 90) / 740, rows.loc[NAMES.values(), "mean"], atol=1e-3)
    assert "n/a: no high-risk case" in page.get_by_role("button", name="AHN", exact=True).text_content()
    choose(page, metric="accuracy")
    assert "n/a" not in page.locator(".forest").text_content()


def test_every_control_has_a_name_and_a_phone_shows_the_whole_width(page):
    unnamed = "all => all.filter(c => !c.labels?.length).map(c => c.outerHTML)"
    assert page.locator(".ipmn-view :is(input, select)").evaluate_all(unnamed) == []
    assert page.locator(".ipmn-view :is(button, [role=button], [role=img]):not([aria-label])").count() == 0
    ends = ("R on the left, A on top", "R on the left, H on top", "A on the left, H on top")
    for kind in ("image", "cube"):
        canvases = page.locator(f"canvas[aria-label*='plane of the {kind}']")
        names = canvases.evaluate_all("all => all.map(c => c.ariaLabel)")
        assert all(end in name for end, name in zip(ends, names, strict=True))
    for width in (900, 420):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 900, "height": 900})


def test_an_arm_that_is_not_wanted_has_no_mark_and_no_curve(page):
    assert page.locator(".roc .curve").count() == 2  # `local_only` has none of all centers
    page.get_by_role("checkbox", name="Centralized").uncheck()
    assert page.locator(".roc .curve").count() == 1
    assert [row[0] for row in cells(page, "AUC of the curve")] == ["FedProx (μ=0.1)", "Local only"]
    for name in ("FedProx (μ=0.1)", "Local only"):
        page.get_by_role("checkbox", name=name).uncheck()
    assert page.locator(".roc .curve").count() == 0 and page.locator(".forest .row").count() == 4
