"""From disk to cubes: the cohort, its table of scans, folds, ROI cubes."""

from ipmn_core.data.check import volume_problems
from ipmn_core.data.cohort import (
    PAPER,
    Cohort,
    classes_of,
    inspect,
    load_cohort,
    open_cohort,
    read,
    read_truth,
    subset,
    table1,
)
from ipmn_core.data.cubes import (
    ScanError,
    area_weights,
    bounding_box,
    check_range,
    crop,
    load_cubes,
    load_image,
    load_mask,
    load_roi,
    scanner_facts,
    to_cube,
)
from ipmn_core.data.folds import assign_folds, inner_validation, targets
from ipmn_core.data.releases import CohortError, case_name
