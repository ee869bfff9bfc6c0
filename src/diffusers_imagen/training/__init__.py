"""Training: from captioned images to a trained stage. Read this package after `pipelines`."""

from typing import TYPE_CHECKING

from ..utils.imports import lazy_names
from ..utils.packages import require_packages


if TYPE_CHECKING:
    from .config import TrainingConfig
    from .finetuning.dreambooth import DreamBoothLoraTrainer, DreamBoothTrainer
    from .finetuning.finetuning_config import DreamBoothTrainingConfig, LoraTrainingConfig
    from .finetuning.lora_trainer import LoraTrainer
    from .interruption import TrainingInterrupted
    from .loop import Trainer, train
    from .options import parse_args

__all__ = [
    "DreamBoothLoraTrainer",
    "DreamBoothTrainer",
    "DreamBoothTrainingConfig",
    "LoraTrainer",
    "LoraTrainingConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingInterrupted",
    "parse_args",
    "train",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".config": ("TrainingConfig",),
        ".finetuning.dreambooth": ("DreamBoothLoraTrainer", "DreamBoothTrainer"),
        ".finetuning.finetuning_config": ("DreamBoothTrainingConfig", "LoraTrainingConfig"),
        ".finetuning.lora_trainer": ("LoraTrainer",),
        ".interruption": ("TrainingInterrupted",),
        ".loop": ("Trainer", "train"),
        ".options": ("parse_args",),
    },
)
require_packages("training, or reading a data set,", "train", "datasets")
