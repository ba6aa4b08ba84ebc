"""Two-stage training: losses, stages, data, and a loop that resumes exactly."""

from lgvit_fast.training import losses, recipes
from lgvit_fast.training.batch import BadImageError, InputSpec
from lgvit_fast.training.config import Stage1Config, Stage2Config, TrainConfig
from lgvit_fast.training.data import Data, eval_transform, open_dataset
from lgvit_fast.training.digits import Digits, digits_recipe
from lgvit_fast.training.identity import load_stage1
from lgvit_fast.training.loop import StageResult, train_stage
from lgvit_fast.training.run import TrainResult, train
from lgvit_fast.training.validation import Accuracy, validate

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
    "digits_recipe",
    "eval_transform",
    "load_stage1",
    "losses",
    "open_dataset",
    "recipes",
    "train",
    "train_stage",
    "validate",
]
