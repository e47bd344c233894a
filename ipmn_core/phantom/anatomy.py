"""One patient's anatomy, drawn on a fine grid (`draw`), and its scan by a center's protocol (`scan`)."""

from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from scipy import sparse
from scipy.interpolate import BSpline, CubicSpline

from ipmn_core.names import MODALITIES

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
DILATED_MM = 5  # main duct: worrisome from here, in the Fukuoka and Kyoto guidelines (`phantom.guideline`)


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


def dedicated(scanner):
    """The protocol a center would keep for the pancreas: finer voxels over the extent of its standard one.

    Slices are thinner by a fifth, pixels smaller by a twentieth, hence more noise; the echo comes later, and
    the flip angle of T1 is larger.
    """
    spacing, thickness = 0.95 * scanner.spacing, 0.8 * scanner.thickness
    matrix = tuple(
        int(np.ceil(n / finer)) for n, finer in zip(scanner.matrix, (0.95, 0.95, 0.8), strict=True)
    )
    timing = {"te": 1.1 * scanner.te, "flip": min(1.15 * scanner.flip, 90)}  # T2 stays at 90 degrees
    noise = 1.15 * scanner.noise
    return replace(scanner, spacing=spacing, thickness=thickness, matrix=matrix, noise=noise, **timing)


# Anatomy is drawn in mm: x to the patient's right, y anterior, z superior; vertebral bodies end near y = -22.
FINE = np.array([1.5, 1.5, 2.0])  # mm, voxel of the grid on which anatomy is drawn
ORIGIN = np.array([-98.0, -46.0, -54.0])
SHAPE = (112, 76, 52)
EDGE = 1.8  # mm over which a surface fades: its partial volume on the fine grid
CENTRE_LINE = np.array(  # of the pancreas, uncinate process to tail
    [[30, 12, -24], [36, 17, -12], [26, 24, -1], [10, 30, 3], [-10, 29, 7], [-38, 16, 13], [-70, -6, 20]],
    float,
)


@dataclass(frozen=True)
class Anatomy:
    """One patient on the fine grid."""

    layers: list  # (tissue, box, coverage 0-1 in the box), back to front
    texture: np.ndarray  # SHAPE, unit spread
    organ: np.ndarray  # SHAPE, coverage by the pancreas and its cysts
    mucin: float


def along_axes(volume, operators):
    """volume after a sparse operator (new length, old length) along each axis; bit-stable, as BLAS is not."""
    for operator in operators:  # each turn moves its axis to the back: after three the order is restored
        flat = operator @ volume.reshape(volume.shape[0], -1)
        volume = np.moveaxis(flat.reshape(-1, *volume.shape[1:]), 0, -1)
    return np.ascontiguousarray(volume)


def smooth_field(rng, axes, length):
    """Random field of unit spread on a grid of three axes (mm): cubic B-splines on a lattice of length mm."""
    operators = []
    for axis in axes:
        at = (axis - axis[0]) / length + 3
        operators.append(BSpline.design_matrix(at, np.arange(int(at[-1]) + 6), 3).astype(np.float32))
    lattice = rng.standard_normal([operator.shape[1] for operator in operators], dtype=np.float32)
    return along_axes(lattice, operators) * np.float32(3)  # the splines leave a spread of 0.69 an axis


def fine_axes():
    """The fine grid's three axes in mm."""
    return [(ORIGIN[k] + FINE[k] * np.arange(SHAPE[k])).astype(np.float32) for k in range(3)]


def box_of(low, high, margin=7.0):
    """Slices of the fine grid that hold low..high (mm) and a margin for warp and lobules."""
    start = np.clip(np.floor((low - margin - ORIGIN) / FINE), 0, SHAPE).astype(int)
    stop = np.clip(np.ceil((high + margin - ORIGIN) / FINE) + 1, 0, SHAPE).astype(int)
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def ellipsoid(space, centre, radii):
    """Box and depth (mm inside the surface) of an ellipsoid; space: three arrays of warped coordinates."""
    centre, radii = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
    box = box_of(centre - radii, centre + radii)
    square = sum(((space[k][box] - centre[k]) / radii[k]) ** 2 for k in range(3))
    return box, (1 - np.sqrt(square)) * radii.min()


