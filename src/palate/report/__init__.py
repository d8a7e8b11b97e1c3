"""Reports: one HTML file of one run, or of several beside each other."""

from palate.report.render import write_report

__all__ = ["write_report"]
