"""Evaluation: accuracy of every exit, accuracy against depth, wall clock, and pictures of them."""

from lgvit_fast.evaluation.evaluate import Evaluation, evaluate
from lgvit_fast.evaluation.machine import machine
from lgvit_fast.evaluation.recording import Recording, record
from lgvit_fast.evaluation.timing import Spread, Timing, compare
from lgvit_fast.evaluation.tradeoff import Point, candidates, choose, curves, measure, replay, sweep

__all__ = [
    "Evaluation",
    "Point",
    "Recording",
    "Spread",
    "Timing",
    "candidates",
    "choose",
    "compare",
    "curves",
    "evaluate",
    "machine",
    "measure",
    "record",
    "replay",
    "sweep",
]