def tube(space, points, radii, squash=1.0):
    """Box and depth (mm) of a tube through points (n, 3) of radii (n,); squash < 1 makes it tall along z."""
    points, radii = (
        np.asarray(points, np.float32),
        np.asarray(radii, np.float32) * np.ones(len(points), np.float32),
    )
    metric = np.array([1, 1, squash], np.float32)
    reach = (radii / squash)[:, None]
    low, high = points - reach, points + reach
    whole = box_of(low.min(0), high.max(0))
    depth = np.full([s.stop - s.start for s in whole], -99, np.float32)
    for k in range(len(points) - 1):
        box = box_of(np.minimum(low[k], low[k + 1]), np.maximum(high[k], high[k + 1]))
        step = (points[k + 1] - points[k]) * metric
        offset = [(space[i][box] - points[k, i]) * metric[i] for i in range(3)]
        at = np.clip(sum(offset[i] * step[i] for i in range(3)) / (step @ step), 0, 1)
        distance = np.sqrt(sum((offset[i] - at * step[i]) ** 2 for i in range(3)))
        part = depth[
            tuple(slice(box[i].start - whole[i].start, box[i].stop - whole[i].start) for i in range(3))
        ]
        np.maximum(part, radii[k] + at * (radii[k + 1] - radii[k]) - distance, out=part)
    return whole, depth


def coverage(depth):
    """Fraction of a voxel inside a surface, from its depth (mm) below it."""
    return np.clip(depth / EDGE + 0.5, 0, 1)


def layer(tissue, shape):
    """Layer (tissue, box, coverage) of a shape (box, depth)."""
    box, depth = shape
    return tissue, box, coverage(depth)


def spline(points, n):
    """n points (n, 3) along a cubic spline through points."""
    return CubicSpline(np.linspace(0, 1, len(points)), points)(np.linspace(0, 1, n))


NEIGHBOURS = [  # tissue, centre, half axes (mm), back to front
    ("muscle", (42, -54, -20), (18, 18, 90)),
    ("muscle", (-42, -54, -20), (18, 18, 90)),
    ("muscle", (-18, -22, 0), (6, 11, 90)),
    ("muscle", (13, -24, 0), (5, 9, 90)),
    ("marrow", (0, -45, 0), (24, 22, 400)),
    ("disc", (0, -45, -36), (23, 21, 5)),
    ("disc", (0, -45, 0), (23, 21, 5)),
    ("disc", (0, -45, 36), (23, 21, 5)),
    ("cortex", (-56, -38, -8), (26, 27, 48)),
    ("medulla", (-55, -38, -8), (18, 19, 38)),
    ("fat", (-45, -33, -8), (13, 9, 24)),
    ("cortex", (58, -40, -22), (26, 26, 48)),
    ("medulla", (57, -40, -22), (18, 18, 38)),
    ("fat", (47, -36, -22), (13, 9, 24)),
    ("spleen", (-96, -18, 24), (24, 40, 42)),
    ("liver", (88, 26, 12), (40, 66, 66)),
    ("liver", (34, 74, 40), (70, 30, 36)),
    ("liver", (40, 6, 40), (24, 16, 26)),
    ("wall", (56, 44, -10), (13, 15, 20)),
    ("fluid", (56, 44, -10), (11, 13, 18)),
    ("wall", (-46, 54, 28), (46, 22, 28)),
    ("fluid", (-46, 54, 28), (42, 18, 24)),
    ("wall", (4, 60, 18), (26, 14, 16)),
    ("chyme", (4, 60, 18), (22, 10, 12)),
]
DUODENUM = [(24, 36, 12), (46, 28, 10), (58, 12, -4), (54, 4, -34), (24, -2, -46), (-20, 4, -48)]
COLON = [(74, 50, -44), (30, 64, -26), (-20, 66, -22), (-64, 52, -10), (-92, 24, -16), (-94, 4, -60)]
TUBES = [  # wall, content, points, radius (mm); the last five are great vessels, the aorta first
    ("wall", "chyme", DUODENUM, 12),
    ("wall", "gas", COLON, 16),
    ("blood", None, [(-9, -10, -60), (-9, -9, 0), (-7, -12, 60)], 9.5),
    ("blood", None, [(19, -12, -60), (20, -10, 0), (22, -8, 60)], 11),
    ("blood", None, [(-8, -2, 8), (-5, 8, -6), (-3, 10, -60)], 3.5),
    ("blood", None, [(-8, -9, -14), (-24, -16, -10), (-46, -28, -8)], 4),
    ("blood", None, [(8, 12, -60), (9, 17, -10), (14, 16, 12), (34, 14, 44)], 6),
]


