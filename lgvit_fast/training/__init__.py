"""Two-stage training: losses, stages, data, and a loop that resumes exactly."""

from lgvit_fast.training import losses, recipes
from lgvit_fast.training.config import Stage1Config, Stage2Config, TrainConfig
from lgvit_fast.training.data import BadImageError, Data, InputSpec, eval_transform, open_dataset
from lgvit_fast.training.digits import Digits
from lgvit_fast.training.loop import (
    Accuracy,
    StageResult,
    TrainResult,
    load_stage1,
    train,
    train_stage,
    validate,
)

__all__ = [
    "Accuracy",
    "BadImageError",
    "Data",
    "Digits",
    "InputSpec",
    "Stage1Config",
    "Stage2Config",
    "StageResult",
    "TrainConfig",
    "TrainResult",
    "eval_transform",
    "load_stage1",
    "losses",
    "open_dataset",
    "recipes",
    "train",
    "train_stage",
    "validate",
]
