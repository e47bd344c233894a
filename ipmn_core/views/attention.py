"""Where a network looks: Grad-CAM over a run's cubes, and how much of it falls on the phantom's lesion.

Grad-CAM: Selvaraju et al., ICCV 2017, arXiv 1610.02391. Its control, a network that has learnt nothing:
Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018, arXiv 1810.03292.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ipmn_core import data, federated, models, phantom, predict, runs
from ipmn_core.data import Cohort
from ipmn_core.params import Params
from ipmn_core.runs import Run, store

EDGE = 4  # voxels: the coarsest map that still has a middle and sides; of one voxel Grad-CAM is constant


@dataclass(frozen=True)
class Look:
    """One case and where a network looked in it, all in the cube's stored axes.

    `heat` is Grad-CAM in [0, 1] for class `asked`, whose probability is `prob`; `lesion` the share of each
    voxel that is lesion, None where it is not known (real data). `mm` and `turn` (`nib.io_orientation`) say
    how large a voxel is, and how to turn the axes as radiologists see them.
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
    def pancreas(self) -> np.ndarray:
        """(S, S, S) bool: voxels that hold a part of the masked ROI; the rest is padding, zero.

        Where stored values are negative, padding is not the least of them and counts as pancreas.
        """
        return self.cube > 0

    @property
    def in_pancreas(self) -> float:
        """Share of all attention that falls on the pancreas, not on the padding; NaN if there is none."""
        return _ratio(self.heat[self.pancreas].sum(), self.heat.sum())

    @property
    def in_pancreas_even(self) -> float:
        """Share of the cube that is pancreas: the `in_pancreas` of a map that is everywhere alike."""
        return float(self.pancreas.mean())

    @property
    def share(self) -> float:
        """Share of the attention on the pancreas that falls on the lesion; NaN without either."""
        return self.share_of(self.heat)

    @property
    def expected(self) -> float:
        """Share of the pancreas that is lesion: the `share` of a map that is everywhere alike."""
        return self.share_of(np.ones_like(self.cube))

    @property
    def ratio(self) -> float:
        """`share` over `expected`: 1 if the network looks everywhere alike; NaN without a lesion."""
        return _ratio(self.share, self.expected)

    def share_of(self, weight: np.ndarray) -> float:
        """Share of `weight` (S, S, S) on the pancreas that falls on the lesion."""
        if self.lesion is None:
            return np.nan
        return _ratio((weight * self.lesion).sum(where=self.pancreas), weight.sum(where=self.pancreas))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else np.nan


def layer_of(network: nn.Module, size: int) -> str:
    """Name of the last module, in order of execution, whose map of a size^3 cube has `EDGE` voxels an edge.

    Only modules count that the whole image passes through: of a module in one of two branches, Grad-CAM would
    not see what the other branch knows. Nor does padding, which makes a coarse map larger but no finer. The
    forward passes run on bare shapes (meta device). Raises ValueError if there is none.
    """
    run = lambda: _on_shapes(network, size)  # noqa: E731
    maps, kinds = [], dict(network.named_modules())
    note = lambda name: lambda _m, _in, out: maps.append((name, _edge(out)))  # noqa: E731
    _hooked({module: note(name) for name, module in kinds.items() if name}, run)
    names = [name for name, _ in maps]
    for name, edge in reversed(maps):
        once = names.count(name) == 1 and not isinstance(kinds[name], nn.ConstantPad3d)
        if edge >= EDGE and once and not _hooked({kinds[name]: _cut}, run).requires_grad:
            return name
    raise ValueError(f"no map of a cube of {size} voxels has {EDGE} an edge: take larger cubes (`size`)")


def _edge(out: torch.Tensor) -> int:
    return min(out.shape[2:]) if isinstance(out, torch.Tensor) and out.ndim == 5 else 0


def _cut(_module: nn.Module, _in: tuple, out: torch.Tensor) -> torch.Tensor:
    """The map without its past: if the logits then depend on the cube no more, all went through it."""
    return out.detach()


def _on_shapes(network: nn.Module, size: int) -> torch.Tensor:
    """Logits on the meta device, whose gradient reaches back to the cube alone, in evaluation."""
    state = {key: value.detach().to("meta") for key, value in network.state_dict().items()}
    x = torch.empty(1, 1, size, size, size, device="meta", requires_grad=True)
    training = network.training
    try:
        with torch.enable_grad():
            return torch.func.functional_call(network.eval(), state, (x,))
    finally:
        network.train(training)


