"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242): fine-tuning on images of a subject, with prior preservation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...models.interface import StageNetwork
from ...text.source import TextSource
from ..compatibility import check_objective
from ..data import BatchStream, PairedBatches, make_train_batches
from ..loop import Trainer
from .class_images import draw_class_images
from .finetuning_config import DreamBoothTrainingConfig
from .lora_trainer import LoraTrainer


def check_folders(config: DreamBoothTrainingConfig) -> None:
    """Check the folders of images.

    Raises:
        ValueError: If the subject's is not a folder, or the class's exists and is not a folder.
    """
    for name in ("instance_data_dir", "class_data_dir"):
        folder = getattr(config, name)
        if folder is None or Path(folder).is_dir():
            continue
        if name == "instance_data_dir" or Path(folder).exists():
            raise ValueError(f"`{name}` is {folder!r}, which is not a folder.")


@contextmanager
def called(name: str) -> Iterator[None]:
    """Context manager that renames `train_data_dir` in error messages to the option `name`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("`train_data_dir`", f"`{name}`")) from error


class DreamBoothTrainer(Trainer):
    """Training on a subject, and with `with_prior_preservation` also on its class.

    Args:
        config (`DreamBoothTrainingConfig`): The configuration.
        unet (`StageNetwork`): The pretrained network.
        text (`TextSource`, *optional*): As in `train`.
    """

    config: DreamBoothTrainingConfig

    def adapt(self, unet: StageNetwork) -> None:
        if unet.text_width is None:
            raise ValueError("This network is not conditioned on text, but `instance_prompt` identifies the subject.")
        check_objective(self.config)
        check_folders(self.config)
        super().adapt(unet)

    def make_batches(self) -> BatchStream:
        with called("instance_data_dir"):
            subject = super().make_batches()
        if not self.config.with_prior_preservation:
            return subject
        draw_class_images(self.config, self.accelerator, self.pipeline(self.unet), self.text)
        with called("class_data_dir"):
            return PairedBatches(subject, make_train_batches(self.config.class_data(), self.text, *self.place))

    def weigh(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        losses = super().weigh(losses, log_snr)
        if not self.config.with_prior_preservation:
            return losses
        return losses[0::2] + self.config.prior_loss_weight * losses[1::2]


class DreamBoothLoraTrainer(DreamBoothTrainer, LoraTrainer):
    """Training of an adapter on a subject."""

    config: DreamBoothTrainingConfig


def make_trainer(config: DreamBoothTrainingConfig, unet: StageNetwork, text: TextSource | None = None) -> Trainer:
    """Create the trainer of the configuration: for an adapter, or for all weights."""
    return (DreamBoothTrainer if config.rank is None else DreamBoothLoraTrainer)(config, unet, text)
