"""A synthetic cohort with known truth: patients -> anatomy -> scanner -> files."""

from ipmn_core.phantom.files import write, write_patient, write_sheets
from ipmn_core.phantom.patients import THRESHOLDS, guideline, patients, population
from ipmn_core.phantom.scanner import lesion, volumes
