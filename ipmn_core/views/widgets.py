"""Live views for JupyterLab: ipywidgets to choose, the figures of this room to show.

A picture is an Image widget, not what an Output widget captures: a client that runs the notebook headless
answers an Output widget while it waits for the kernel, and may then never see the kernel's reply. Each view
also carries what an HTML page shows in its place where no kernel runs: a static-data form, or a sentence.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.util import find_spec

import ipywidgets as w
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ipmn_core import metrics
from ipmn_core.data import ScanError
from ipmn_core.metrics import centers
from ipmn_core.names import CENTERS, LABELS, MODALITIES, class_names, display_name
from ipmn_core.views import by_hand, results, static, style
from ipmn_core.views.gradcam import Look
from ipmn_core.views.scans import Case, header_facts, middle, open_case, three_planes, window_of

ANY = -1  # no choice of class
LIVE_PICTURE = {"savefig.bbox": None, "savefig.dpi": 100}  # of one size: nothing jumps; and soon drawn


class LiveView(w.VBox):
    """A view with a static-data form beside it in the notebook's output."""

    def still(self) -> str:
        """The view as HTML without a kernel."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"text/html": self.still()}


class RoiViewer(LiveView):
    """A viewer of one case of `scans`, chosen by center, modality and class, in three opening.

    Above the image with the pancreas outlined, below the cube of edge `size` that a network gets, both with
    one cross-hair; beside them the header's facts. Of cases among `looks` a switch shows where a network
    looks, over the cube.
    """

    def __init__(self, scans: pd.DataFrame, size: int = 32, looks: Sequence[Look] = ()):
        self.scans, self.size, self.opened, self.choosing = scans, size, None, False
        self.looks = {look.case_id: look for look in looks}
        self._choices()
        self._controls()
        super().__init__(
            [
                _row([self.center, self.modality, self.label, self.case]),
                _row([*self.position, self.near]),
                _row([self.level, self.window, self.outline, self.heat, self.niivue]),
                _row([self.picture, self.facts]),
                self.native,
            ]
        )
        self._list_cases()

    def _choices(self) -> None:
        present = lambda names, column: [n for n in names if (self.scans[column] == n).any()]  # noqa: E731
        self.center = _dropdown("center", present(CENTERS, "center"))
        self.modality = _dropdown("modality", [(m.upper(), m) for m in present(MODALITIES, "modality")])
        self.label = _dropdown("class", [("any", ANY), *((name, k) for k, name in enumerate(LABELS))])
        self.case = _dropdown("case", [])
        for control in (self.center, self.modality, self.label):
            control.observe(self._list_cases, "value")
        self.case.observe(self._open_case, "value")

    def _controls(self) -> None:
        slider = {"continuous_update": False, "min": 1, "max": 1, "layout": w.Layout(width="230px")}
        self.position = [w.IntSlider(description=name, **slider) for name in ("sagittal", "coronal", "axial")]
        self.level = w.FloatSlider(description="level", readout_format=".3g", **slider)
        self.window = w.FloatSlider(description="window", readout_format=".3g", **slider)
        self.outline = _toggle("outline", True, "the pancreas, as its mask has it")
        self.near = _toggle("close-up", True, "the pancreas' surroundings only")
        self.heat = _toggle("Grad-CAM", bool(self.looks), "where the model looks, over the cube")
        self.heat.disabled = not self.looks
        self.niivue = _toggle("NiiVue", False, "image and mask in NiiVue, with WebGL")
        if find_spec("ipyniivue") is None:
            self.niivue.disabled, self.niivue.tooltip = True, "needs: pip install 'ipmn[viewer]'"
        self.picture, self.facts, self.native = _picture(), w.HTML(), w.VBox()
        for control in (*self.position, self.level, self.window, self.outline, self.near, self.heat):
            control.observe(self._draw, "value")
        self.niivue.observe(self._show_native, "value")

    def show(self, case_id: str, modality: str) -> None:
        """Show a case by name. Raises KeyError if it is none of the scans."""
        rows = self.scans[(self.scans["case_id"] == case_id) & (self.scans["modality"] == modality)]
        if rows.empty:
            raise KeyError(f"{case_id} ({modality}) is none of the viewer's scans")
        self.choosing = True  # the cases on the way to this one are not opened
        self.label.value, self.modality.value = ANY, modality
        self.center.value = rows.iloc[0]["center"]
        self.case.value, self.choosing = rows.index[0], False
        self._open_case()

    def _list_cases(self, _=None) -> None:
        rows = self.scans[
            (self.scans["center"] == self.center.value) & (self.scans["modality"] == self.modality.value)
        ]
        rows = rows if self.label.value == ANY else rows[rows["label"] == self.label.value]
        self.case.options = [(scan.case_id, scan.Index) for scan in rows.itertuples()]
        if self.case.options:
            self.case.index = 0  # ipywidgets leaves a list that was empty without a choice
        else:
            self._open_case()  # of a list that was empty before, ipywidgets tells nothing

    def _open_case(self, _=None) -> None:
        if self.choosing:
            return
        if self.case.value is None:
            self._show_nothing("no such case")
            return
        self.opened = None  # nothing is drawn while the sliders move to the new case
        try:
            opened = open_case(self.scans.loc[self.case.value], self.size)
        except ScanError as error:  # or the last case's picture would stay beside this one's name
            self._show_nothing(str(error))
            return
        for slider, at, n in zip(self.position, middle(opened), opened.image.shape, strict=True):
            slider.max, slider.value = n, at + 1
        _fit(self.level, self.window, opened)
        self.opened = opened
        self.facts.value = _as_list(header_facts(opened) | self._told())
        self._draw()
        self._show_native()

    def _show_nothing(self, why: str) -> None:
        self.opened, self.picture.value, self.facts.value = None, b"", html.escape(why)
        self._show_native()

    def _told(self) -> dict[str, str]:
        look = self.looks.get(self.opened.scan["case_id"])
        if look is None:
            return {}
        lesion = "n/a" if look.lesion is None else f"{look.share:.2f}, {look.expected:.2f} expected"
        asked = look.asked_name
        return {"Grad-CAM of": f"{asked}, probability {look.prob:.2f}", "on the lesion": lesion}

    def _draw(self, _=None) -> None:
        if self.opened is None:
            return
        position = [slider.value - 1 for slider in self.position]
        self.picture.value = _png(three_planes(self.opened, position))

    def _show_native(self, _=None) -> None:
        shown, old = self.niivue.value and self.opened is not None, self.native.children
        self.native.children = (_in_niivue(self.opened.scan),) if shown else ()
        for widget in old:
            widget.close()

    def still(self) -> str:
        if self.looks:
            return "<p>Live in JupyterLab: the heat map over the cube, plane by plane, of every case.</p>"
        first = self.scans[self.scans["modality"] == self.scans["modality"].iloc[-1]]
        high = first.sort_values("label", ascending=False, kind="stable").groupby("center").head(1)
        return static.viewer(high.sort_values("center", key=lambda c: c.map(CENTERS.index)), self.size)


def roi_viewer(scans: pd.DataFrame, size: int = 32) -> RoiViewer:
    """A live viewer of the cases of `scans` in three planes, beside the cube of edge `size`: `RoiViewer`."""
    return RoiViewer(scans, size)


def attention_viewer(looks: Sequence[Look], scans: pd.DataFrame) -> RoiViewer:
    """The same for the cases of `looks` (`gradcam.of_run`), with the heat map over the cube."""
    cases = {look.case_id for look in looks}
    mine = scans[scans["case_id"].isin(cases) & (scans["modality"] == looks[0].modality)]
    return RoiViewer(mine, len(looks[0].cube), looks)


def _row(children: Sequence[w.Widget]) -> w.HBox:
    """The widgets side by side, in more rows where the page is narrow: Lab hides what is too wide."""
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap"))


def _picture() -> w.Image:
    return w.Image(format="png", layout=w.Layout(max_width="100%", align_self="flex-start"))


def _dropdown(name: str, options: Sequence) -> w.Dropdown:
    layout = w.Layout(width="215px")
    return w.Dropdown(options=options, description=name, layout=layout, style={"description_width": "60px"})


def _toggle(name: str, value: bool, tooltip: str) -> w.ToggleButton:
    return w.ToggleButton(value=value, description=name, tooltip=tooltip, layout=w.Layout(width="100px"))


def _fit(level: w.FloatSlider, window: w.FloatSlider, opened: Case) -> None:
    """The sliders' range and values for the stored values of a case."""
    low, high = window_of(opened)
    span = max(high - low, 1e-6)
    for slider, least, most, value in (
        (level, low - span / 2, high + span / 2, (low + high) / 2),
        (window, span / 50, 2 * span, span),
    ):
        slider.max = max(slider.max, most)  # first: a slider refuses a least value above its greatest
        slider.min, slider.max, slider.step, slider.value = least, most, span / 50, value


