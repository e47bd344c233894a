"""Scans of an anatomy by each center's protocol: relaxation, geometry, bias field, noise."""

from dataclasses import dataclass, fields, replace

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage, sparse

from ipmn_core.names import MODALITIES
from ipmn_core.phantom.anatomy import AXES, FINE, ORIGIN, SHAPE, along_axes, coverage, draw, smooth_field

DILATED_MM = 5  # main duct: worrisome from here, in the Fukuoka and Kyoto guidelines (`phantom.guideline`)

# Relaxation at 3 T: T1 ms, T2 ms, proton density, texture (spread of the signal within the tissue).
# T1 and T2 of the organs, fat, muscle and marrow: de Bazelaire et al., Radiology 2004;230:652; T1 of blood:
# Stanisz et al., Magn Reson Med 2005;54:507. Blood's T2 stands in for the flow void. The rest is by eye.
TISSUES = {
    "fat": (382, 68, 0.95, 0.06),
    "pancreas": (725, 43, 0.95, 0.10),
    "liver": (809, 34, 0.95, 0.05),
    "spleen": (1328, 61, 0.95, 0.04),
    "cortex": (1142, 76, 0.95, 0.04),
    "medulla": (1545, 81, 0.95, 0.05),
    "muscle": (898, 29, 0.90, 0.10),
    "marrow": (586, 49, 0.75, 0.12),
    "disc": (1300, 60, 0.80, 0.05),
    "wall": (1000, 40, 0.90, 0.05),
    "blood": (1932, 20, 0.95, 0.03),
    "chyme": (1100, 110, 0.85, 0.35),
    "gas": (1000, 1, 0.02, 0.0),
    "nodule": (350, 50, 0.95, 0.03),  # enhancing: T1 shortened by contrast agent
    "fluid": (4000, 1200, 1.00, 0.0),  # bile, gastric juice
    "cyst": (4000, 1200, 1.00, 0.0),  # pancreatic juice, before mucin
    "duct": (4000, 1200, 1.00, 0.0),  # the same
}
JUICE = ("cyst", "duct")
MUCIN_R1 = 3.5e-4  # 1/ms: pure mucin shortens the T1 of cyst fluid from 4.0 s to about 1.7 s


@dataclass(frozen=True)
class Scanner:
    """A protocol of one center for one modality: geometry, timing of the sequence, imperfections."""

    spacing: float  # mm, in plane
    thickness: float  # mm
    matrix: tuple[int, int, int]
    tr: float  # ms
    te: float  # ms
    flip: float  # degrees
    noise: float  # Rician sigma, fraction of the brightest tissue
    bias: float  # spread of the receive field's logarithm
    scale: float  # stored value of the brightest tissue
    dtype: str = "int16"
    blur: float = 1.0  # width of the point spread, voxels
    margin: float = 0.0  # mm by which the center's readers outline the organ too wide
    gamma: float = 1.0  # of the processing: stored = scale (v / max)^gamma


SCANNERS = {  # standard protocols. T1: 3D spoiled gradient echo. T2: single-shot fast spin echo.
    ("NYU", "t1"): Scanner(1.50, 4.5, (100, 68, 20), 3.8, 1.5, 12, 0.018, 0.08, 120),
    ("NYU", "t2"): Scanner(1.25, 6.0, (120, 82, 15), 8000, 88, 90, 0.016, 0.10, 140),
    ("MCF", "t1"): Scanner(1.41, 5.0, (106, 72, 18), 4.2, 2.0, 13, 0.020, 0.12, 0.375, "float32"),
    ("MCF", "t2"): Scanner(1.10, 8.0, (136, 92, 11), 8000, 80, 90, 0.020, 0.08, 0.5, "float32"),
    ("NU", "t1"): Scanner(1.60, 4.0, (94, 64, 22), 4.0, 1.8, 11, 0.024, 0.10, 150),
    ("NU", "t2"): Scanner(1.35, 7.0, (112, 76, 13), 8000, 92, 90, 0.022, 0.12, 150),
    ("AHN", "t1"): Scanner(1.17, 5.5, (128, 88, 16), 4.5, 2.1, 12, 0.030, 0.15, 110),
    ("AHN", "t2"): Scanner(0.94, 7.5, (160, 108, 12), 8000, 85, 90, 0.030, 0.14, 120),
    ("MCA", "t1"): Scanner(1.33, 3.0, (112, 76, 30), 3.6, 1.3, 10, 0.028, 0.07, 0.25, "float32"),
    ("MCA", "t2"): Scanner(1.48, 5.0, (102, 68, 18), 8000, 95, 90, 0.018, 0.09, 0.4, "float32"),
    ("IU", "t1"): Scanner(1.20, 6.0, (126, 84, 15), 5.0, 2.2, 14, 0.034, 0.13, 100),
    ("IU", "t2"): Scanner(1.56, 6.5, (96, 66, 14), 8000, 78, 90, 0.030, 0.11, 110),
    ("EMC", "t1"): Scanner(1.45, 3.6, (104, 70, 25), 3.9, 1.6, 12, 0.022, 0.09, 130),
    ("EMC", "t2"): Scanner(1.00, 8.0, (150, 102, 11), 8000, 82, 90, 0.024, 0.13, 130),
}


