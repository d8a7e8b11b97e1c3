"""Reports: one HTML file on one run, or on several runs side by side."""

from palate.report.render import write_report

__all__ = ["write_report"]
