"""Grad-CAM, the layer it is taken from, and the share that is on the phantom's lesion."""

from dataclasses import replace

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from drawn import is_clean
from made_up import paper_cohort
from torch import nn

from ipmn_core import data, models, params, phantom, runs, views
from ipmn_core.runs import store
from ipmn_core.views import gradcam

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # the toy looks at its first layer
]
S = 32
HOW = params.Preprocessing(S)
LAYERS = {  # the last map of at least 4^3 that all passes through, at 32 and at 96
    "resnet34": ("layer3", "layer4"),
    "shufflenetv2": ("5", "13"),
    "mobilenetv2": ("7.body.0", "14.body.0"),
    "efficientnetb0": ("_blocks.3.5._bn0", "_blocks.5.11._bn0"),
    "densenet121": ("features.transition2.conv", "features.transition3.conv"),
}


class Toy(nn.Module):
    """Maps at an eighth of the resolution, a pool to one voxel, a linear layer."""

    def __init__(self, n_classes=2):
        super().__init__()
        self.maps = nn.Conv3d(1, 3, 1)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Linear(3, n_classes)

    def forward(self, x):
        x = self.act(self.maps(nn.functional.avg_pool3d(x, 8)))
        return self.out(x.mean((2, 3, 4)))


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_the_last_with_four_voxels_an_edge_and_shows_where_each_network_looks(name):
    network, rng = models.build(name, 3).train(), np.random.default_rng(0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert (gradcam.layer_of(network, 32), gradcam.layer_of(network, 96)) == LAYERS[name]
    cubes = rng.random((2, S, S, S), dtype=np.float32)
    heat = gradcam.grad_cam(network, torch.tensor(cubes)[:, None], 2, LAYERS[name][0])
    assert heat.shape == cubes.shape and heat.dtype == np.float32
    assert heat.min() >= 0 and (heat.max(axis=(1, 2, 3)) == 1).all() and heat.std() > 0.01
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training and not any(m._forward_hooks or m._backward_hooks for m in network.modules())


def test_of_a_network_of_nested_parts_the_layer_is_the_last_of_all():
    body = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU())
    assert gradcam.layer_of(nn.Sequential(nn.Sequential(body, nn.Flatten())), 4) == "0.0"


@pytest.mark.parametrize("label", [0, 1])
def test_grad_cam_is_the_closed_form_of_a_network_with_a_linear_head(label):
    network, rng = Toy(), np.random.default_rng(0)
    with torch.no_grad():
        network.maps.weight.copy_(torch.tensor([1.0, -1, 2]).reshape(3, 1, 1, 1, 1))
        network.maps.bias.copy_(torch.tensor([0.1, 0.6, -1]))
        network.out.weight.copy_(torch.tensor([[-0.5, 1, 0.1], [1, -0.4, 0.3]]))
    cube = np.kron(rng.random((4, 4, 4), dtype=np.float32), np.ones((8, 8, 8), np.float32))
    coarse = nn.functional.avg_pool3d(torch.tensor(cube)[None, None], 8)
    maps = nn.functional.conv3d(coarse, network.maps.weight, network.maps.bias)[0]
    open_ = (maps > 0).float()  # of the ReLU between the maps and the pool
    alpha = network.out.weight[label] * open_.mean((1, 2, 3))  # the mean gradient, up to a factor
    coarse = torch.einsum("k,kxyz->xyz", alpha, maps).relu()
    fine = nn.functional.interpolate(coarse[None, None], (S, S, S), mode="trilinear")[0, 0]
    expected = (fine / fine.max()).detach().numpy()
    assert expected.max() == 1
    heat = gradcam.grad_cam(network, torch.tensor(cube)[None, None], label, "maps")[0]
    np.testing.assert_allclose(heat, expected, atol=1e-5)  # float32 sums in another order
    nn.init.zeros_(network.out.weight)  # nothing speaks for the class: no NaN
    assert not gradcam.grad_cam(network, torch.tensor(cube)[None, None], label, "maps").any()


def looks_of(n=3, **changes):
    """Looks of class 0, 1, 2, ..., their lesion a corner of the pancreas, the heat even."""
    cube, lesion = np.zeros((2, 8, 8, 8), np.float32)
    cube[:4], lesion[:2, :4, :4] = 0.5, 1
    turn = np.array([[0, 1], [1, 1], [2, 1]])
    about = {"classes": ("not high risk", "high risk"), "layer": "maps", "prob": 0.3}
    about |= {"heat": np.ones_like(cube), **changes}
    one = replace(gradcam.Look("a", "NYU", 0, "no risk", cube, lesion, np.ones(3), turn, HOW), **about)
    return [replace(one, case_id=f"c{k}", label=k % 3) for k in range(n)]


