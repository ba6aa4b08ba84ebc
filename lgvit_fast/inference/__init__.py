"""Engines that turn early exits into wall-clock speed."""

from lgvit_fast.inference.engine import Engine
from lgvit_fast.inference.planner import Costs, Plan, measure_costs, plan_exits
from lgvit_fast.inference.prepared import pack_
from lgvit_fast.inference.report import Report, RuntimeTiming, SegmentReport
from lgvit_fast.inference.streaming import Answer, Stream, stream

__all__ = [
    "Answer",
    "Costs",
    "Engine",
    "Plan",
    "Report",
    "RuntimeTiming",
    "SegmentReport",
    "Stream",
    "measure_costs",
    "pack_",
    "plan_exits",
    "stream",
]