def neighbours(rng, space, clear, vessels):
    """Layers of the organs around the pancreas, back to front.

    clear: 0 in the plane of fat that keeps them off the pancreas, else 1. vessels: coverage by small vessels.
    """
    layers, shift = [("blood", (slice(None),) * 3, 0.8 * vessels)], np.zeros(3)
    for tissue, centre, radii in NEIGHBOURS:
        if tissue not in ("medulla", "fluid", "chyme", "fat"):  # contents move with the organ before them
            shift = rng.normal(0, 2.5, 3)
        box, depth = ellipsoid(space, centre + shift, radii)
        layers.append((tissue, box, coverage(depth) * clear[box]))
        if tissue == "liver":
            layers.append(("blood", box, coverage(depth - 5) * vessels[box]))
        if tissue == "fluid" and centre[0] < 0:  # the stomach: gas above a fluid level
            level = coverage(space[1][box] - centre[1] - rng.uniform(-4, 12))
            layers.append(("gas", box, layers[-1][2] * level))
    jejunum = [("wall", "chyme", rng.normal((-42, 34, -24), (26, 16, 14), (4, 3)), 9) for _ in range(5)]
    for wall, content, points, radius in jejunum + TUBES:
        box, depth = tube(space, spline(points, len(points) + 2), radius)
        layers.append((wall, box, coverage(depth) * clear[box]))
        if content:
            layers.append((content, box, coverage(depth - 2.8) * clear[box]))
    return layers


def gland(rng, patient):
    """Centre line (13, 3) of the pancreas, and half thickness and duct radius (13,) along it, in mm."""
    bend = rng.normal(0, 3, 3) * np.linspace(-0.5, 1, len(CENTRE_LINE))[:, None]
    line = spline(CENTRE_LINE * rng.normal(1, 0.04) + bend + rng.normal(0, 1.5, CENTRE_LINE.shape), 13)
    at = np.linspace(0, 1, 13)
    # Head, neck, body and tail: up to 30, 20, 25 and 20 mm thick; a normal duct measures 3.2, 2.7 and 2.5 mm.
    radius = np.interp(at, [0, 0.2, 0.42, 0.65, 1], [9.5, 13.5, 8.5, 10.5, 8])
    radius *= rng.normal(1, 0.06) * (1 - 0.35 * patient.atrophy)
    duct = patient.duct_mm / 2 * np.interp(at, [0, 0.15, 0.6, 1], [0.8, 1, 0.85, 0.8])
    return line, np.maximum(radius, duct + 2.5), duct * (1 + 0.12 * np.sin(rng.uniform(0, 6) + 9 * at))


def cyst_shapes(rng, space, patient, line, radius):
    """Loculi (box, depth) of the cyst and its satellites, and a list with the mural nodule, if any."""
    loculi, nodules = [], []
    sizes = patient.cyst_mm * np.append(1, rng.uniform(0.25, 0.4, rng.poisson(0.8)))
    for size in sizes[sizes > 0]:
        big, place = size / 2, rng.integers(2, 11)
        away = unit(rng.normal(size=3) * (1, 1, 0.7))
        centre = line[place] + away * (0.5 * radius[place] + 0.4 * big)
        centre = np.clip(centre, ORIGIN + big + 4, ORIGIN + FINE * SHAPE - big - 4)
        loculi.append(ellipsoid(space, centre, [0.75 * big] * 3))
        for _ in range(int(np.clip(big / 2, 1, 8))):  # a bunch of grapes
            grape = big * rng.uniform(0.3, 0.5)
            loculi.append(ellipsoid(space, centre + unit(rng.normal(size=3)) * (big - grape), [grape] * 3))
        if size == patient.cyst_mm and patient.nodule_mm:
            wall = centre + away * (0.75 * big - 0.4 * patient.nodule_mm)
            nodules.append(ellipsoid(space, wall, [patient.nodule_mm / 2] * 3))
    return loculi, nodules


