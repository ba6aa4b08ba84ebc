"""Two-stage training: losses, stages, and a loop that resumes exactly."""

from lgvit_fast.training import losses, recipes
from lgvit_fast.training.config import DistillConfig, Stage1Config, Stage2Config, TrainConfig
from lgvit_fast.training.datasets import Data
from lgvit_fast.training.digits_recipe import digits_recipe
from lgvit_fast.training.distill import Distilled, distill, run_distillation
from lgvit_fast.training.identity import load_stage1
from lgvit_fast.training.loop import StageResult, train_stage
from lgvit_fast.training.run import TrainResult, train
from lgvit_fast.training.validation import Accuracy, validate

__all__ = [
    "Accuracy",
    "Data",
    "DistillConfig",
    "Distilled",
    "Stage1Config",
    "Stage2Config",
    "StageResult",
    "TrainConfig",
    "TrainResult",
    "digits_recipe",
    "distill",
    "load_stage1",
    "losses",
    "recipes",
    "run_distillation",
    "train",
    "train_stage",
    "validate",
]
