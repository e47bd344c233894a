"""Where a network looks: Grad-CAM over a run's cubes, and how much of it is on the phantom's lesion.

Grad-CAM: Selvaraju et al., ICCV 2017, arXiv 1610.02391. The control is an untrained network: Adebayo et al.,
"Sanity checks for saliency maps", NeurIPS 2018, arXiv 1810.03292.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from nibabel.affines import from_matvec
from torch import nn
from tqdm import tqdm

from ipmn_core import data, federated, models, phantom, runs
from ipmn_core.data import Cohort
from ipmn_core.names import is_personal
from ipmn_core.params import Params, Preprocessing
from ipmn_core.runs import Run, store, trained
from ipmn_core.views.scans import HEAT, OPACITY, pairs, section, show_slice
from ipmn_core.views.style import PALETTE, SMALL, short

EDGE = 4  # voxels per edge of the coarsest useful map; with one voxel Grad-CAM is constant
# Modules that the whole image passes through (in one of two branches, Grad-CAM misses the other branch): the
# outermost ones, and in MobileNet, EfficientNet and DenseNet also the last ones before each reduction.
LAYERS = re.compile(r"[^.]+|\d+\.body\.0|_blocks\.\d\.\d+\._bn0|features\.transition\d\.conv")
COLUMNS = ["case_id", "center", "label", "prob", "in_pancreas", "expected", "share", "ratio"]


@dataclass(frozen=True)
class Look:
    """One case and where a network looked in it, in the cube's stored axes.

    `heat` is Grad-CAM in [0, 1] for the last of the network's `classes`; `prob` is that class's probability.
    `lesion` is the share of each voxel that is lesion, None if unknown (real data). `mm` is a voxel's size;
    `turn` (`nib.io_orientation`) turns the axes to canonical ones.
    """

    case_id: str
    center: str
    label: int  # of the scan, among the cohort's classes
    label_name: str
    cube: np.ndarray  # (S, S, S) float32
    lesion: np.ndarray | None  # (S, S, S) float32
    mm: np.ndarray  # (3,)
    turn: np.ndarray  # (3, 2)
    how: Preprocessing
    modality: str = ""
    network: str = ""
    classes: tuple[str, ...] = ("",)
    layer: str = ""
    prob: float = np.nan
    heat: np.ndarray | None = None  # (S, S, S) float32

    @property
    def in_pancreas(self) -> float:
        """Share of all attention on the pancreas, not on padding; NaN without attention."""
        return _ratio(self.heat.sum(where=self.cube != 0), self.heat.sum())

    @property
    def share(self) -> float:
        """Share of the pancreas's attention that is on the lesion; NaN without attention or known lesion."""
        return self.share_of(self.heat)

    @property
    def expected(self) -> float:
        """Share of the pancreas that is lesion: the `share` of an even map."""
        return self.share_of(np.ones_like(self.cube))

    @property
    def ratio(self) -> float:
        """`share` over `expected`: 1 for an even map; NaN without a lesion."""
        return _ratio(self.share, self.expected)

    def share_of(self, weight: np.ndarray) -> float:
        """Share of `weight` (S, S, S) on the pancreas that is on the lesion."""
        if self.lesion is None:
            return np.nan
        return _ratio((weight * self.lesion).sum(where=self.cube != 0), weight.sum(where=self.cube != 0))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else np.nan


def layer_of(network: nn.Module, size: int) -> str:
    """Name of the last executed module of LAYERS with a map of at least `EDGE` voxels per edge at size^3.

    Without such a module, the last of all modules with such a map. Computes only shapes (meta device).
    """
    shapes, maps = copy.deepcopy(network).to("meta").eval(), []
    for name, module in shapes.named_modules():
        module.register_forward_hook(lambda _module, _x, out, name=name: maps.append((name, out.shape)))
    shapes(torch.empty(1, 1, size, size, size, device="meta"))
    fine = [name for name, shape in maps if len(shape) == 5 and min(shape[2:]) >= EDGE]
    return ([name for name in fine if LAYERS.fullmatch(name)] or fine)[-1]


