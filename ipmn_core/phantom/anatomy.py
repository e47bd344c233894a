"""One patient's anatomy, drawn from the findings on a fine grid (`draw`), the same for both modalities."""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import BSpline, CubicSpline

# Anatomy is drawn in mm: x to the patient's right, y anterior, z superior; vertebral bodies end near y = -22.
FINE = np.array([1.5, 1.5, 2.0])  # mm, voxel of the grid on which anatomy is drawn
ORIGIN = np.array([-98.0, -46.0, -54.0])
SHAPE = (112, 76, 52)
AXES = [(ORIGIN[k] + FINE[k] * np.arange(SHAPE[k])).astype(np.float32) for k in range(3)]  # mm
CYSTS, CYST_MM = 0.6, (10, 26)  # mean number and diameters of simple cysts
WIDE_MM = 4.0  # mm by which the outline of the organ is too wide, at most on average
GLAND = (0.1, 0.3, 0.05)  # spread between patients of the logarithm of the gland's T1, T2, proton density
EDGE = 1.8  # mm over which a surface fades: its partial volume on the fine grid
CENTER_LINE = np.array(  # of the pancreas, uncinate process to tail
    [[30, 12, -24], [36, 17, -12], [26, 24, -1], [10, 30, 3], [-10, 29, 7], [-38, 16, 13], [-70, -6, 20]],
    float,
)
NEIGHBORS = [  # tissue, center, half axes (mm), back to front
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


@dataclass(frozen=True)
class Anatomy:
    """One patient on the fine grid."""

    layers: list  # (tissue, box, coverage 0-1 in the box), back to front
    texture: np.ndarray  # SHAPE, unit spread
    organ: np.ndarray  # SHAPE, depth (mm) inside the pancreas and its cysts as outlined by a reader
    gland: np.ndarray  # (3,) factors of the parenchyma's T1, T2 and proton density


def along_axes(volume, operators):
    """volume after a sparse operator (new length, old length) along each axis; unlike BLAS, bit-stable."""
    for operator in operators:  # each turn moves its axis to the back; three turns restore the order
        flat = operator @ volume.reshape(volume.shape[0], -1)
        volume = np.moveaxis(flat.reshape(-1, *volume.shape[1:]), 0, -1)
    return np.ascontiguousarray(volume)


def smooth_field(rng, axes, length):
    """Random field with unit spread on a grid of three axes (mm): cubic B-splines, knots length mm apart."""
    operators = []
    for axis in axes:
        at = (axis - axis[0]) / length + 3
        operators.append(BSpline.design_matrix(at, np.arange(int(at[-1]) + 6), 3).astype(np.float32))
    lattice = rng.standard_normal([operator.shape[1] for operator in operators], dtype=np.float32)
    return along_axes(lattice, operators) * np.float32(3)  # the splines leave a spread of 0.69 per axis


def box_of(low, high, margin=7.0):
    """Slices of the fine grid that contain low..high (mm), with a margin for warp and lobules."""
    start = np.clip(np.floor((low - margin - ORIGIN) / FINE), 0, SHAPE).astype(int)
    stop = np.clip(np.ceil((high + margin - ORIGIN) / FINE) + 1, 0, SHAPE).astype(int)
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def ellipsoid(space, center, radii):
    """Box and depth (mm inside the surface) of an ellipsoid; space: three arrays of warped coordinates."""
    center, radii = np.asarray(center, np.float32), np.asarray(radii, np.float32)
    box = box_of(center - radii, center + radii)
    square = sum(((space[k][box] - center[k]) / radii[k]) ** 2 for k in range(3))
    return box, (1 - np.sqrt(square)) * radii.min()


def tube(space, points, radii, squash=1.0):
    """Box and depth (mm) of a tube through points (n, 3) with radii (n,); squash < 1 makes it tall in z."""
    points = np.asarray(points, np.float32)
    radii = np.asarray(radii, np.float32) * np.ones(len(points), np.float32)
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
        place = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, whole, strict=True))
        depth[place] = np.maximum(depth[place], radii[k] + at * (radii[k + 1] - radii[k]) - distance)
    return whole, depth


def coverage(depth):
    """Fraction of a voxel inside a surface, from its depth (mm) below it."""
    return np.clip(depth / EDGE + 0.5, 0, 1)


def layer(tissue, shape):
    box, depth = shape
    return tissue, box, coverage(depth)


def spline(points, n):
    return CubicSpline(np.linspace(0, 1, len(points)), points)(np.linspace(0, 1, n))


def unit(vector):
    return vector / np.linalg.norm(vector)


