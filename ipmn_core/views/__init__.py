"""Figures and live views."""

from ipmn_core.views.by_hand import fedprox_by_hand
from ipmn_core.views.explorer import center_explorer
from ipmn_core.views.gradcam import by_class
from ipmn_core.views.live import attention_viewer, roi_viewer
from ipmn_core.views.results import benchmark, forests, roc_by_center, scanners, training_curves
from ipmn_core.views.review import (
    auc_intervals,
    cross_site,
    decision_curves,
    dial,
    fusion,
    gain,
    majority,
    optimism,
    reliability_diagrams,
    strategies,
    within_and_between,
)
from ipmn_core.views.scans import center_gallery, prediction, roi_and_cube, scan_volumes, show_slice, slices
from ipmn_core.views.style import color, save, show, use_style