def test_shares_of_an_even_map_are_those_expected_and_padding_does_not_count():
    (look,) = looks_of(1)
    assert look.expected == look.share == 32 / 256 and look.ratio == 1 and look.in_pancreas == 0.5
    on_padding = look.heat.copy()
    on_padding[4:] *= 100
    assert replace(look, heat=on_padding).ratio == pytest.approx(1)
    assert replace(look, heat=on_padding).in_pancreas == pytest.approx(1 / 101)
    on_lesion = replace(look, heat=look.lesion)
    assert (on_lesion.share, on_lesion.ratio) == (1, 8)
    for none in (None, 0 * look.lesion):
        assert np.isnan(replace(look, lesion=none).ratio)
    dark = replace(look, heat=0 * look.heat)
    assert np.isnan([dark.share, dark.ratio, dark.in_pancreas]).all()


@pytest.mark.filterwarnings("error")
def test_the_table_sets_the_image_and_the_controls_beside_the_network():
    looks = looks_of()
    bright = [replace(look, cube=look.cube * (1 + look.lesion)) for look in looks]
    halves = [replace(look, heat=1 - look.lesion / 2) for look in bright]
    bare = replace(bright[0], lesion=None)
    table = gradcam.table([*bright, bare], [*bright, bare], [*halves, bare])
    half = 0.5 / (1 - 0.5 / 8)
    np.testing.assert_allclose(table["ratio_untrained"][:3], (1 + half) / 2)
    np.testing.assert_allclose(table["ratio_image"][:3], 2 / (1 + 1 / 8))
    assert table.loc[3, ["expected", "share", "ratio", "ratio_image", "ratio_untrained"]].isna().all()
    assert (table["in_pancreas_even"] == 0.5).all() and "ratio_untrained" not in gradcam.table(looks)


# ---- of a run


@pytest.fixture
def setting(phantom_root, phantom_scans, tmp_path, monkeypatch):
    """Profile with a toy network, and a cohort of four scans."""
    monkeypatch.setitem(models.MODELS, "toy", Toy)
    values = {"data": str(phantom_root), "outputs": str(tmp_path), "size": S, "device": "cpu"}
    p = params.validate({**values, "binary_model": "toy", "arms": ["centralized", "local_only"]}, "test")
    chosen = phantom_scans[phantom_scans["center"].isin(["NYU", "IU"])]
    scans = chosen.groupby(["modality", "center"]).head(1).reset_index(drop=True)
    cubes = data.load_cubes(scans, HOW, tmp_path / "cache")
    return p, paper_cohort(scans, *cubes)


def finished_run(p, run, scans, network):
    """Write the folder of a run that was never trained; every case is a test case."""
    folder = runs.folder_of(p, run)
    folder.mkdir(parents=True)
    store.save_model(folder, network)
    rows = scans[scans["modality"] == run.modality].assign(role="test")
    about = {"classes": ("not high risk", "high risk"), "centers": rows["center"].unique().tolist()}
    about |= {"settings": runs.run_settings(p, run).record(), "data": "any"}
    store.seal(folder, about, rows, 0.0)
    return rows


def probability(network, cube):
    with torch.no_grad():
        return network(torch.from_numpy(np.float32(cube))[None, None]).softmax(1)[0, 1].item()


def test_of_run_gives_each_case_its_probability_lesion_and_heat(setting):
    p, cohort = setting
    run, network = runs.Run("binary", "t1", "centralized", 0), models.build("toy", 2, 3).eval()
    rows = finished_run(p, run, cohort.scans, network)[::-1]
    looks = gradcam.of_run(p, run, cohort, rows["case_id"])
    assert [look.case_id for look in looks] == rows["case_id"].tolist()
    for look, k in zip(looks, rows.index, strict=True):
        assert np.array_equal(look.cube, cohort.cubes[k].astype(np.float32))
        assert look.prob == pytest.approx(probability(network, look.cube), abs=1e-5)
        assert (look.layer, look.network) == (gradcam.layer_of(network, S), "toy")
        alone = gradcam.grad_cam(network, torch.tensor(look.cube)[None, None], 1, look.layer)[0]
        np.testing.assert_allclose(look.heat, alone, atol=1e-3)  # other batch sizes sum in another order
        assert not look.lesion[look.cube == 0].any() and 0 < look.lesion.max() <= 1 + 1e-6
    with pytest.raises(KeyError, match="nobody"):
        gradcam.of_run(p, run, cohort, ["nobody"])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        gradcam.of_run(p, replace(run, fold=1), cohort, rows["case_id"])
    blind, again = gradcam.untrained(looks, seed=3), gradcam.untrained(looks, seed=4)
    np.testing.assert_allclose(blind[0].heat, looks[0].heat, atol=1e-3)  # this run's weights are those of 3
    assert again[0].prob != blind[0].prob and again[0].lesion is looks[0].lesion


