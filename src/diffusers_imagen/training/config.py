"""What a training run is told. Field names are those of diffusers' training scripts where they have one."""

from dataclasses import dataclass, field
from typing import Optional


MIN_AUGMENTATION_SIGMA = 0.002  # NeMo's level at inference; the conditioning value of 0 would be infinite


def _arg(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """Settings of one run, which trains one stage."""

    train_data_dir: str = _arg("", "Folder in the imagefolder layout of datasets, with a metadata.jsonl.")
    output_dir: str = _arg("imagen-stage", "Where checkpoints and the trained stage are written.")
    pretrained_model_name_or_path: Optional[str] = _arg(None, "Stage folder whose network is trained further.")
    grow: bool = _arg(False, "Put a finer level around the pretrained network, for images of twice the side.")
    preset: Optional[str] = _arg(None, "Name of a network in diffusers_imagen.presets, trained from scratch.")
    text_encoder: Optional[str] = _arg(None, "Folder with text_encoder/ and tokenizer/; None trains without text.")

    caption_column: list[str] = _arg(["text"], "Columns with captions; several are drawn from by turns.")
    caption_probabilities: Optional[list[float]] = field(
        default=None, metadata={"help": "Probability of each caption column; equal if not given."}
    )
    train_split: str = _arg("train", "Value of the `split` column to train on.")
    validation_split: Optional[str] = _arg(None, "Value of the `split` column to measure the validation loss on.")
    styles: Optional[list[str]] = field(default=None, metadata={"help": "Keep rows of these `style` values only."})
    balance_by: Optional[list[str]] = field(
        default=None, metadata={"help": "Draw each combination of values in these columns equally often."}
    )

    resolution: int = _arg(64, "Side of the images, in pixels.")
    low_resolution: Optional[int] = _arg(None, "Side of the conditioning image of a super-resolution stage.")
    crop_size: Optional[int] = _arg(None, "Side of the aligned random crops that super-resolution trains on.")

    train_batch_size: int = _arg(16, "Images a device and a step.")
    gradient_accumulation_steps: int = _arg(1, "Batches before an optimizer step.")
    gradient_checkpointing: bool = _arg(False, "Recompute activations in the backward pass, to save memory.")
    max_train_steps: int = _arg(10_000, "Optimizer steps.")
    learning_rate: float = _arg(4e-4, "Peak learning rate.")
    lr_scheduler: str = _arg("constant_with_warmup", "A schedule of diffusers.optimization.")
    lr_warmup_steps: int = _arg(500, "Steps of linear warm-up.")
    adam_beta1: float = _arg(0.9, "AdamW's first beta.")
    adam_beta2: float = _arg(0.99, "AdamW's second beta.")
    adam_weight_decay: float = _arg(1e-2, "AdamW's weight decay.")
    adam_epsilon: float = _arg(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _arg(1.0, "Gradients are clipped to this norm.")
    ema_decay: float = _arg(0.999, "Decay of the averaged weights, which are what is exported.")
    mixed_precision: str = _arg("no", "no, fp16 or bf16.")
    seed: int = _arg(0, "Seed of all draws.")

    sigma_data: float = _arg(0.5, "Standard deviation of the images.")
    p_mean: float = _arg(-1.2, "Mean of the training noise levels' logarithm.")
    p_std: float = _arg(1.2, "Standard deviation of the training noise levels' logarithm.")
    text_drop_rate: float = _arg(0.1, "Rate of dropped captions, for classifier-free guidance.")
    max_augmentation_sigma: float = _arg(0.5, "Largest noise level of the conditioning image's augmentation.")

    checkpointing_steps: int = _arg(500, "Steps between checkpoints, from which a run is resumed.")
    checkpoints_total_limit: int = _arg(2, "Checkpoints kept.")
    resume_from_checkpoint: Optional[str] = _arg(None, "A checkpoint folder, or `latest`.")
    report_to: Optional[str] = _arg(None, "tensorboard or wandb.")

    def __post_init__(self):
        for name in (
            "resolution",
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but should be at least 1.")
        if (self.preset is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError("Exactly one of `preset` and `pretrained_model_name_or_path` must be given.")
        if self.grow and self.pretrained_model_name_or_path is None:
            raise ValueError("`grow` is True, but there is no `pretrained_model_name_or_path` to grow.")
        if not 0 <= self.text_drop_rate <= 1:
            raise ValueError(f"`text_drop_rate` is {self.text_drop_rate}, but should be between 0 and 1.")
        if not (self.max_augmentation_sigma == 0 or self.max_augmentation_sigma > MIN_AUGMENTATION_SIGMA):
            raise ValueError(
                f"`max_augmentation_sigma` is {self.max_augmentation_sigma}, but should be 0, for none, or above "
                f"{MIN_AUGMENTATION_SIGMA}."
            )
        if self.crop_size is not None and self.low_resolution is None:
            raise ValueError(f"`crop_size` is {self.crop_size}, but only super-resolution (`low_resolution`) crops.")
        if self.low_resolution is not None:
            self._check_pyramid()
        if self.caption_probabilities is not None and len(self.caption_probabilities) != len(self.caption_column):
            raise ValueError(
                f"`caption_probabilities` has {len(self.caption_probabilities)} entries, "
                f"but `caption_column` has {len(self.caption_column)}."
            )

    def _check_pyramid(self):
        if self.low_resolution < 1 or self.resolution % self.low_resolution:
            raise ValueError(f"`low_resolution` is {self.low_resolution}, but should divide {self.resolution}.")
        factor = self.resolution // self.low_resolution
        if self.crop_size is not None and (self.crop_size % factor or not 0 < self.crop_size <= self.resolution):
            raise ValueError(
                f"`crop_size` is {self.crop_size}, but should be a multiple of {factor} up to {self.resolution}."
            )
