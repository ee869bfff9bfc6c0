"""Captioned images, from where they are kept to batches."""

from .batch import Batch
from .batches import BatchStream, ValidationBatches, make_train_batches, make_validation_batches
from .data_config import DataConfig
from .pairs import PairedBatches
