"""Accuracy of every exit, accuracy against depth, certified thresholds, wall clock, pictures."""

from lgvit_fast.evaluation.calibration import Calibration, Estimate, Expected, calibrate
from lgvit_fast.evaluation.evaluate import Evaluation, evaluate
from lgvit_fast.evaluation.recording import Recording, record
from lgvit_fast.evaluation.tradeoff import Point, candidates, choose, curves, measure, replay, sweep

__all__ = [
    "Calibration",
    "Estimate",
    "Evaluation",
    "Expected",
    "Point",
    "Recording",
    "calibrate",
    "candidates",
    "choose",
    "curves",
    "evaluate",
    "measure",
    "record",
    "replay",
    "sweep",
]
