"""A made-up cohort of the paper's classes."""

from ipmn_core.data import Cohort
from ipmn_core.names import LABELS


def paper_cohort(scans, cubes=None, key=""):
    """The cohort of a table of scans that has labels, and of cubes."""
    named = scans.assign(positive=scans["label"] == 2, fold_multiclass="", fold_binary="")
    named["class"] = [LABELS[label] for label in scans["label"]]
    return Cohort("made up", named, LABELS, LABELS[2:], cubes=cubes, key=key)
