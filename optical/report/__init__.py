"""Statistics, tables, figures and the report of a study, computed from its results only."""

from optical.report.figures import draw_figures
from optical.report.report import write_report
from optical.report.stored import report_folder
from optical.report.summary import StudyDescription

__all__ = ["StudyDescription", "draw_figures", "report_folder", "write_report"]
