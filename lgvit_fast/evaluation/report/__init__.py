"""Should early exits be used at all? Accuracy and time beside what one would use instead, as a page."""

from lgvit_fast.evaluation.report.make import Report, make_report
from lgvit_fast.evaluation.report.page import page
from lgvit_fast.evaluation.report.rows import ENGINES, PRECISIONS, LeftOut, Row, Way
from lgvit_fast.evaluation.report.verdict import Verdict, verdicts

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "LeftOut",
    "Report",
    "Row",
    "Verdict",
    "Way",
    "make_report",
    "page",
    "verdicts",
]
