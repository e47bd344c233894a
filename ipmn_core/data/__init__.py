"""From disk to cubes: the table of scans, folds, ROI cubes."""

from ipmn_core.data.check import inspect, volume_problems
from ipmn_core.data.cohort import Cohort, load_cohort, open_cohort, read, read_truth, subset, table1
from ipmn_core.data.cubes import area_weights, load_cubes, scanner_facts, to_cube
from ipmn_core.data.folds import assign_folds, inner_validation
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
