"""Configurations of fine-tuning, in addition to training: adapters, and DreamBooth's subject and class."""

from dataclasses import dataclass, fields
from typing import ClassVar

from ...utils.arguments import check_exactly_one
from ..config import TrainingConfig
from ..data import DataConfig
from ..data.data_config import arg
from ..settings import check_settings


TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
DREAMBOOTH_STEPS = 400
LEARNING_RATE, ADAPTER_LEARNING_RATE = 5e-6, 5e-4  # of DreamBooth
OF_THE_PRIOR = (
    *("class_data_dir", "class_prompt", "class_model", "prior_loss_weight", "num_class_images", "sample_batch_size"),
)
OF_ADAPTERS = ("lora_alpha", "lora_target_modules")


@dataclass
class LoraTrainingConfig(TrainingConfig):
    """Configuration of a run that trains an adapter of a stage."""

    rank: int = arg(4, "Rank of the adapter's updates.")
    lora_alpha: float | None = arg(None, "Updates are scaled by lora_alpha / rank; by default equal to the rank.")
    lora_target_modules: list[str] = arg(TARGET_MODULES, "Layers to adapt, by the ends of their names.")

    def __post_init__(self):
        super().__post_init__()
        check_adapter(self)

    def tags(self) -> list[str]:
        return ["lora"]


def check_adapter(config: "LoraTrainingConfig") -> None:
    """Check the settings of an adapter, and that there is a pretrained stage.

    Raises:
        ValueError: If not.
    """
    if config.pretrained_model_name_or_path is None or config.grow or config.layers_per_block:
        raise ValueError(
            "Fine-tuning requires a trained stage: set `pretrained_model_name_or_path`, without `grow` and "
            "`layers_per_block`."
        )
    if config.rank is None:  # DreamBooth can train whole networks too
        return
    if not config.lora_target_modules:
        raise ValueError("`lora_target_modules` is empty, but should name layers.")
    if config.use_ema and config.ema_type == "power":
        raise ValueError("`ema_type` is 'power', but only averages of whole networks can be reconstructed.")


@dataclass
class DreamBoothTrainingConfig(LoraTrainingConfig):
    """Configuration of a run that fine-tunes a stage on a subject."""

    default_steps: ClassVar[int] = DREAMBOOTH_STEPS

    instance_data_dir: str | None = arg(
        None, "Folder with the images of the subject; alternatively set `dataset_name`.", place="local"
    )
    instance_prompt: str | None = arg(None, 'Caption of these images, such as "a photo of sks dog".')
    with_prior_preservation: bool = arg(
        False, "Also train on images of the subject's class, as many as of the subject."
    )
    class_data_dir: str | None = arg(
        None, "Folder with the images of the class; missing images are generated.", place="local"
    )
    class_prompt: str | None = arg(None, 'Caption of the class images, such as "a photo of a dog".')
    class_model: str | None = arg(
        None,
        "Pipeline that generates class images, a folder or a Hub id; by default the stage before training.",
        place="local_or_hub",
    )
    num_class_images: int = arg(100, "Number of class images.")
    prior_loss_weight: float = arg(1.0, "Weight of the loss of the class images.")
    sample_batch_size: int = arg(4, "Number of class images generated at a time.")

    # wider types than in the base classes: None if whole networks are trained, or for the default rate
    rank: int | None = arg(None, "Train a LoRA adapter of this rank; by default all weights.")  # type: ignore[assignment]
    learning_rate: float | None = arg(  # type: ignore[assignment]
        None, f"Peak learning rate; by default {LEARNING_RATE}, and {ADAPTER_LEARNING_RATE} for an adapter."
    )
    max_train_steps: int = arg(
        None, f"Number of optimizer steps; by default {DREAMBOOTH_STEPS}, or those of num_train_epochs; not both."
    )
    lr_warmup_steps: int = arg(0, "Number of steps of linear warm-up.")
    train_batch_size: int = arg(4, "Images of the subject per device and micro-batch.")
    use_ema: bool = arg(False, "Average the weights over steps; the averaged weights are exported.")

    def __post_init__(self):
        self._set_defaults()
        check_settings(self)  # before they are assigned to others
        self._take_instances()
        super().__post_init__()
        self._check_prior()

    def tags(self) -> list[str]:
        return ["dreambooth", *(super().tags() if self.rank is not None else [])]

    def unused(self) -> dict[str, str]:
        unused = super().unused()
        if not self.with_prior_preservation:
            unused |= dict.fromkeys(OF_THE_PRIOR, "is only used with `with_prior_preservation`")
        if self.rank is None:
            unused |= dict.fromkeys(OF_ADAPTERS, "is only used with `rank`, which trains an adapter")
        return unused

    def _set_defaults(self) -> None:
        super()._set_defaults()
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE if self.rank is None else ADAPTER_LEARNING_RATE

    def _take_instances(self) -> None:
        """Set the data and its caption to the subject's images and prompt."""
        if self.train_data_dir not in (None, self.instance_data_dir):
            raise ValueError(
                f"`train_data_dir` is {self.train_data_dir!r}, but should be given as `instance_data_dir`."
            )
        check_exactly_one(instance_data_dir=self.instance_data_dir, dataset_name=self.dataset_name)
        if not self.instance_prompt:
            raise ValueError(
                f"`instance_prompt` is {self.instance_prompt!r}, but should name the subject, like 'a photo of sks "
                "dog'."
            )
        if self.caption not in (None, self.instance_prompt):
            raise ValueError(f"`caption` is {self.caption!r}, but should be given as `instance_prompt`.")
        self.train_data_dir, self.caption = self.instance_data_dir, self.instance_prompt

    def _check_prior(self) -> None:
        if not self.with_prior_preservation:
            return
        for name in ("class_data_dir", "class_prompt"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but is required by `with_prior_preservation`.")
        if self.aspect_ratio_buckets is not None:
            raise ValueError(
                "`aspect_ratio_buckets` is given, but the subject and its class share batches of square images."
            )

    def class_data(self) -> DataConfig:
        """Return the configuration of the class images as data, with the same sizes and batches."""
        same = {f.name: getattr(self, f.name) for f in fields(DataConfig)}
        other = {"train_data_dir": self.class_data_dir, "caption": self.class_prompt, "train_split": "train"}
        unset = ("dataset_name", "dataset_config_name", "styles", "balance_by", "weight_column", "max_train_samples")
        return DataConfig(**{**same, **other, **dict.fromkeys(unset), "streaming": False})