def unit(vector):
    """vector at length 1."""
    return vector / np.linalg.norm(vector)


def draw(patient, seed):
    """Anatomy of one row of `phantom.patients` (as a namedtuple or Series), the same for both modalities."""
    rng = np.random.default_rng([seed, patient.number])
    axes = fine_axes()
    warp = [smooth_field(rng, axes, 16) for _ in range(3)]  # no organ is a perfect ellipsoid
    space = [x + 1.8 * w for x, w in zip(np.meshgrid(*axes, indexing="ij", sparse=True), warp, strict=True)]
    texture = smooth_field(rng, axes, 3.2)
    line, radius, duct = gland(rng, patient)
    box, depth = tube(space, line, radius, squash=0.78)
    parenchyma = box, depth + texture[box]  # lobules, with fat between them
    loculi, nodules = cyst_shapes(rng, space, patient, line, radius)
    organ = np.full(SHAPE, -99, np.float32)  # depth, in mm
    for box, depth in [parenchyma, *loculi]:
        organ[box] = np.maximum(organ[box], depth)
    vessels = np.clip(1.7 - 7 * np.hypot(warp[0], warp[1]), 0, 1)  # two fields vanish together along curves
    layers = neighbours(rng, space, clear=np.clip(-organ / 2 - 1, 0, 1), vessels=vessels)
    splenic_vein = line[4:] - [0, 1, 0] * (radius[4:, None] + 2.5)
    bile_duct = line[2] + np.array([[6, -6, 50], [5, -7, 16], [3, -5, 0], [5, -2, -14]])
    layers += [layer("blood", tube(space, splenic_vein, 4)), layer("pancreas", parenchyma)]
    layers += [layer("wall", (box, depth + 0.8)) for box, depth in loculi]
    layers += [layer("fluid", tube(space, bile_duct, 3.1)), layer("duct", tube(space, line[1:], duct[1:]))]
    layers += [layer("cyst", loculus) for loculus in loculi] + [layer("nodule", nodule) for nodule in nodules]
    return Anatomy(layers, texture, coverage(organ + 0.8), patient.mucin)


def signals(scanner, mucin):
    """Signal of each tissue by name, the brightest 1.

    The spoiled echo of TR, TE and flip angle (Bernstein, King and Zhou, Handbook of MRI Pulse Sequences,
    2004, chapter 14); with a long TR and 90 degrees it is the spin echo's.
    """
    t1, t2, density, _ = np.array(list(TISSUES.values())).T
    t1 = np.where(np.isin(list(TISSUES), JUICE), 1 / (1 / t1 + MUCIN_R1 * mucin), t1)
    angle, e1 = np.deg2rad(scanner.flip), np.exp(-scanner.tr / t1)
    signal = density * np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1) * np.exp(-scanner.te / t2)
    return dict(zip(TISSUES, (signal / signal.max()).astype(np.float32), strict=True))


def paint(drawn, scanner):
    """Signal of the anatomy on the fine grid, each layer over those before it."""
    signal = signals(scanner, drawn.mucin)
    volume = signal["fat"] * (1 + TISSUES["fat"][3] * drawn.texture)
    for tissue, box, alpha in drawn.layers:
        spread = TISSUES[tissue][3]
        colour = signal[tissue] * (1 + spread * drawn.texture[box]) if spread else signal[tissue]
        behind = volume[box]
        behind += alpha * (colour - behind)
    return volume


def profile(at, fine, width):
    """Sparse (len(at), len(fine)) weights of voxels width mm wide, at (mm), over those of a fine axis."""
    step = fine[1] - fine[0]
    overlap = np.clip((width + step) / 2 - np.abs(at[:, None] - fine), 0, min(width, step))
    return sparse.csr_array(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)


