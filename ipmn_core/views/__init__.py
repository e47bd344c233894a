"""What people look at: figures and live views."""

from ipmn_core.views.gradcam import by_class
from ipmn_core.views.results import (
    against_paper,
    confusions,
    forests,
    overview,
    roc_by_center,
    scanners,
    training_curves,
)
from ipmn_core.views.review import (
    auc_intervals,
    cosines,
    decision_curves,
    drift,
    gain,
    majority,
    optimism,
    reliability_diagrams,
    within_and_between,
)
from ipmn_core.views.scans import (
    center_gallery,
    prediction,
    roi_and_cube,
    scan_volumes,
    show_slice,
    slices,
)
from ipmn_core.views.style import PALETTE, color, png, save, show, use_style
from ipmn_core.views.widgets import attention_viewer, center_explorer, fedprox_by_hand, roi_viewer