def test_each_center_of_local_only_is_asked_for_its_own_cases(setting):
    p, cohort = setting
    own = nn.ModuleList([models.build("toy", 2, k) for k in range(2)]).eval()  # of NYU and IU
    run = runs.Run("binary", "t1", "local_only", 0)
    rows = finished_run(p, run, cohort.scans, own)
    for look in gradcam.of_run(p, run, cohort, rows["case_id"]):
        network = own[["NYU", "IU"].index(look.center)]
        assert look.prob == pytest.approx(probability(network, look.cube), abs=1e-5)


def test_the_lesion_comes_to_the_cube_as_the_image_does(setting, phantom_root, monkeypatch):
    """A lesion that is the image itself gives the cube, except for the min-max scaling and float16."""
    _, cohort = setting
    truth = pd.read_csv(phantom_root / "truth.csv")
    truth = truth.set_index(truth["patient_id"].str.casefold())
    for k, scan in cohort.scans.iterrows():
        patient = truth.loc[scan["patient_id"].casefold()]
        roi = data.load_roi(scan["image"], scan["mask"])
        with monkeypatch.context() as patch:
            stored = nib.load(scan["image"])
            image = nib.Nifti1Image(stored.get_fdata(dtype=np.float32), stored.affine)
            patch.setattr(phantom, "lesion", lambda *_, image=image: image)
            brought = gradcam.lesion_cube(scan, roi, patient, 0, HOW)
        top = np.asanyarray(roi.dataobj).max()
        np.testing.assert_allclose(brought / top, cohort.cubes[k], atol=1e-3)  # float16 has 11 bits
        with pytest.raises(ValueError, match="set `phantom_seed` to the phantom"):
            gradcam.lesion_cube(scan, roi, patient, 1, HOW)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("house_style")
@pytest.mark.parametrize(("n", "classes"), [(7, 3), (2, 2), (5, 5)])
def test_the_figure_has_two_pictures_per_class_says_the_shares_and_has_room_for_long_names(n, classes):
    name = "III or IV (invasive, or not known)"
    long = {"center": "Universitätsklinikum Nord 26", "classes": ("not", name), "label_name": name}
    long["heat"] = np.linspace(0, 1, 512, dtype=np.float32).reshape(8, 8, 8)
    looks = [replace(look, label=k % classes) for k, look in enumerate(looks_of(n, **long))]
    figure, below = views.by_class(looks), min(classes, 3)  # at most three are side by side
    pictures = [ax for ax in figure.axes if ax.images]
    assert is_clean(figure) and len(pictures) == 2 * classes
    assert figure.axes[0].get_title().endswith(" 0.30")
    assert f"ratio {looks[0].ratio:.2f}" in figure.axes[below].get_title()
    assert all(ax.collections for ax in pictures)  # the lesion's outline
    real = views.by_class([replace(look, lesion=None) for look in looks])
    assert not any(ax.collections for ax in real.axes if ax.images)
    assert "inside the mask" in real.axes[below].get_title()


def test_the_figure_turns_the_cube_as_radiologists_see_it():
    """Stored as LPS: the patient's right comes first, and must be on the left of the screen."""
    cube = np.zeros((8, 8, 8), np.float32)
    cube[1, 6, 3] = 1  # right, back
    turn = nib.io_orientation(np.diag([-1, -1, 1, 1]))
    (look,) = looks_of(1, cube=cube, heat=cube, lesion=cube, turn=turn, mm=np.array([1.0, 2, 3]))
    shown, heat, lesion, mm = gradcam.canonical(look)
    assert np.argwhere(shown).tolist() == [[6, 1, 3]]
    assert np.array_equal(shown, heat) and np.array_equal(shown, lesion) and mm.tolist() == [1, 2, 3]
    image, over = views.by_class([look]).axes[1].images
    assert np.argwhere(image.get_array()).tolist() == [[1, 1]]  # low: at the back, as the origin is below
    assert np.argwhere(over.get_array()[..., 3]).tolist() == [[1, 1]]
    turn = nib.io_orientation(np.array([[0, 0, 3.0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
    *_, mm = gradcam.canonical(replace(look, turn=turn, mm=np.array([1.0, 2, 3])))
    assert mm.tolist() == [3, 1, 2]
    plt.close("all")
