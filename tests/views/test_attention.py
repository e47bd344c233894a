"""Grad-CAM, the layer it is taken from, and the share that falls on the phantom's lesion."""

import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_runs import profile
from torch import nn

from ipmn_core import data, models, phantom, runs, views
from ipmn_core.runs import records
from ipmn_core.views import attention

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # the toy looks at its first layer
]
S = 32
LAYERS = {  # the last map of at least 4^3 that all passes through, at 32 and at 96
    "resnet34": ("layer3", "layer4"),
    "shufflenetv2": ("5", "13"),
    "mobilenetv2": ("7.body.0", "14.body.0"),
    "efficientnetb0": ("_blocks.3.5._bn0", "_blocks.5.11._bn0"),
    "densenet121": ("features.transition2.conv", "features.transition3.conv"),
}


class Toy(nn.Module):
    """Maps at a quarter of the resolution, a pool to one voxel, a linear layer."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv3d(1, 3, 1)
        self.act = nn.ReLU(inplace=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        x = self.act(self.maps(nn.functional.avg_pool3d(x, 8)))
        return self.out(x.mean((2, 3, 4)))


class Branches(nn.Module):
    """Two branches that are added, the second behind padding; `joined` is what all passes through."""

    def __init__(self):
        super().__init__()
        self.joined, self.short = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1, stride=4)
        self.wide, self.down = nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 4, stride=4)
        self.pad, self.last, self.out = nn.ConstantPad3d(3, 0.0), nn.Conv3d(2, 2, 8), nn.Linear(2, 2)

    def forward(self, x):
        x = self.joined(x)
        x = self.short(x) + self.down(self.wide(x))  # 2^3
        return self.out(self.last(self.pad(x)).flatten(1))  # 8^3 of padding, 1^3


@pytest.fixture
def cube():
    return np.random.default_rng(0).random((S, S, S), dtype=np.float32)


def looks_of(n=3, **changes):
    """Looks of class 0, 1, 2, ..., their lesion a corner of the pancreas, the heat even."""
    cube, lesion = np.zeros((2, 8, 8, 8), np.float32)
    cube[:4], lesion[:2, :4, :4] = 0.5, 1
    one = attention.Look("a", "NYU", 0, cube, lesion, np.ones(3), np.array([[0, 1], [1, 1], [2, 1]]))
    one = replace(one, task="binary", network="shufflenetv2", asked=1, layer="5", prob=0.3)
    one = replace(one, **{"heat": np.ones_like(cube), **changes})
    return [replace(one, case_id=f"c{k}", label=k % 3) for k in range(n)]


@pytest.mark.parametrize("name", models.MODELS)
def test_the_layer_is_the_last_with_four_voxels_an_edge(name):
    network = models.build(name, 2).train()
    before = copy.deepcopy(network.state_dict())
    assert (attention.layer_of(network, 32), attention.layer_of(network, 96)) == LAYERS[name]
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    shapes = []
    note = lambda _m, _in, out: shapes.append(out.shape)  # noqa: E731
    network.get_submodule(LAYERS[name][0]).register_forward_hook(note)
    attention._on_shapes(network, 32)
    assert len(shapes) == 1 and min(shapes[0][2:]) == 4


def test_a_branch_and_padding_are_no_layer_to_look_at():
    assert attention.layer_of(Branches(), 8) == "joined"
    with pytest.raises(ValueError, match="no map of a cube of 2 voxels"):
        attention.layer_of(nn.Sequential(nn.Conv3d(1, 1, 1), nn.Flatten(), nn.Linear(8, 2)), 2)


@pytest.mark.parametrize("label", [0, 1])
def test_grad_cam_is_the_closed_form_of_a_network_with_a_linear_head(label):
    network, rng = Toy(), np.random.default_rng(0)
    with torch.no_grad():
        network.maps.weight.copy_(torch.tensor([1.0, -1, 2]).reshape(3, 1, 1, 1, 1))
        network.maps.bias.copy_(torch.tensor([0.1, 0.6, -1]))
        network.out.weight.copy_(torch.tensor([[-0.5, 1, 0.1], [1, -0.4, 0.3]]))
    cube = np.kron(rng.random((4, 4, 4), dtype=np.float32), np.ones((8, 8, 8), np.float32))
    maps = nn.functional.conv3d(
        nn.functional.avg_pool3d(torch.tensor(cube)[None, None], 8), network.maps.weight, network.maps.bias
    )[0]
    open_ = (maps > 0).float()  # of the ReLU between the maps and the pool
    alpha = network.out.weight[label] * open_.mean((1, 2, 3))  # the mean gradient, up to a factor
    coarse = torch.einsum("k,kxyz->xyz", alpha, maps).relu()
    fine = nn.functional.interpolate(coarse[None, None], (S, S, S), mode="trilinear")[0, 0]
    expected = (fine / fine.max()).detach().numpy()
    assert expected.max() == 1
    heat = attention.grad_cam(network, cube[None], label, "maps")[0]
    np.testing.assert_allclose(heat, expected, atol=1e-5)  # float32 sums in another order


def test_the_heat_lies_where_the_network_looks_in_the_cubes_own_axes():
    network, cube = Toy(), np.zeros((S, S, S), np.float32)
    with torch.no_grad():  # the brighter, the more of class 1, the less of class 0
        network.maps.weight.fill_(1), network.maps.bias.zero_()
        network.out.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    cube[25:30, 2:6, 18:22] = 1
    heat = attention.grad_cam(network, cube[None], 1, "maps")[0]
    assert np.unravel_index(heat.argmax(), heat.shape) == pytest.approx((27.5, 3.5, 19.5), abs=4)
    assert np.average(cube, weights=heat) > 10 * cube.mean()
    assert not attention.grad_cam(network, cube[None], 0, "maps").any()  # nothing speaks for class 0: no NaN


@pytest.mark.parametrize("name", models.MODELS)
def test_grad_cam_works_on_every_network_and_leaves_it_as_it_was(name, cube):
    network = models.build(name, 3).train()
    before = copy.deepcopy(network.state_dict())
    inplace = [module.inplace for module in network.modules() if hasattr(module, "inplace")]
    both = np.stack([cube, cube[::-1] ** 2])
    heat = attention.grad_cam(network, both, 2, LAYERS[name][0])
    assert heat.shape == both.shape and heat.dtype == np.float32
    assert heat.min() >= 0 and (heat.max(axis=(1, 2, 3)) == 1).all() and heat.std() > 0.01
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in network.modules())
    assert inplace == [module.inplace for module in network.modules() if hasattr(module, "inplace")]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_even_map_has_the_expected_share_and_padding_does_not_count():
    (look,) = looks_of(1)
    assert look.expected == look.share == 32 / 256 and look.ratio == 1
    assert look.in_pancreas == 0.5
    on_padding = look.heat.copy()
    on_padding[4:] *= 100
    assert replace(look, heat=on_padding).ratio == pytest.approx(1)
    assert replace(look, heat=on_padding).in_pancreas == pytest.approx(1 / 101)


def test_a_map_of_the_lesion_alone_has_all_and_without_a_lesion_there_is_no_share():
    (look,) = looks_of(1)
    assert (replace(look, heat=look.lesion).share, replace(look, heat=look.lesion).ratio) == (1, 8)
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
    table = attention.table([*bright, bare], [*bright, bare], [*halves, bare])
    assert list(table["y_true"]) == [0, 0, 1, 0]
    half = 0.5 / (1 - 0.5 / 8)
    np.testing.assert_allclose(table["ratio_untrained"][:3], (1 + half) / 2)
    np.testing.assert_allclose(table["ratio_image"][:3], 2 / (1 + 1 / 8))
    assert table.loc[3, ["expected", "share", "ratio", "ratio_image", "ratio_untrained"]].isna().all()
    assert (table["in_pancreas_even"] == 0.5).all()
    assert "ratio_untrained" not in attention.table(looks)


def finished_run(p, run, scans, network):
    """The folder of a run that was never trained; every case is a test case."""
    folder = runs.folder_of(p, run)
    folder.mkdir(parents=True)
    records.save_model(folder, network)
    rows = scans[scans["modality"] == run.modality].assign(role="test")
    records.seal(folder, {"settings": runs.settings_of(p, run), "data": "any"}, rows, 0.0)
    return rows


@pytest.fixture(scope="module")
def setting(phantom_root, phantom_scans, tmp_path_factory):
    """Profile, scans (four), cubes."""
    folder, arms = tmp_path_factory.mktemp("attention"), ["centralized", "local_only"]
    p = profile(folder, data=str(phantom_root), arms=arms)
    chosen = phantom_scans[phantom_scans["center"].isin(["NYU", "IU"])]
    scans = chosen.groupby(["modality", "center"]).head(1).reset_index(drop=True)
    return p, scans, data.load_cubes(scans, S, p.folder / "cache")


def test_of_run_gives_each_case_its_probability_lesion_and_heat(setting):
    p, scans, cubes = setting
    run, network = runs.Run("binary", "t1", "centralized", 0), models.build("shufflenetv2", 2, 3).eval()
    rows = finished_run(p, run, scans, network)
    looks = attention.of_run(p, run, scans, cubes)
    assert [look.case_id for look in looks] == rows["case_id"].tolist()
    for look, k in zip(looks, rows.index, strict=True):
        assert np.array_equal(look.cube, cubes.array[k].astype(np.float32))
        with torch.no_grad():
            logits = network(torch.from_numpy(look.cube)[None, None])
        assert look.prob == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)
        assert look.layer == "5" and look.network == "shufflenetv2" and look.asked == 1
        alone = attention.grad_cam(network, look.cube[None], 1, "5")[0]
        np.testing.assert_allclose(look.heat, alone, atol=1e-3)  # other batch sizes sum in another order
        assert not look.lesion[~look.pancreas].any() and look.lesion.max() <= 1 + 1e-6
    (one,) = attention.of_run(p, run, scans, cubes, [looks[1].case_id], asked=0)
    assert one.prob == pytest.approx(1 - looks[1].prob, abs=1e-5) and one.asked == 0
    with pytest.raises(ValueError, match="no t1 scan of nobody"):
        attention.of_run(p, run, scans, cubes, ["nobody"])
    with pytest.raises(FileNotFoundError, match="no finished run"):
        attention.of_run(p, replace(run, fold=1), scans, cubes)
    blind, again = attention.untrained(looks, seed=3), attention.untrained(looks, seed=4)
    np.testing.assert_allclose(blind[0].heat, looks[0].heat, atol=1e-3)  # this run's weights are those of 3
    assert np.abs(again[0].heat - looks[0].heat).max() > 0.1
    assert again[0].lesion is looks[0].lesion


def test_each_center_of_local_only_is_asked_for_its_own_cases(setting):
    p, scans, cubes = setting
    own = nn.ModuleDict({c: models.build("shufflenetv2", 2, k) for k, c in enumerate(("NYU", "IU"))}).eval()
    run = runs.Run("binary", "t1", "local_only", 0)
    finished_run(p, run, scans, own)
    for look in attention.of_run(p, run, scans, cubes):
        with torch.no_grad():
            logits = own[look.center](torch.from_numpy(look.cube)[None, None])
        assert look.prob == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)


def test_the_lesion_comes_to_the_cube_as_the_image_does(setting, phantom_root, monkeypatch):
    """A lesion that is the image itself gives the cube, but for the min-max scaling and float16."""
    _, scans, cubes = setting
    patients = attention._patients(pd.read_csv(phantom_root / "truth.csv"))
    for k, scan in scans.iterrows():
        patient = patients[scan["case_id"].casefold()]
        roi = data.load_roi(scan["image"], scan["mask"])
        with monkeypatch.context() as patch:
            as_float = lambda *a: nib.Nifti1Image(a[0].get_fdata(dtype=np.float32), a[0].affine)  # noqa: E731
            image = as_float(nib.load(scan["image"]))
            patch.setattr(phantom, "lesion", lambda *_, image=image: image)
            brought = attention.lesion_cube(scan, roi, patient, 0, S)
        top = np.asanyarray(roi.dataobj).max()
        np.testing.assert_allclose(brought / top, cubes.array[k], atol=1e-3)  # float16 has 11 bits
        first_release = scan.copy()
        first_release["mask"] = ""
        one, two = (attention.lesion_cube(s, roi, patient, 0, S) for s in (scan, first_release))
        assert np.array_equal(one, two)
        with pytest.raises(ValueError, match="set `seed` to that of the phantom"):
            attention.lesion_cube(scan, roi, patient, 1, S)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("house_style")
def test_the_figure_has_a_column_a_class_and_says_the_shares():
    heat = np.linspace(0, 1, 512, dtype=np.float32).reshape(8, 8, 8)
    for looks, n in ((looks_of(7, heat=heat), 3), (looks_of(2, heat=heat), 2)):
        figure = views.by_class(looks)
        figure.canvas.draw()
        assert len(figure.axes) == 2 * n + 1 and figure.get_size_inches()[0] <= 9
        assert figure.axes[-1].get_ylabel() == "Grad-CAM (0 to 1)"
        assert "probability of high risk 0.30" in figure.axes[0].get_title()
        assert f"ratio {looks[0].ratio:.2f}" in figure.axes[n].get_title()
        assert all(ax.collections for ax in figure.axes[: 2 * n])  # the lesion's outline
    real = views.by_class(looks_of(3, lesion=None, heat=heat))
    assert not any(ax.collections for ax in real.axes[:6])
    assert "on the pancreas" in real.axes[3].get_title()
    with pytest.raises(ValueError, match="no case to show"):
        views.by_class([])


def test_the_figure_turns_the_cube_as_radiologists_see_it():
    """Stored as LPS: the patient's right comes first, and must come to lie on the left of the screen."""
    cube = np.zeros((8, 8, 8), np.float32)
    cube[1, 6, 3] = 1  # right, back
    turn = nib.io_orientation(np.diag([-1, -1, 1, 1]))
    (look,) = looks_of(1, cube=cube, heat=cube, lesion=cube, turn=turn, mm=np.array([1.0, 2, 3]))
    shown, heat, lesion, mm = views.canonical(look)
    assert np.argwhere(shown).tolist() == [[6, 1, 3]]
    assert np.array_equal(shown, heat) and np.array_equal(shown, lesion) and mm.tolist() == [1, 2, 3]
    ax = views.overlay(plt.figure().add_subplot(), shown[:, :, 3], heat[:, :, 3])
    image, over = ax.images
    assert np.argwhere(image.get_array()).tolist() == [[1, 1]]  # low: at the back, as the origin is below
    assert np.argwhere(over.get_array()[..., 3]).tolist() == [[1, 1]]
    turn = nib.io_orientation(np.array([[0, 0, 3.0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
    *_, mm = views.canonical(replace(look, turn=turn, mm=np.array([1.0, 2, 3])))
    assert mm.tolist() == [3, 1, 2]
    plt.close("all")
