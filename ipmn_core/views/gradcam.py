"""Where a network looks: Grad-CAM over a run's cubes, and how much of it is on the phantom's lesion.

Grad-CAM: Selvaraju et al., ICCV 2017, arXiv 1610.02391. Its control, a network that has learned nothing:
Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018, arXiv 1810.03292.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from ipmn_core import data, federated, models, phantom, runs
from ipmn_core.data import Cohort
from ipmn_core.names import LABELS, class_names
from ipmn_core.params import Params
from ipmn_core.runs import Run, store, trained
from ipmn_core.views.scans import HEAT, show_heat

EDGE = 4  # voxels: the coarsest map that still has a middle and sides; of one voxel Grad-CAM is constant
COLUMNS = [
    "case_id",
    "center",
    "label",
    "y_true",
    "prob",
    "in_pancreas",
    "in_pancreas_even",
    "expected",
    "share",
    "ratio",
]


@dataclass(frozen=True)
class Look:
    """One case and where a network looked in it, all in the cube's stored axes.

    `heat` is Grad-CAM in [0, 1] for class `asked`, whose probability is `prob`; `lesion` the share of each
    voxel that is lesion, None if unknown (real data). `mm` is a voxel's size, `turn` (`nib.io_orientation`)
    turns the axes to those of radiologists.
    """

    case_id: str
    center: str
    label: int  # of the scan: 0 no, 1 low, 2 high risk
    cube: np.ndarray  # (S, S, S) float32
    lesion: np.ndarray | None  # (S, S, S) float32
    mm: np.ndarray  # (3,)
    turn: np.ndarray  # (3, 2)
    task: str = ""
    modality: str = ""
    network: str = ""
    asked: int = -1
    layer: str = ""
    prob: float = np.nan
    heat: np.ndarray | None = None  # (S, S, S) float32

    @property
    def y_true(self) -> int:
        """Class in the task: the scan's, or 1 for high risk and 0 for the rest."""
        return int(runs.targets(np.array([self.label]), self.task)[0])

    @property
    def asked_name(self) -> str:
        """Name of the class `asked`."""
        return class_names(self.task)[self.asked]

    @property
    def pancreas(self) -> np.ndarray:
        """(S, S, S) bool: part of the masked ROI, not padding, zero (if no stored value is negative)."""
        return self.cube > 0

    @property
    def in_pancreas(self) -> float:
        """Share of all attention that is on the pancreas, not on padding; NaN without attention."""
        return _ratio(self.heat[self.pancreas].sum(), self.heat.sum())

    @property
    def in_pancreas_even(self) -> float:
        """Share of the cube that is pancreas: the `in_pancreas` of an even map."""
        return float(self.pancreas.mean())

    @property
    def share(self) -> float:
        """Share of the attention on the pancreas that is on the lesion; NaN without either."""
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
        return _ratio((weight * self.lesion).sum(where=self.pancreas), weight.sum(where=self.pancreas))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else np.nan


def layer_of(network: nn.Module, size: int) -> str:
    """Name of the last module, in order of execution, whose map of a size^3 cube has `EDGE` voxels an edge.

    Only modules that the whole image passes through count: in one of two branches, Grad-CAM would miss what
    the other knows. Padding does not count either, for it makes a coarse map larger but no finer. Computes
    shapes alone (meta device). Raises ValueError if there is none.
    """
    shapes = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    names, maps = {module: name for name, module in shapes.named_modules()}, []

    def note(module, _inputs, out) -> None:
        volume = isinstance(out, torch.Tensor) and out.ndim == 5 and not isinstance(module, nn.ConstantPad3d)
        maps.append((names[module], min(out.shape[2:]) if volume else 0, getattr(out, "grad_fn", None)))

    for module in names:
        module.register_forward_hook(note)
    logits = shapes(torch.empty(1, 1, size, size, size, device="meta", requires_grad=True))
    calls = Counter(name for name, *_ in maps)
    for name, edge, step in reversed(maps):
        if edge >= EDGE and calls[name] == 1 and not _goes_around(logits.grad_fn, step):
            return name
    raise ValueError(f"no map of a cube of {size} voxels has {EDGE} an edge: take larger cubes (`size`)")


def _goes_around(end, step) -> bool:
    """Whether autograd's graph leads from `end` to the input, its only leaf, without passing `step`."""
    seen, todo = {step, None}, [end]
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return any(hasattr(node, "variable") for node in seen)


def grad_cam(network: nn.Module, cubes: np.ndarray, label: int, layer: str) -> np.ndarray:
    """Grad-CAM of class `label` at `layer` over cubes, both (N, S, S, S), float32, each map in [0, 1].

    Selvaraju et al. 2017, Eq. (1) and (2): the maps of `layer`, each weighted by the mean gradient of the
    class's logit over it, summed, negative values set to 0, stretched to the cube trilinearly (MONAI); then
    divided by the maximum (all zero where nothing speaks for the class). Leaves the network unchanged.
    """
    from monai.visualize import GradCAM

    network = copy.deepcopy(network)  # MONAI's hooks would stay on it
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # or it would overwrite the map that a hook has kept
    camera = GradCAM(network.eval(), layer, postprocessing=lambda heat: heat)  # its own turns it upside down
    with torch.enable_grad():
        heat = camera(_input(network, cubes), class_idx=label)[:, 0].detach().cpu().numpy()
    peak = heat.max(axis=(1, 2, 3), keepdims=True)
    return heat / np.where(peak > 0, peak, 1)


