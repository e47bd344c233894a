"""From disk to cubes: the cohort, its table of scans, folds, ROI cubes."""

from ipmn_core.data.cohort import (
    PAPER,
    Cohort,
    classes_of,
    inspect,
    load_cohort,
    open_cohort,
    paired,
    read,
    read_truth,
    subset,
    table1,
    told,
)
from ipmn_core.data.cubes import area_weights, load_cubes, scanner_facts, to_cube, volume_problems
from ipmn_core.data.folds import UNSEEN, assign_folds, inner_validation, targets
from ipmn_core.data.manifest import UNLABELLED, unlabelled
from ipmn_core.data.releases import CohortError, case_name
from ipmn_core.data.scan import (
    Scan,
    ScanError,
    bounding_box,
    crop,
    load_roi,
    read_scan,
    resample,
)
