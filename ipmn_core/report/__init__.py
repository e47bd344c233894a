"""The executed notebooks of a profile as one offline HTML page."""

from ipmn_core.report.page import page_of, write