def grad_cam(network: nn.Module, cubes: torch.Tensor, label: int, layer: str) -> np.ndarray:
    """Grad-CAM of class `label` at `layer` over cubes (N, 1, S, S, S): (N, S, S, S) in [0, 1], float32.

    Selvaraju et al. 2017, Eq. (1) and (2): the sum of the maps of `layer`, each weighted by the mean gradient
    of the class's logit over it, with negative values set to 0. The sum is resized to the cube trilinearly
    (MONAI) and divided by its maximum (0 if nothing supports the class). Leaves the network unchanged.
    """
    from monai.visualize import GradCAM

    network = copy.deepcopy(network)  # MONAI's hooks would stay on it
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # otherwise it overwrites the map that a hook has kept
    camera = GradCAM(network.eval(), layer, postprocessing=lambda heat: heat)  # MONAI's inverts the map
    with torch.enable_grad():
        heat = camera(cubes, class_idx=label)[:, 0].detach().cpu().numpy()
    peak = heat.max(axis=(1, 2, 3), keepdims=True)
    return heat / np.where(peak > 0, peak, 1)


def of_run(p: Params, run: Run, cohort: Cohort, case_ids: Sequence[str]) -> list[Look]:
    """Where the network of a finished run looks in `case_ids` for its last class, in float32.

    In a personal arm each case goes to its own center's network. The lesion is the phantom's truth. Raises
    FileNotFoundError or StaleRunError without such a run, KeyError for an unknown case, ValueError for a
    phantom with another seed.
    """
    folder = store.whole(runs.folder_of(p, run), runs.run_settings(p, run).protocol())
    (one,) = trained.find(folder)
    scans = cohort.scans.reset_index(names="row").query("modality == @run.modality")
    scans = scans.set_index("case_id", drop=False).loc[list(case_ids)]
    patients = {row["patient_id"].casefold(): row for _, row in data.read_truth(p).iterrows()}
    looks = []
    for case, scan in tqdm(scans.iterrows(), "cases", len(scans), unit="case", delay=2):
        roi = data.load_roi(scan["image"], scan["mask"], case, p.preprocessing)
        patient = patients.get(scan["patient_id"].casefold())
        lesion = None if patient is None else lesion_cube(scan, roi, patient, p.phantom_seed, p.preprocessing)
        mm = np.array(roi.header.get_zooms()) * roi.shape / p.size
        volumes = np.float32(cohort.cubes[scan["row"]]), lesion, mm, nib.io_orientation(roi.affine)
        case_of = case, scan["center"], scan["label"], scan["class"]
        about = p.preprocessing, run.modality, one.network, one.classes
        looks.append(Look(*case_of, *volumes, *about))
    local, seen = is_personal(run.arm), {}
    for center in dict.fromkeys(look.center if local else None for look in looks):
        network = trained.load(one, center).to(federated.device_of(p))
        seen |= {x.case_id: x for x in _seen(network, [x for x in looks if center in (None, x.center)])}
    return [seen[look.case_id] for look in looks]


