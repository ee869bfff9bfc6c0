from .config import TrainingConfig
from .interruption import TrainingInterrupted
from .loop import Trainer, train
from .lora import LoraTrainer, LoraTrainingConfig
from .options import parse_args


__all__ = [
    "LoraTrainer",
    "LoraTrainingConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingInterrupted",
    "parse_args",
    "train",
]
