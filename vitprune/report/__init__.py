"""The report of a run: its figures as one JSON document, as a page, and as images of which tokens stay."""

from vitprune.report.build import build_report
from vitprune.report.coverage import object_coverage
from vitprune.report.results import accuracy_of, forget_results, write_results

__all__ = ["accuracy_of", "build_report", "forget_results", "object_coverage", "write_results"]