@federated.one_thread()
def _seen(network: nn.Module, looks: Sequence[Look]) -> list[Look]:
    """The same cases with the network's probability and Grad-CAM, in batches."""
    cube, device, done = looks[0].cube, next(network.parameters()).device, []
    layer = layer_of(network, len(cube))
    n = max(1, 2**20 // cube.size)  # 32 cubes of 32^3, one of 96^3: a backward pass keeps every map
    for start in tqdm(range(0, len(looks), n), "Grad-CAM", unit="batch", delay=2):
        some = looks[start : start + n]
        x = torch.from_numpy(np.stack([look.cube for look in some])).unsqueeze(1).to(device)
        with torch.inference_mode():
            prob = network(x).softmax(1)[:, -1].tolist()
        made = zip(some, prob, grad_cam(network, x, -1, layer), strict=True)
        done += [replace(look, layer=layer, prob=p, heat=heat) for look, p, heat in made]
    return done


def lesion_cube(scan: pd.Series, roi: nib.Nifti1Image, patient: pd.Series, seed: int, how: Preprocessing):
    """The lesion (`phantom.lesion`) resampled to the cube like the image: share of each voxel, (S, S, S).

    `patient` is the scan's row of truth.csv, `roi` its clean ROI. Raises ValueError for another seed.
    """
    lesion = phantom.lesion(patient, seed, scan["modality"])
    lesion = nib.as_closest_canonical(lesion) if how.orientation == "canonical" else lesion
    lesion = data.resample(lesion, None, how.spacing)[0] if how.spacing else lesion
    place = np.linalg.solve(lesion.affine, roi.affine)  # from the ROI's voxels to the lesion's
    first = place[:3, 3].round().astype(int)
    part = lesion.dataobj[tuple(map(slice, first, first + roi.shape))]
    if part.shape != roi.shape or not np.allclose(place, from_matvec(np.eye(3), first), atol=1e-2):
        raise ValueError(f"{scan['case_id']}: set `phantom_seed` to the phantom's seed; it is not {seed}")
    part = part * (np.asanyarray(roi.dataobj) != 0)
    for length in part.shape:  # as `data.to_cube`
        part = np.tensordot(part, data.area_weights(length, how.size), ([0], [1]))
    return part


def untrained(looks: Sequence[Look], seed: int = 0, device: str | torch.device = "cpu") -> list[Look]:
    """The control (Adebayo et al.): the same cases seen by an untrained network, with weights from `seed`."""
    network = models.build(looks[0].network, len(looks[0].classes), seed).eval()
    return _seen(network.to(device), looks)


def table(looks: Sequence[Look], *controls: Sequence[Look]) -> pd.DataFrame:
    """One row per case: COLUMNS of `Look`, in_pancreas_even (for an even map), ratio_image (for the cube).

    With `controls` (each from `untrained`, same cases) also ratio_untrained, their mean. NaN without a lesion
    or attention.
    """
    frame = pd.DataFrame([[getattr(look, key) for key in COLUMNS] for look in looks], columns=COLUMNS)
    frame["in_pancreas_even"] = [(look.cube != 0).mean() for look in looks]
    frame["ratio_image"] = [_ratio(look.share_of(look.cube.clip(0)), look.expected) for look in looks]
    if controls:
        frame["ratio_untrained"] = pd.DataFrame([[x.ratio for x in c] for c in controls]).mean().to_numpy()
    return frame


def canonical(look: Look) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Cube, heat map and lesion (or None), each (S, S, S) in RAS+ orientation, and voxel size (3,) in mm."""
    volumes = look.cube, look.heat, look.lesion
    turned = [v if v is None else nib.apply_orientation(v, look.turn) for v in volumes]
    return (*turned, look.mm[look.turn[:, 0].argsort()])


def by_class(looks: Sequence[Look]) -> Figure:
    """One case per class: an axial slice as the network sees it, and below it the same with Grad-CAM.

    The case is the one with the lesion of median size in its class; where the network looks plays no role.
    The slice has most of the lesion or, without one, most attention on the pancreas. The lesion is outlined.
    """
    labels = sorted({look.label for look in looks})
    figure, axes = pairs(len(labels), 3, 2.85, (2.0, 1.8))
    for label, (above, below) in zip(labels, axes, strict=True):
        cases = [look for look in looks if look.label == label]
        look = sorted(cases, key=lambda one: np.nan_to_num(one.expected))[len(cases) // 2]
        cube, heat, lesion, mm = canonical(look)
        k = int((lesion if look.expected > 0 else heat * (cube != 0)).sum(axis=(0, 1)).argmax())
        for ax in (above, below):
            show_slice(ax, nib.Nifti1Image(cube, np.diag([*mm, 1])), k, lesion, color=PALETTE[5])
        over = HEAT(heat := section(heat, "axial", k))
        over[..., 3] = OPACITY * heat
        below.imshow(over, origin="lower", aspect=below.get_aspect(), interpolation="bilinear")
        title = f"{short(look.center)} {look.case_id}\n{short(look.label_name)}\n"
        title += f"probability of {short(look.classes[-1])} {look.prob:.2f}"
        above.set_title(title, fontsize=SMALL)
        words = f"attention in the lesion {look.share:.1%}\n"
        words += f"expected {look.expected:.1%}, ratio {look.ratio:.2f}"
        if np.isnan(look.ratio):
            words = f"{np.nan_to_num(look.in_pancreas):.0%} of attention inside the mask"
        below.set_title(words, fontsize=SMALL)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), HEAT)
    figure.colorbar(scale, ax=figure.axes, label="Grad-CAM (0 to 1)", pad=0.04, shrink=0.5)
    figure.suptitle(f"Grad-CAM of “{look.classes[-1]}”, layer {look.layer}", fontsize=10)
    return figure
