"""Captioned images, from where they are kept to batches."""

from .batch import Batch
from .batches import BatchStream, ValidationBatches, make_train_batches, make_validation_batches
from .config import DataConfig
from .pairs import PairedBatches
