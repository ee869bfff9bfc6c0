"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) of a stage: a few images of a subject, with prior preservation."""

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
    """Checks that the folders of the images are folders.

    Raises:
        ValueError: If the subject's is not, or something else is in the place of the class's.
    """
    for name in ("instance_data_dir", "class_data_dir"):
        folder = getattr(config, name)
        if folder is None or Path(folder).is_dir():
            continue
        if name == "instance_data_dir" or Path(folder).exists():
            raise ValueError(f"`{name}` is {folder!r}, which is no folder.")


@contextmanager
def called(name: str) -> Iterator[None]:
    """Inside, errors about `train_data_dir` are about the option that stands for it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("`train_data_dir`", f"`{name}`")) from error


class DreamBoothTrainer(Trainer):
    """A run on a subject, and with `with_prior_preservation` on its class.

    Args:
        config (`DreamBoothTrainingConfig`): The settings.
        unet (`StageNetwork`): The trained network.
        text (`TextSource`, *optional*): As `train`.
    """

    config: DreamBoothTrainingConfig

    def adapt(self, unet: StageNetwork) -> None:
        if unet.text_width is None:
            raise ValueError("This network reads no text, but `instance_prompt` tells the subject by a word.")
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
    """A run on a subject that trains an adapter."""

    config: DreamBoothTrainingConfig


def make_trainer(config: DreamBoothTrainingConfig, unet: StageNetwork, text: TextSource | None = None) -> Trainer:
    """The run that the configuration means: of an adapter, or of all weights."""
    return (DreamBoothTrainer if config.rank is None else DreamBoothLoraTrainer)(config, unet, text)