COMMON = "NYU"  # whose scanner all centers share at shift 0
FULL_SHIFT = {  # noise, bias, blur (factors), margin (mm), gamma; from which shift the contrast is opposite
    "NYU": (1.0, 1.0, 1.0, 0.0, 1, np.inf),
    "MCF": (1.2, 2.0, 1.0, 1.0, 1, 0.6),
    "NU": (1.5, 1.0, 1.4, 0.0, 1, 0.75),
    "AHN": (1.0, 1.5, 1.0, 2.0, 3, np.inf),
    "MCA": (1.5, 2.5, 1.0, 1.0, 1, np.inf),
    "IU": (1.2, 1.5, 1.2, 2.0, 1, 0.9),
    "EMC": (1.0, 1.0, 1.3, 0.5, 3, np.inf),
}


def scanner_of(patient, modality):
    """The `Scanner` of a row's scan, by its `scanner_shift` (0-1, default 0.5) and `protocol`.

    From 0 to 0.5 the settings go from the common scanner's to the center's own. From 0.5 to 1 noise, bias,
    blur, margin and gamma go to `FULL_SHIFT`. Three centers also switch, one after another, to the sequence
    of the other modality, in which fluid has the opposite contrast; no contrast fades out in between.
    """
    center, shift = getattr(patient, "scanner", patient.center), getattr(patient, "scanner_shift", 0.5)
    scanner, common = SCANNERS[center, modality], SCANNERS[COMMON, modality]
    if shift < 0.5:
        mixed = {
            f.name: 2 * shift * getattr(scanner, f.name) + (1 - 2 * shift) * getattr(common, f.name)
            for f in fields(Scanner)
            if f.type is float
        }
        pairs = zip(scanner.matrix, common.matrix, strict=True)
        mixed["matrix"] = tuple(round(2 * shift * a + (1 - 2 * shift) * b) for a, b in pairs)
        scanner = replace(scanner if shift else common, **mixed)
    elif shift > 0.5:
        noise, bias, blur, margin, gamma, opposite = FULL_SHIFT[center]
        part = 2 * shift - 1
        factors = {"noise": noise, "bias": bias, "blur": blur, "gamma": gamma}
        new = {name: getattr(scanner, name) * most**part for name, most in factors.items()}
        new["scale"] = scanner.scale * new["gamma"] ** 3  # finer steps: dark tissue is darker still
        if shift >= opposite:
            other = SCANNERS[center, MODALITIES[1 - MODALITIES.index(modality)]]
            new |= {"tr": other.tr, "te": other.te, "flip": other.flip}
        scanner = replace(scanner, margin=margin * part, **new)
    return dedicated(scanner) if patient.protocol == "dedicated" else scanner


def dedicated(scanner):
    """A dedicated protocol for the pancreas: finer voxels over the same extent, and more noise."""
    spacing, thickness = 0.95 * scanner.spacing, 0.8 * scanner.thickness
    matrix = tuple(int(np.ceil(n / f)) for n, f in zip(scanner.matrix, (0.95, 0.95, 0.8), strict=True))
    timing = {"te": 1.1 * scanner.te, "flip": min(1.15 * scanner.flip, 90)}  # T2 stays at 90 degrees
    noise = 1.15 * scanner.noise
    return replace(scanner, spacing=spacing, thickness=thickness, matrix=matrix, noise=noise, **timing)


def signals(scanner, mucin, gland=(1, 1, 1)):
    """Signal of each tissue by name, the brightest 1, by the spoiled echo equation.

    Bernstein, King and Zhou, Handbook of MRI Pulse Sequences, 2004, chapter 14. With a long TR and 90 degrees
    it is the spin echo equation.
    """
    t1, t2, density, _ = np.array(list(TISSUES.values())).T
    factors = np.ones((3, len(TISSUES)))
    factors[:, list(TISSUES).index("pancreas")] = gland
    t1, t2, density = factors * (t1, t2, density)
    t1 = np.where(np.isin(list(TISSUES), JUICE), 1 / (1 / t1 + MUCIN_R1 * mucin), t1)
    angle, e1 = np.deg2rad(scanner.flip), np.exp(-scanner.tr / t1)
    signal = density * np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1) * np.exp(-scanner.te / t2)
    return dict(zip(TISSUES, (signal / signal.max()).astype(np.float32), strict=True))


