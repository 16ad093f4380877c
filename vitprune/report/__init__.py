"""The report of a run: its figures as one JSON document."""

from vitprune.report.build import build_report
from vitprune.report.coverage import object_coverage

__all__ = ["build_report", "object_coverage"]
