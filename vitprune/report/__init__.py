"""The report of a run: its figures as one JSON document, as a page, and as images of which tokens are kept."""

from vitprune.report.build import accuracy_of, build_report, write_results
from vitprune.report.keepmaps import object_coverage
from vitprune.report.schema import Report

__all__ = ["Report", "accuracy_of", "build_report", "object_coverage", "write_results"]