def _hooked(hooks: dict[nn.Module, Callable], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `run` returns while the forward hooks are on their modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def grad_cam(network: nn.Module, cubes: np.ndarray, label: int, layer: str) -> np.ndarray:
    """Grad-CAM of class `label` at `layer` over cubes, both (N, S, S, S), float32, each map in [0, 1].

    Selvaraju et al. 2017, Eq. (1) and (2): the maps of `layer`, each weighted by the mean gradient of the
    class's logit over it, summed, negative values set to 0; by MONAI, stretched to the cube trilinearly. Here
    divided by its maximum (all zero where nothing speaks for the class). The network stays as it is.
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
    """The cubes as (N, 1, S, S, S) float32 where the network is."""
    return torch.from_numpy(np.float32(cubes)).unsqueeze(1).to(next(network.parameters()).device)


def of_run(
    p: Params,
    run: Run,
    cohort: Cohort,
    case_ids: Sequence[str] | None = None,
    asked: int = -1,
) -> list[Look]:
    """Where the network of a finished run looks in `case_ids` (default: all its test cases), in float32.

    `asked` is the class in question, the last by default:
    high risk. Of `local_only` each case is shown to its own center's network. The lesion is that of the
    phantom's truth. Raises FileNotFoundError or StaleRunError for a run that is not there, ValueError for an
    unknown case or a phantom of another seed.
    """
    folder = store.whole(runs.folder_of(p, run), runs.run_settings(p, run).protocol())
    (trained,) = predict.find(folder)
    asked = range(len(predict.CLASSES[run.task]))[asked]
    rows = _rows(cohort.scans, run.modality, _test_cases(folder) if case_ids is None else case_ids)
    patients = _patients(data.read_truth(p))
    looks = []
    for k, scan in tqdm(rows.iterrows(), "cases", len(rows), unit="case", delay=2):
        patient = patients.get(scan["patient_id"].casefold())
        blank = _blank(scan, np.float32(cohort.cubes[k]), patient, p.phantom_seed)
        looks.append(
            replace(blank, task=run.task, modality=run.modality, network=trained.network, asked=asked)
        )
    local = run.arm == runs.LOCAL_ONLY
    seen = {}
    for center in dict.fromkeys(look.center if local else None for look in looks):
        network = predict.load(trained, center).to(federated.device_of(p))
        mine = [look for look in looks if center in (None, look.center)]
        seen |= {look.case_id: look for look in _seen(network, mine)}
    return [seen[look.case_id] for look in looks]


def _seen(network: nn.Module, looks: Sequence[Look]) -> list[Look]:
    """The same cases with what the network gives them and where it looks, in batches."""
    if not looks:
        return []
    few = looks[0].cube.size <= 2**16  # voxels: small cubes, for which threads only wait for each other
    with federated.one_thread() if few else contextlib.nullcontext():
        return _in_batches(network, looks)


def _in_batches(network: nn.Module, looks: Sequence[Look]) -> list[Look]:
    layer, asked, n = layer_of(network, len(looks[0].cube)), looks[0].asked, _at_once(looks[0].cube)
    done = []
    for start in tqdm(range(0, len(looks), n), "Grad-CAM", unit="batch", delay=2):
        some = looks[start : start + n]
        batch = np.stack([look.cube for look in some])
        with torch.inference_mode():
            prob = network(_input(network, batch)).softmax(1)[:, asked].tolist()
        heat = grad_cam(network, batch, asked, layer)
        made = zip(some, prob, heat, strict=True)
        done += [replace(look, layer=layer, prob=one, heat=its) for look, one, its in made]
    return done


def _at_once(cube: np.ndarray) -> int:
    """How many cubes a batch holds: 32 of 32^3, one of 96^3, for a backward pass keeps every map."""
    return max(1, 2**20 // cube.size)


def _test_cases(folder) -> list[str]:
    splits = data.from_spreadsheet(pd.read_csv(folder / "splits.csv", dtype=str))
    return splits.loc[splits["role"] == "test", "case_id"].tolist()


def _rows(scans: pd.DataFrame, modality: str, case_ids: Sequence[str]) -> pd.DataFrame:
    """The scans of `case_ids`, in that order, indexed by their place in the cubes."""
    mine = scans.reset_index(drop=True)[lambda s: s["modality"] == modality]
    places = dict(zip(mine["case_id"], mine.index, strict=True))
    missing = [case for case in case_ids if case not in places]
    if missing:
        raise ValueError(f"no {modality} scan of {', '.join(missing[:5])} among these: pass the run's cohort")
    return mine.loc[[places[case] for case in case_ids]]


def _patients(truth: pd.DataFrame) -> dict[str, pd.Series]:
    """Rows of the phantom's truth by the patient's name in lower case; empty for real data."""
    return {} if truth.empty else {row["patient_id"].casefold(): row for _, row in truth.iterrows()}


def _blank(scan: pd.Series, cube: np.ndarray, patient: pd.Series | None, seed: int) -> Look:
    """What of a Look no network is asked for."""
    roi = data.load_roi(scan["image"], scan["mask"], scan["case_id"])
    return Look(
        *(scan[key] for key in ("case_id", "center", "label")),
        cube=cube,
        lesion=None if patient is None else lesion_cube(scan, roi, patient, seed, len(cube)),
        mm=np.array(roi.header.get_zooms()) * roi.shape / len(cube),
        turn=nib.io_orientation(roi.affine),
    )


def lesion_cube(
    scan: pd.Series, roi: nib.Nifti1Image, patient: pd.Series, seed: int, size: int
) -> np.ndarray:
    """The lesion (`phantom.lesion`) brought to the cube as the image is: share of each voxel, (S, S, S).

    Cut to the mask, then resized by area, not scaled. `patient` is the scan's row of truth.csv, `roi` its
    clean ROI. Raises ValueError if the phantom was drawn with another seed.
    """
    lesion = phantom.lesion(patient, seed, scan["modality"])
    if scan["mask"]:
        mask = data.load_mask(scan["mask"], lesion.shape, scan["case_id"])
    else:  # the first release's layout
        mask = np.asanyarray(phantom.volumes(patient, seed, scan["modality"])[1].dataobj) > 0
    part, affine = data.crop(np.asanyarray(lesion.dataobj), lesion.affine, mask)
    if part.shape != roi.shape or not np.allclose(affine, roi.affine, atol=1e-3):
        text = f"{scan['case_id']}: its scan lies elsewhere than seed {seed} puts it"
        raise ValueError(f"{text}; set `seed` to that of the phantom's cohort, or write the cohort again")
    for length in part.shape:  # as `preprocess.to_cube`
        part = np.tensordot(part, data.area_weights(length, size), ([0], [1]))
    return part


def untrained(looks: Sequence[Look], seed: int = 0, device: str | torch.device = "cpu") -> list[Look]:
    """The control: the same cases as an untrained network (weights drawn from `seed`) looks at them.

    Adebayo et al. 2018: a map that does not change when the weights are random shows the image and the
    architecture, not what was learnt.
    """
    one = looks[0]
    network = models.build(one.network, len(predict.CLASSES[one.task]), seed).eval()
    return _seen(network.to(device), looks)


def table(looks: Sequence[Look], *controls: Sequence[Look]) -> pd.DataFrame:
    """A row a case: `share` of attention on the lesion, `expected` of a map everywhere alike, their ratio.

    Beside it `ratio_image`, that of the cube's own brightness taken as a map, and `ratio_untrained`, the mean
    over `controls` (each an `untrained` of the same cases), if any. Columns case_id, center, label, y_true,
    prob, in_pancreas (share of attention on the pancreas, not on padding) and in_pancreas_even (of a map that
    is everywhere alike), expected, share, ratio, ratio_image[, ratio_untrained]; NaN where there is no
    lesion, or no attention.
    """
    known = ["case_id", "center", "label", "y_true", "prob", "in_pancreas", "in_pancreas_even"]
    known += ["expected", "share", "ratio"]
    frame = pd.DataFrame([[getattr(look, key) for key in known] for look in looks], columns=known)
    frame["ratio_image"] = [_ratio(look.share_of(look.cube), look.expected) for look in looks]
    if controls:
        frame["ratio_untrained"] = pd.DataFrame([[x.ratio for x in c] for c in controls]).mean().to_numpy()
    return frame
