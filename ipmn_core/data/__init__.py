"""From disk to cubes: the table of scans, folds, ROI cubes."""

from ipmn_core.data.check import inspect, volume_problems, worst_first
from ipmn_core.data.cohort import (
    Cohort,
    for_spreadsheet,
    from_spreadsheet,
    in_one_cell,
    load_cohort,
    open_cohort,
    read,
    read_truth,
    subset,
    table1,
)
from ipmn_core.data.cubes import (
    Cubes,
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
from ipmn_core.data.folds import assign_folds, inner_validation
from ipmn_core.data.releases import CohortError, case_name

__all__ = [
    "Cohort",
    "CohortError",
    "Cubes",
    "ScanError",
    "area_weights",
    "assign_folds",
    "bounding_box",
    "case_name",
    "check_range",
    "crop",
    "for_spreadsheet",
    "from_spreadsheet",
    "in_one_cell",
    "inner_validation",
    "inspect",
    "load_cohort",
    "load_cubes",
    "load_image",
    "load_mask",
    "load_roi",
    "open_cohort",
    "read",
    "read_truth",
    "scanner_facts",
    "subset",
    "table1",
    "to_cube",
    "volume_problems",
    "worst_first",
]