def _input(network: nn.Module, cubes: np.ndarray) -> torch.Tensor:
    """The cubes as (N, 1, S, S, S) float32 on the network's device."""
    return torch.from_numpy(np.float32(cubes)).unsqueeze(1).to(next(network.parameters()).device)


def of_run(
    p: Params, run: Run, cohort: Cohort, case_ids: Sequence[str] | None = None, asked: int = -1
) -> list[Look]:
    """Where the network of a finished run looks in `case_ids` (default: all its test cases), in float32.

    `asked` is the class in question, by default the last: high risk. Of `local_only` each case is shown to
    its own center's network. The lesion is that of the phantom's truth. Raises FileNotFoundError or
    StaleRunError without such a run, ValueError for an unknown case or a phantom of another seed.
    """
    folder = store.whole(runs.folder_of(p, run), runs.run_settings(p, run).protocol())
    (one,) = trained.find(folder)
    if case_ids is None:
        splits = pd.read_csv(folder / "splits.csv", dtype=str, keep_default_na=False)
        case_ids = splits.loc[splits["role"] == "test", "case_id"]
    mine = cohort.scans[cohort.scans["modality"] == run.modality]
    places = dict(zip(mine["case_id"], mine.index, strict=True))
    if missing := ", ".join([case for case in case_ids if case not in places][:5]):
        raise ValueError(f"no {run.modality} scan of {missing} among these: pass the run's cohort")
    patients = {row["patient_id"].casefold(): row for _, row in data.read_truth(p).iterrows()}
    asked = range(len(class_names(run.task)))[asked]
    about = {"task": run.task, "modality": run.modality, "network": one.network, "asked": asked}
    looks = []
    for case in tqdm(case_ids, "cases", unit="case", delay=2):
        scan, cube = mine.loc[places[case]], np.float32(cohort.cubes[places[case]])
        blank = _blank(scan, cube, patients.get(scan["patient_id"].casefold()), p.phantom_seed)
        looks.append(replace(blank, **about))
    local, seen = run.arm == runs.LOCAL_ONLY, {}
    for center in dict.fromkeys(look.center if local else None for look in looks):
        network = trained.load(one, center).to(federated.device_of(p))
        seen |= {x.case_id: x for x in _seen(network, [x for x in looks if center in (None, x.center)])}
    return [seen[look.case_id] for look in looks]


