"""From captioned images to a stage. READ SECOND."""

from ..utils.packages import require_packages


require_packages("training, or reading a data set,", "train", "datasets")

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
