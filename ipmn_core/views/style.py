"""The style of figures and tables: palette, sizes, one color per name; save figures, show tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from pandas.api.types import is_integer_dtype
from pandas.io.formats.style import Styler

from ipmn_core.disk import atomic
from ipmn_core.metrics import GLOBAL, RULES
from ipmn_core.names import ARMS, MODELS, REFERENCES

# Okabe and Ito's palette, which is safe for the common forms of color blindness
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6F6F6F")
BLACK = "#000000"
PAIRS = {"pooled": "all pairs (pooled)", "within": "within a center", "between": "between centers"}
GROUPS = (ARMS, MODELS, tuple(RULES.values()), tuple(PAIRS.values()))
COLORS = {name: PALETTE[k] for names in GROUPS for k, name in enumerate(names)}
COLORS |= dict(zip(REFERENCES, (*PALETTE[5:], PALETTE[2], BLACK, PALETTE[3]), strict=True))
COLORS |= {"t1": PALETTE[5], "t2": BLACK}  # no arm's color, because T1 and T2 share an arm's panel
_others: list[str] = []  # names that COLORS lacks, in order of first appearance

WIDTH = 9  # inches; at 900 pixels letters of 8 points are 11 pixels high
MANY = 12  # with more centers, a figure shows or names only some
SMALL = 8  # points, the smallest letters
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a name with two dollar signs is not a formula
}


def color(name: str) -> str:
    """Color of an arm, model or modality, the same in all figures.

    Other names get dark colors that never repeat (golden angle).
    """
    if name in COLORS:
        return COLORS[name]
    if name not in _others:
        _others.append(name)
    return to_hex(hsv_to_rgb(((0.08 + 0.381966 * _others.index(name)) % 1, 0.9, 0.5)))


def in_order(arms: Iterable[str]) -> list[str]:
    """Distinct arms or models in the order of COLORS, then the others as they appear."""
    places = {name: k for k, name in enumerate(COLORS)}
    return sorted(dict.fromkeys(arms), key=lambda name: places.get(name, len(places)))


def centers_in(names: Iterable[str]) -> list[str]:
    """Distinct centers as they appear, "global" last."""
    return sorted(dict.fromkeys(names), key=lambda name: name == GLOBAL)


def name_ticks(axis: Axis, names: Sequence[str]) -> None:
    """Write names at the ticks of an axis: only some if there are many, and rotated if they would overlap."""
    step, names = -(-len(names) // MANY), [short(name) for name in names]
    axis.set_ticks(range(0, len(names), step), names[::step], fontsize=SMALL)
    if axis.axis_name == "x" and len(names) * max(map(len, names), default=0) > 40:
        axis.set_tick_params(rotation=90)


def short(name: str) -> str:
    """A name shortened for a title or tick."""
    return name if len(name) <= 22 else f"{name[:13]} … {name[-6:]}"


def use_style() -> None:
    """Set one font size, palette and layout for all figures that follow."""
    plt.switch_backend(plt.get_backend())  # loaded in an `rc_context`, Jupyter's shows no more figures
    plt.rcParams.update(STYLE)
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=PALETTE)


def save(figure: Figure, stem: str, folder: str | Path) -> Figure:
    """Write a figure as `<stem>.png` into `folder` and return it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic(Path(folder) / f"{stem}.png") as tmp:
        figure.savefig(tmp, format="png")
    return figure


def png(figure: Figure) -> bytes:
    """The bytes of a figure as PNG; closes the figure."""
    with BytesIO() as buffer:
        figure.savefig(buffer, format="png")
        plt.close(figure)
        return buffer.getvalue()


def show(table: pd.DataFrame, precision: int = 3, **kwargs) -> Styler:
    """A table for a notebook: numbers with `precision` decimals, "n/a" for NaN, names as text, not HTML.

    Hides an index that only counts rows. `kwargs` go to `Styler.format`, for instance a format per column.
    """
    styler = table.style.format(**{"precision": precision, "na_rep": "n/a", "escape": "html", **kwargs})
    counts = table.index.name is None and is_integer_dtype(table.index)
    return styler.hide() if counts else styler