def paint(drawn, signal):
    """Signal of the anatomy on the fine grid, each layer over those before it."""
    volume = signal["fat"] * (1 + TISSUES["fat"][3] * drawn.texture)
    for tissue, box, alpha in drawn.layers:
        spread = TISSUES[tissue][3]
        color = signal[tissue] * (1 + spread * drawn.texture[box]) if spread else signal[tissue]
        behind = volume[box]
        behind += alpha * (color - behind)
    return volume


def profile(at, fine, width):
    """Sparse weights (len(at), len(fine)) of a fine axis for voxels at positions at, width mm wide."""
    step = fine[1] - fine[0]
    overlap = np.clip((width + step) / 2 - np.abs(at[:, None] - fine), 0, min(width, step))
    return sparse.csr_array(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)


def grid(drawn, patient, modality, seed):
    """A scan's protocol, random generator, axes (mm), operators from the fine grid to voxels, and affine.

    It is centered on the pancreas, within the fine grid.
    """
    scanner = scanner_of(patient, modality)
    rng = np.random.default_rng([seed, patient.number, 1 + MODALITIES.index(modality)])
    (box,) = ndimage.find_objects(np.uint8(drawn.organ > 0))
    middle = [(side.start + side.stop - 1) / 2 for side in box]
    center = ORIGIN + FINE * middle + rng.uniform(-2, 2, 3)
    voxel = np.array([scanner.spacing, scanner.spacing, scanner.thickness])
    half = voxel * (np.array(scanner.matrix) - 1) / 2
    first = np.clip(center, ORIGIN + half, ORIGIN + FINE * (np.array(SHAPE) - 1) - half) - half
    axes = [first[k] + voxel[k] * np.arange(scanner.matrix[k]) for k in range(3)]
    width = np.maximum(scanner.blur * voxel, FINE)
    operators = [profile(*triple) for triple in zip(axes, AXES, width, strict=True)]
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = first
    return scanner, rng, axes, operators, affine


def volumes(patient, seed, modality, drawn=None):
    """Image and mask (nib.Nifti1Image, mask uint8 0/1) of a row of `phantom.patients` or truth.csv.

    `seed` is that of the cohort; `drawn` saves drawing the anatomy again. A row may have `scanner` (the
    paper's center whose scanner is used; default: its own), `scanner_shift` (`scanner_of`), and
    `stored_axes`, such as "LPS".
    """
    drawn = drawn or draw(patient, seed)
    scanner, rng, axes, operators, affine = grid(drawn, patient, modality, seed)
    volume = along_axes(paint(drawn, signals(scanner, patient.mucin, drawn.gland)), operators)
    volume = volume * np.exp(scanner.bias * smooth_field(rng, axes, 70))
    noise = scanner.noise * rng.standard_normal((2, *volume.shape), dtype=np.float32)
    volume = np.hypot(volume + noise[0], noise[1])  # Rician
    if scanner.gamma != 1:
        volume = volume.max() * (volume / volume.max()) ** scanner.gamma
    volume *= np.float32(scanner.scale)
    step = 1 if scanner.dtype == "int16" else 2**-8  # below the noise, and coarse: small files
    stored = (np.rint(volume / step) * step).astype(scanner.dtype)
    mask = (along_axes(coverage(drawn.organ + scanner.margin), operators) > 0.5).astype(np.uint8)
    axes = getattr(patient, "stored_axes", "RAS")
    return nifti(stored, affine, axes), nifti(mask, affine, axes)


def lesion(patient, seed, modality):
    """Coverage 0-1 by cyst loculi, mural nodule and dilated duct, float32, on the grid of `volumes`.

    The whole duct counts if `duct_mm` is `DILATED_MM` or more: it is then everywhere at least 1.8 times its
    normal width. Walls of loculi and a thin gland (atrophy) do not count.
    """
    drawn = draw(patient, seed)
    found = {"cyst", "nodule", "duct"} if patient.duct_mm >= DILATED_MM else {"cyst", "nodule"}
    fine = np.zeros(SHAPE, np.float32)
    for tissue, box, alpha in drawn.layers:
        if tissue in found:
            np.maximum(fine[box], alpha, out=fine[box])
    *_, operators, affine = grid(drawn, patient, modality, seed)
    return nifti(along_axes(fine, operators), affine, getattr(patient, "stored_axes", "RAS"))


def nifti(array, affine, axes="RAS"):
    """A NIfTI image of `array`, given along right, anterior, superior (RAS), stored along `axes`."""
    if axes != "RAS":
        turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
        turned = nib.Nifti1Image(array, affine).as_reoriented(turn)
        array, affine = np.asanyarray(turned.dataobj), turned.affine
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    return image
