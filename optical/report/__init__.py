"""Tables, figures and the report of a study, made from its results alone."""

from optical.report.figures import draw_figures
from optical.report.report import write_report

__all__ = ["draw_figures", "write_report"]
