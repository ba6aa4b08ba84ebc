"""Engines that turn early exits into wall-clock speed."""

from lgvit_fast.inference.engine import Engine
from lgvit_fast.inference.report import Report, SegmentReport
from lgvit_fast.inference.stream import Answer, Stream, stream

__all__ = ["Answer", "Engine", "Report", "SegmentReport", "Stream", "stream"]