def _seen(network: nn.Module, looks: Sequence[Look]) -> list[Look]:
    """The same cases with the network's probability and Grad-CAM, in batches."""
    if not looks:
        return []
    cube, asked, done = looks[0].cube, looks[0].asked, []
    layer = layer_of(network, len(cube))
    n = max(1, 2**20 // cube.size)  # 32 cubes of 32^3, one of 96^3, for a backward pass keeps every map
    small = cube.size <= 2**16  # voxels: threads would only wait for each other
    with federated.one_thread() if small else contextlib.nullcontext():
        for start in tqdm(range(0, len(looks), n), "Grad-CAM", unit="batch", delay=2):
            some = looks[start : start + n]
            batch = np.stack([look.cube for look in some])
            with torch.inference_mode():
                prob = network(_input(network, batch)).softmax(1)[:, asked].tolist()
            made = zip(some, prob, grad_cam(network, batch, asked, layer), strict=True)
            done += [replace(look, layer=layer, prob=p, heat=heat) for look, p, heat in made]
    return done


def _blank(scan: pd.Series, cube: np.ndarray, patient: pd.Series | None, seed: int) -> Look:
    """A Look without what a network says."""
    roi = data.load_roi(scan["image"], scan["mask"], scan["case_id"])
    return Look(
        *(scan[key] for key in ("case_id", "center", "label")),
        cube=cube,
        lesion=None if patient is None else lesion_cube(scan, roi, patient, seed, len(cube)),
        mm=np.array(roi.header.get_zooms()) * roi.shape / len(cube),
        turn=nib.io_orientation(roi.affine),
    )


def lesion_cube(scan: pd.Series, roi: nib.Nifti1Image, patient: pd.Series, seed: int, size: int):
    """The lesion (`phantom.lesion`) brought to the cube as the image is: share of each voxel, (S, S, S).

    `patient` is the scan's row of truth.csv, `roi` its clean ROI. Raises ValueError if the phantom was drawn
    with another seed.
    """
    lesion = phantom.lesion(patient, seed, scan["modality"])
    if scan["mask"]:
        mask = data.load_mask(scan["mask"], lesion.shape, scan["case_id"])
    else:  # the first release's layout
        mask = np.asanyarray(phantom.volumes(patient, seed, scan["modality"])[1].dataobj) > 0
    cut = data.crop(lesion, mask)
    if cut.shape != roi.shape or not np.allclose(cut.affine, roi.affine, atol=1e-3):
        text = f"{scan['case_id']}: its scan is elsewhere than seed {seed} puts it"
        raise ValueError(
            f"{text}; set `phantom_seed` to that of the phantom's cohort, or write the cohort again"
        )
    part = np.asanyarray(cut.dataobj)
    for length in part.shape:  # as `data.to_cube`
        part = np.tensordot(part, data.area_weights(length, size), ([0], [1]))
    return part


def untrained(looks: Sequence[Look], seed: int = 0, device: str | torch.device = "cpu") -> list[Look]:
    """The control: the same cases as seen by an untrained network (weights drawn from `seed`).

    Adebayo et al. 2018: a map that does not change when the weights are random shows the image and the
    architecture, not what was learned.
    """
    network = models.build(looks[0].network, len(class_names(looks[0].task)), seed).eval()
    return _seen(network.to(device), looks)


def table(looks: Sequence[Look], *controls: Sequence[Look]) -> pd.DataFrame:
    """One row per case: `share` of attention on the lesion, `expected` of an even map, their ratio.

    Columns: COLUMNS (fields and properties of `Look`), ratio_image (of the cube's own brightness taken as a
    map) and, with `controls` (each an `untrained` of the same cases), ratio_untrained, their mean; NaN
    without a lesion or attention.
    """
    frame = pd.DataFrame([[getattr(look, key) for key in COLUMNS] for look in looks], columns=COLUMNS)
    frame["ratio_image"] = [_ratio(look.share_of(look.cube), look.expected) for look in looks]
    if controls:
        frame["ratio_untrained"] = pd.DataFrame([[x.ratio for x in c] for c in controls]).mean().to_numpy()
    return frame


def canonical(look: Look) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Cube, heat map, lesion (or None), each (S, S, S) in RAS+ orientation, and a voxel's size (3,) in mm."""
    volumes = look.cube, look.heat, look.lesion
    turned = [v if v is None else nib.apply_orientation(v, look.turn) for v in volumes]
    mm = np.empty(3)
    mm[look.turn[:, 0].astype(int)] = look.mm
    return (*turned, mm)


def by_class(looks: Sequence[Look]) -> Figure:
    """One case of each risk class: the axial slice as the network sees it, and below it with Grad-CAM.

    Of each class the case whose lesion is of median size among those with one, or the first of all: chosen
    by what is there, not by where the network looks. The slice with most lesion or, where none is known, with
    most attention on the pancreas; the lesion is outlined. Raises ValueError for no `looks`.
    """
    if not looks:
        raise ValueError("no case to show: pass the looks of `gradcam.of_run`")
    shown = [_example(looks, label) for label in sorted({look.label for look in looks})]
    figure, axes = plt.subplots(2, len(shown), figsize=(0.5 + 2.7 * len(shown), 3.6), squeeze=False)
    for look, (above, below) in zip(shown, axes.T, strict=True):
        cube, heat, lesion, mm = canonical(look)
        found = lesion is not None and look.expected > 0
        k = int((lesion if found else heat * (cube > 0)).sum(axis=(0, 1)).argmax())
        outline, aspect = None if lesion is None else lesion[:, :, k], mm[1] / mm[0]
        overlay(above, cube[:, :, k], None, outline, aspect)
        overlay(below, cube[:, :, k], heat[:, :, k], outline, aspect)
        title = f"{look.center} {look.case_id}: {LABELS[look.label]}\n"
        title += f"probability of {look.asked_name} {look.prob:.2f}"
        above.set_title(title, fontsize=8, parse_math=False)
        below.set_title(_in_words(look), fontsize=8)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), HEAT)
    figure.colorbar(scale, ax=axes[1], label="Grad-CAM (0 to 1)", pad=0.01)
    figure.suptitle(f"Grad-CAM of “{shown[0].asked_name}”, layer {shown[0].layer}", fontsize=10)
    return figure


def _example(looks: Sequence[Look], label: int) -> Look:
    of_class = [look for look in looks if look.label == label]
    found = sorted((one for one in of_class if one.expected > 0), key=lambda one: one.expected)
    return found[len(found) // 2] if found else of_class[0]


def overlay(ax: Axes, image: np.ndarray, heat: np.ndarray | None, lesion: np.ndarray | None, aspect: float):
    """Draw a canonical slice (A, B) of a cube, its heat map and the lesion; `aspect`: mm along B over A."""
    white = float(np.percentile(image, 99.5)) or 1.0
    ax.imshow(image[::-1].T, cmap="gray", origin="lower", aspect=aspect, vmin=0, vmax=white)
    show_heat(ax, *(None if cut is None else cut[::-1].T for cut in (heat, lesion)))
    ax.set_axis_off()


def _in_words(look: Look) -> str:
    """The share of attention on the lesion, beside the share expected; or why there is none."""
    if look.lesion is None:
        return f"{look.in_pancreas:.0%} of attention on the pancreas"
    if not look.expected > 0:
        return "no lesion in this scan"
    if np.isnan(look.share):
        return "no attention on the pancreas"
    return f"attention in the lesion {look.share:.1%}\nexpected {look.expected:.1%}, ratio {look.ratio:.2f}"
