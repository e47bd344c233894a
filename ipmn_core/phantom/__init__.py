"""A synthetic cohort with known truth: patients -> anatomy -> scanner -> files."""

from ipmn_core.phantom.files import CLASSES, write, write_patient, write_sheets
from ipmn_core.phantom.patients import (
    AXES,
    INVENTED,
    THRESHOLDS,
    guideline,
    patients,
    patients_of,
    population,
)
from ipmn_core.phantom.scanner import lesion, volumes
