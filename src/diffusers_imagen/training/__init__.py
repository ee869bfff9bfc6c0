from .config import TrainingConfig
from .interruption import TrainingInterrupted
from .loop import Trainer, train
from .options import parse_args


__all__ = ["Trainer", "TrainingConfig", "TrainingInterrupted", "parse_args", "train"]