def _as_list(facts: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><td><b>{html.escape(name)}</b>&emsp;</td><td>{html.escape(text)}</td></tr>"
        for name, text in facts.items()
    )
    return f"<table style='line-height:1.5'>{rows}</table>"


def _png(figure: Figure) -> bytes:
    with plt.rc_context(LIVE_PICTURE):
        return style.png(figure)


def _in_niivue(scan: pd.Series) -> w.Widget:
    """Image and, over it, mask of a cohort row in NiiVue (extra `viewer`)."""
    from ipyniivue import NiiVue

    volumes = [{"path": scan["image"]}]
    if scan["mask"]:
        volumes.append({"path": scan["mask"], "colormap": "red", "opacity": 0.4})
    shown = NiiVue(height=420, is_radiological_convention=True, sagittal_nose_left=True, crosshair_width=1)
    shown.load_volumes(volumes)
    return shown


class CenterExplorer(LiveView):
    """Results center by center: intervals of all, and of one the ROC, confusions, scores, worst cases.

    `predictions` of one or both tasks, every epoch; `validation` those of the inner split, if any. A case
    chosen from the worst opens in a viewer of `scans`.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        validation: pd.DataFrame | None,
        scans: pd.DataFrame,
        size: int = 32,
        seed: int = 0,
    ):
        self.selected, self.seed, self.summaries = centers.by_rules(predictions, validation), seed, {}
        self.viewer = RoiViewer(scans, size)
        self.viewer.layout.display = "none"
        self._choices()
        super().__init__(
            [
                _row([self.task, self.modality, self.rule, self.metric]),
                _row([self.arms, self.forest]),
                self.center,
                _row([self.arm]),
                self.details,
                self.worst,
                self.viewer,
            ]
        )
        self._list_arms()

    def _choices(self) -> None:
        known = lambda column: list(dict.fromkeys(self.selected[column]))  # noqa: E731
        named = lambda names: [(display_name(n).replace("_", " "), n) for n in names]  # noqa: E731
        self.task = _dropdown("task", named(known("task")))
        self.modality = _dropdown("modality", named(sorted(known("modality"))))
        self.rule = _dropdown("rule", [(centers.RULES[rule], rule) for rule in known("rule")])
        self.metric = w.ToggleButtons(options=[("AUC", "auc"), ("ACC", "acc")], description="metric")
        self.arms = w.SelectMultiple(description="arms", rows=8, layout=w.Layout(width="260px"))
        present = [c for c in CENTERS if (self.selected["center"] == c).any()]
        options = [(display_name(c), c) for c in (metrics.GLOBAL, *present)]
        self.center = w.ToggleButtons(options=options, description="center", style={"button_width": "70px"})
        self.arm = _dropdown("method", [])
        self.worst = w.Select(description="most wrong", rows=8, layout=w.Layout(width="640px"))
        self.worst.style.description_width = "90px"
        self.forest, self.details = _picture(), _picture()
        self.task.observe(self._list_arms, "value")
        for control in (self.modality, self.rule, self.arms, self.center):
            control.observe(self._draw, "value")
        self.metric.observe(self._show_forest, "value")
        self.arm.observe(self._show_center, "value")
        self.worst.observe(self._open_case, "value")

    def rows(self) -> pd.DataFrame:
        """Predictions of the chosen task, modality, rule and arms."""
        s = self.selected
        chosen = (s["task"] == self.task.value) & (s["modality"] == self.modality.value)
        return s[chosen & (s["rule"] == self.rule.value) & s["arm"].isin(self.arms.value)]

    def summary(self, key: tuple[str, str, str] | None = None) -> pd.DataFrame:
        """Intervals of a task, modality and rule, by default those chosen, computed once."""
        key = key or (self.task.value, self.modality.value, self.rule.value)
        if key not in self.summaries:
            s = self.selected
            rows = s[(s["task"] == key[0]) & (s["modality"] == key[1]) & (s["rule"] == key[2])]
            self.summaries[key] = centers.summary(rows, seed=self.seed) if len(rows) else pd.DataFrame()
        return self.summaries[key]

    def _list_arms(self, _=None) -> None:
        arms = list(dict.fromkeys(self.selected.loc[self.selected["task"] == self.task.value, "arm"]))
        self.listed = False  # nothing is drawn while the lists change
        self.arms.options = self.arm.options = [(display_name(arm), arm) for arm in arms]
        self.arms.value, self.arm.value, self.listed = tuple(arms), arms[0], True
        self._draw()

    def _draw(self, _=None) -> None:
        if self.listed:
            self._show_forest()
            self._show_center()

    def _show_forest(self, _=None) -> None:
        table = self.summary()
        if len(table):
            table = table[(table["metric"] == self.metric.value) & table["arm"].isin(self.arms.value)]
        self.forest.value = _png(results.overview(table, self.center.value)) if len(table) else b""

    def _show_center(self, _=None) -> None:
        if not self.listed:
            return
        rows, center, arm = self.rows(), self.center.value, self.arm.value
        self.details.value = _png(results.center_in_detail(rows, center, arm)) if len(rows) else b""
        mine = centers.at(rows[rows["arm"] == arm], center)
        worst = centers.most_wrong(mine).itertuples() if len(mine) else ()
        names = class_names(self.task.value)
        self.worst.options = [("choose a case to open it in the viewer", None)] + [
            (
                f"{case.center} {case.case_id}: {names[case.y_true]}, predicted {names[case.predicted]}; "
                f"p(true class) = {case.probability:.2f}",
                (case.case_id, case.modality),
            )
            for case in worst
        ]

    def _open_case(self, _=None) -> None:
        self.viewer.layout.display = "none" if self.worst.value is None else ""
        if self.worst.value is not None:
            self.viewer.show(*self.worst.value)

    def still(self) -> str:
        keys = (
            self.selected[["task", "modality", "rule"]].drop_duplicates().itertuples(index=False, name=None)
        )
        return static.explorer(self.selected, pd.concat([self.summary(key) for key in keys]))


def center_explorer(
    predictions: pd.DataFrame,
    validation: pd.DataFrame | None,
    scans: pd.DataFrame,
    size: int = 32,
    seed: int = 0,
) -> CenterExplorer:
    """A live view of results center by center, down to single cases: `CenterExplorer`."""
    return CenterExplorer(predictions, validation, scans, size, seed)


class ByHand(LiveView):
    """FedProx by hand."""

    def still(self) -> str:
        return "<p>Live in JupyterLab: the figure above, with a slider for each of its settings.</p>"


def fedprox_by_hand() -> ByHand:
    """The two centers of `by_hand`: choose mu, local steps, rounds, heterogeneity and optimizer.

    Left every step in the plane of the two weights, right the drift of each round.
    """
    look = {"continuous_update": False, "style": {"description_width": "initial"}}
    mu = w.FloatSlider(description="mu", value=0.3, min=0, max=1, step=0.05, **look)
    steps = w.IntSlider(description="local steps", value=20, min=1, max=50, **look)
    rounds = w.IntSlider(description="rounds", value=6, min=1, max=8, **look)
    apart = w.FloatSlider(description="heterogeneity", value=1, min=0, max=1, step=0.1, **look)
    optimizer = w.ToggleButtons(options=list(by_hand.OPTIMIZERS), description="optimizer")
    picture = _picture()

    def draw(_=None) -> None:
        centers = by_hand.draw_centers(apart.value)
        paths = by_hand.paths(centers, mu.value, steps.value, rounds.value, optimizer.value)
        picture.value = _png(by_hand.beside(centers, paths))

    for control in (mu, steps, rounds, apart, optimizer):
        control.observe(draw, "value")
    draw()
    return ByHand([_row([mu, steps, rounds]), _row([apart, optimizer]), picture])
