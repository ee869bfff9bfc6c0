"""Data: captioned images, from their source to batches."""

from typing import TYPE_CHECKING

from ...utils.imports import lazy_names


if TYPE_CHECKING:
    from .batch import Batch
    from .batches import BatchStream, ValidationBatches, make_train_batches, make_validation_batches
    from .data_config import DataConfig
    from .pairs import PairedBatches

__all__ = [
    "Batch",
    "BatchStream",
    "DataConfig",
    "PairedBatches",
    "ValidationBatches",
    "make_train_batches",
    "make_validation_batches",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".batch": ("Batch",),
        ".batches": ("BatchStream", "ValidationBatches", "make_train_batches", "make_validation_batches"),
        ".data_config": ("DataConfig",),
        ".pairs": ("PairedBatches",),
    },
)
