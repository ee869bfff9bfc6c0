from .config import TrainingConfig
from .loop import train


__all__ = ["TrainingConfig", "train"]