def extent(inside):
    """First and last index (3,) (3,) of the true voxels of a 3D array along each axis."""
    held = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {k}))) for k in range(3)]
    return np.array([h[0] for h in held]), np.array([h[-1] for h in held])


def scan_axes(rng, drawn, scanner):
    """The scan's three axes in mm, centred on the pancreas as far as the fine grid reaches."""
    centre = ORIGIN + FINE * np.mean(extent(drawn.organ > 0.5), axis=0) + rng.uniform(-2, 2, 3)
    steps = np.array([scanner.spacing, scanner.spacing, scanner.thickness])
    half = steps * (np.array(scanner.matrix) - 1) / 2
    first = np.clip(centre, ORIGIN + half, ORIGIN + FINE * (np.array(SHAPE) - 1) - half) - half
    return [first[k] + steps[k] * np.arange(scanner.matrix[k]) for k in range(3)]


def protocol(patient, modality, seed):
    """Scanner of a patient's t1 or t2 scan, and the scan's own random generator."""
    scanner = SCANNERS[patient.center, modality]
    rng = np.random.default_rng([seed, patient.number, 1 + MODALITIES.index(modality)])
    return dedicated(scanner) if patient.protocol == "dedicated" else scanner, rng


def grid(rng, drawn, scanner):
    """A scan's axes (mm), the operators that image the fine grid onto them (`along_axes`), and its affine."""
    axes = scan_axes(rng, drawn, scanner)
    voxel = [scanner.spacing, scanner.spacing, scanner.thickness]
    look = [profile(*pair) for pair in zip(axes, fine_axes(), np.maximum(voxel, FINE), strict=True)]
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return axes, look, affine


def scan(drawn, patient, modality, seed):
    """Image and mask (nib.Nifti1Image, one grid, mask uint8 0/1) of an anatomy, for t1 or t2.

    patient is a row of `phantom.patients`; its center and protocol ("standard" or "dedicated") choose the
    scanner's settings.
    """
    scanner, rng = protocol(patient, modality, seed)
    axes, look, affine = grid(rng, drawn, scanner)
    volume = along_axes(paint(drawn, scanner), look) * np.exp(scanner.bias * smooth_field(rng, axes, 70))
    noise = scanner.noise * rng.standard_normal((2, *volume.shape), dtype=np.float32)
    volume = scanner.scale * np.hypot(volume + noise[0], noise[1])  # Rician
    step = 1 if scanner.dtype == "int16" else 2**-8  # below the noise, and coarse: small files
    stored = (np.rint(volume / step) * step).astype(scanner.dtype)
    mask = (along_axes(drawn.organ, look) > 0.5).astype(np.uint8)
    return nifti(stored, affine), nifti(mask, affine)


def findings(drawn, patient):
    """Coverage (SHAPE) by what is pathological: cyst loculi, mural nodule, and the main duct if dilated.

    The duct counts, all along, if it measures `DILATED_MM` or more (`patient.duct_mm`): here a duct widens in
    proportion, so that it is then 1.8 times its normal width or more everywhere. A narrower one is no lesion.
    The walls of the loculi and a thin gland (atrophy) are none either.
    """
    lesion, found = np.zeros(SHAPE, np.float32), {"cyst", "nodule"}
    found |= {"duct"} if patient.duct_mm >= DILATED_MM else set()
    for tissue, box, alpha in drawn.layers:
        if tissue in found:
            np.maximum(lesion[box], alpha, out=lesion[box])
    return lesion


def lesion(drawn, patient, modality, seed):
    """Coverage 0-1 (float32 nib.Nifti1Image) by the `findings` of an anatomy, on the grid of its `scan`."""
    scanner, rng = protocol(patient, modality, seed)
    _, look, affine = grid(rng, drawn, scanner)
    return nifti(along_axes(findings(drawn, patient), look), affine)


def nifti(array, affine):
    """array as a NIfTI image in the scanner's coordinates (mm)."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    return image