def neighbors(rng, space, clear, vessels):
    """Layers of the organs around the pancreas, back to front; clear is 0 in the fat around the pancreas.

    That fat is 1.5 mm wide, and a wide outline takes in bowel, stomach and fluid behind it.
    """
    layers, shift = [("blood", (slice(None),) * 3, 0.8 * vessels)], np.zeros(3)
    for tissue, center, radii in NEIGHBORS:
        if tissue not in ("medulla", "fluid", "chyme", "fat"):  # contents move with the preceding organ
            shift = rng.normal(0, 2.5, 3)
        box, depth = ellipsoid(space, center + shift, radii)
        layers.append((tissue, box, coverage(depth) * clear[box]))
        if tissue == "liver":
            layers.append(("blood", box, coverage(depth - 5) * vessels[box]))
        if tissue == "fluid" and center[0] < 0:  # the stomach: gas above a fluid level
            level = coverage(space[1][box] - center[1] - rng.uniform(-4, 12))
            layers.append(("gas", box, layers[-1][2] * level))
    jejunum = [("wall", "chyme", rng.normal((-42, 34, -24), (26, 16, 14), (4, 3)), 9) for _ in range(5)]
    for wall, content, points, radius in jejunum + TUBES:
        box, depth = tube(space, spline(points, len(points) + 2), radius)
        layers.append((wall, box, coverage(depth) * clear[box]))
        if content:
            layers.append((content, box, coverage(depth - 2.8) * clear[box]))
    return layers


def gland(rng, patient):
    """Center line (13, 3) of the pancreas, and half thickness and duct radius (13,) along it, in mm."""
    bend = rng.normal(0, 3, 3) * np.linspace(-0.5, 1, len(CENTER_LINE))[:, None]
    line = spline(CENTER_LINE * rng.normal(1, 0.04) + bend + rng.normal(0, 1.5, CENTER_LINE.shape), 13)
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
        center = line[place] + away * (0.5 * radius[place] + 0.4 * big)
        center = np.clip(center, ORIGIN + big + 4, ORIGIN + FINE * SHAPE - big - 4)
        loculi.append(ellipsoid(space, center, [0.75 * big] * 3))
        for _ in range(int(np.clip(big / 2, 1, 8))):  # a bunch of grapes
            grape = big * rng.uniform(0.3, 0.5)
            loculi.append(ellipsoid(space, center + unit(rng.normal(size=3)) * (big - grape), [grape] * 3))
        if size == patient.cyst_mm and patient.nodule_mm:
            wall = center + away * (0.75 * big - 0.4 * patient.nodule_mm)
            nodules.append(ellipsoid(space, wall, [patient.nodule_mm / 2] * 3))
    return loculi, nodules


def distractors(rng, space, line, radius):
    """Features that are unrelated to the risk: simple cysts, a wide outline, a bright or dark gland.

    Returns the cysts (box, depth), which are round, at the surface, without communication with the duct; the
    width in mm (SHAPE) by which the outline includes fat and vessels; factors of the gland's T1, T2 and
    proton density.
    """
    cysts = []
    for _ in range(rng.poisson(CYSTS)):
        place, big = rng.integers(1, 12), rng.uniform(*CYST_MM) / 2
        center = line[place] + unit(rng.normal(size=3)) * (radius[place] + 0.7 * big)
        center = np.clip(center, ORIGIN + big + 4, ORIGIN + FINE * SHAPE - big - 4)
        cysts.append(ellipsoid(space, center, [big] * 3))
    margin = rng.uniform(0, WIDE_MM) * np.clip(0.6 + 0.6 * smooth_field(rng, AXES, 30), 0, 1.5)
    return cysts, margin, np.exp(rng.normal(0, GLAND))


def draw(patient, seed):
    """Anatomy of one row of `phantom.patients` (as a namedtuple or Series), the same for both modalities."""
    rng = np.random.default_rng([seed, patient.number])
    warp = [smooth_field(rng, AXES, 16) for _ in range(3)]  # no organ is a perfect ellipsoid
    space = [x + 1.8 * w for x, w in zip(np.meshgrid(*AXES, indexing="ij", sparse=True), warp, strict=True)]
    texture = smooth_field(rng, AXES, 3.2)
    line, radius, duct = gland(rng, patient)
    box, depth = tube(space, line, radius, squash=0.78)
    parenchyma = box, depth + texture[box]  # lobules, with fat between them
    loculi, nodules = cyst_shapes(rng, space, patient, line, radius)
    apart = np.random.default_rng([seed, patient.number, 3])  # the anatomy does not depend on these
    simple, margin, factors = distractors(apart, space, line, radius)
    organ = np.full(SHAPE, -99, np.float32)  # depth, in mm
    for box, depth in [parenchyma, *loculi, *simple]:
        organ[box] = np.maximum(organ[box], depth)
    vessels = np.clip(1.7 - 7 * np.hypot(warp[0], warp[1]), 0, 1)  # two fields vanish together along curves
    layers = neighbors(rng, space, clear=np.clip(-organ / 2 - 0.75, 0, 1), vessels=vessels)
    splenic_vein = line[4:] - [0, 1, 0] * (radius[4:, None] + 2.5)
    bile_duct = line[2] + np.array([[6, -6, 50], [5, -7, 16], [3, -5, 0], [5, -2, -14]])
    layers += [layer("blood", tube(space, splenic_vein, 4)), layer("pancreas", parenchyma)]
    layers += [layer("wall", (box, depth + 0.8)) for box, depth in simple + loculi]
    layers += [layer("fluid", cyst) for cyst in simple]
    layers += [layer("fluid", tube(space, bile_duct, 3.1)), layer("duct", tube(space, line[1:], duct[1:]))]
    layers += [layer("cyst", loculus) for loculus in loculi] + [layer("nodule", nodule) for nodule in nodules]
    return Anatomy(layers, texture, organ + 0.8 + margin, factors)
