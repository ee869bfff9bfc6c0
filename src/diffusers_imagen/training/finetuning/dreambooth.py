"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242) of a stage: a few images of a subject, with prior preservation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ...models.unet_base import ConditionalUNet
from ...text.source import TextSource
from ...utils.arguments import check_exactly_one
from ..compatibility import check_objective
from ..data import BatchStream, DataConfig, PairedBatches, make_train_batches
from ..data.data_config import arg
from ..loop import Trainer
from ..settings import check_settings
from .class_images import draw_class_images
from .lora_trainer import LoraTrainer, LoraTrainingConfig


LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-6, 5e-4
OF_THE_PRIOR = ("class_data_dir", "class_prompt", "class_model", "prior_loss_weight", "num_class_images")


@dataclass
class DreamBoothTrainingConfig(LoraTrainingConfig):
    """Settings of a run that teaches a stage a subject."""

    instance_data_dir: str | None = arg(None, "Folder with the images of the subject, or give `dataset_name`.")
    instance_prompt: str | None = arg(None, 'Caption of those images, such as "a photo of sks dog".')
    with_prior_preservation: bool = arg(
        False, "Train on images of the subject's class too, as many as of the subject."
    )
    class_data_dir: str | None = arg(None, "Folder with the images of the class; what it lacks is drawn.")
    class_prompt: str | None = arg(None, 'Caption of the class images, such as "a photo of a dog".')
    class_model: str | None = arg(
        None, "Pipeline that draws class images, a folder or a Hub id; without it, the stage that is trained does."
    )
    num_class_images: int = arg(100, "Class images there should be.")
    prior_loss_weight: float = arg(1.0, "Weight of the loss of the class images.")
    sample_batch_size: int = arg(4, "Class images drawn at a time.")

    rank: int | None = arg(None, "Train a LoRA adapter of this rank; without it, all weights.")
    learning_rate: float | None = arg(
        None, f"Peak learning rate; {LEARNING_RATE} if not given, {ADAPTER_LEARNING_RATE} of an adapter."
    )
    max_train_steps: int = arg(400, "Optimizer steps.")
    lr_warmup_steps: int = arg(0, "Steps of linear warm-up.")
    train_batch_size: int = arg(4, "Images of the subject, a device and a step.")
    use_ema: bool = arg(False, "Average the weights over steps; the average is what is exported.")

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE if self.rank is None else ADAPTER_LEARNING_RATE
        check_settings(self)  # before they are taken for others
        self._take_instances()
        super().__post_init__()
        self._check_prior()

    def tags(self) -> list[str]:
        return ["dreambooth", *(super().tags() if self.rank is not None else [])]

    def _take_instances(self) -> None:
        """The subject's images and prompt are the data and its caption."""
        if self.train_data_dir not in (None, self.instance_data_dir):
            raise ValueError(
                f"`train_data_dir` is {self.train_data_dir!r}, but here it is called `instance_data_dir`."
            )
        check_exactly_one(instance_data_dir=self.instance_data_dir, dataset_name=self.dataset_name)
        if not self.instance_prompt:
            raise ValueError(
                f"`instance_prompt` is {self.instance_prompt!r}, but should name the subject, like 'a photo of sks dog'."
            )
        if self.caption not in (None, self.instance_prompt):
            raise ValueError(f"`caption` is {self.caption!r}, but here it is called `instance_prompt`.")
        self.train_data_dir, self.caption = self.instance_data_dir, self.instance_prompt

    def _check_prior(self) -> None:
        if not self.with_prior_preservation:
            defaults = {f.name: f.default for f in fields(DreamBoothTrainingConfig)}
            for name in OF_THE_PRIOR:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r}, but only `with_prior_preservation` has class images."
                    )
            return
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(self, name):
                raise ValueError(f"`with_prior_preservation` needs `{name}`, but it is {getattr(self, name)!r}.")
        if self.aspect_ratio_buckets is not None:
            raise ValueError(
                "`aspect_ratio_buckets` is given, but the subject and its class share a batch of squares."
            )

    def class_data(self) -> DataConfig:
        """The class images as data, of the same sides and batches."""
        same = {f.name: getattr(self, f.name) for f in fields(DataConfig)}
        other = {"train_data_dir": self.class_data_dir, "caption": self.class_prompt, "train_split": "train"}
        unset = ("dataset_name", "dataset_config_name", "styles", "balance_by", "weight_column", "max_train_samples")
        return DataConfig(**{**same, **other, **dict.fromkeys(unset), "streaming": False})


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
        unet (`ConditionalUNet`): The trained network.
        text (`TextSource`, *optional*): As `train`.
    """

    def adapt(self, unet: ConditionalUNet) -> None:
        if unet.config.encoder_hid_dim is None:
            raise ValueError("This network reads no text, but `instance_prompt` tells the subject by a word.")
        check_objective(self.config)
        check_folders(self.config)
        super().adapt(unet)

    def make_batches(
        self, unet: ConditionalUNet, text: TextSource | None, process_index: int, num_processes: int
    ) -> BatchStream:
        place = (process_index, num_processes)
        with called("instance_data_dir"):
            subject = super().make_batches(unet, text, *place)
        if not self.config.with_prior_preservation:
            return subject
        draw_class_images(self.config, self.accelerator, unet, self.objective.scheduler(), text)
        with called("class_data_dir"):
            return PairedBatches(subject, make_train_batches(self.config.class_data(), text, *place))

    def weigh(self, losses: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        losses = super().weigh(losses, sigma)
        if not self.config.with_prior_preservation:
            return losses
        return losses[0::2] + self.config.prior_loss_weight * losses[1::2]


class DreamBoothLoraTrainer(DreamBoothTrainer, LoraTrainer):
    """A run on a subject that trains an adapter."""


def make_trainer(config: DreamBoothTrainingConfig, unet: ConditionalUNet, text: TextSource | None = None) -> Trainer:
    """The run that the configuration means: of an adapter, or of all weights."""
    return (DreamBoothTrainer if config.rank is None else DreamBoothLoraTrainer)(config, unet, text)
