from .config import TrainingConfig
from .dreambooth import DreamBoothLoraTrainer, DreamBoothTrainer, DreamBoothTrainingConfig
from .interruption import TrainingInterrupted
from .loop import Trainer, train
from .lora import LoraTrainer, LoraTrainingConfig
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
