"""What a training run is told. Field names are those of diffusers' training scripts where they have one."""

from dataclasses import dataclass
from typing import Optional

from .data.config import DataConfig, arg


MIN_AUGMENTATION_SIGMA = 0.002  # NeMo's level at inference; the conditioning value of 0 would be infinite


@dataclass
class TrainingConfig(DataConfig):
    """Settings of one run, which trains one stage."""

    output_dir: str = arg("imagen-stage", "Where checkpoints and the trained stage are written.")
    pretrained_model_name_or_path: Optional[str] = arg(None, "Stage folder whose network is trained further.")
    grow: bool = arg(False, "Put a finer level around the pretrained network, for images of twice the side.")
    preset: Optional[str] = arg(None, "Name of a network in diffusers_imagen.presets, trained from scratch.")
    text_encoder: Optional[str] = arg(None, "Folder with text_encoder/ and tokenizer/; None trains without text.")

    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass, to save memory.")
    max_train_steps: int = arg(10_000, "Optimizer steps.")
    learning_rate: float = arg(4e-4, "Peak learning rate.")
    lr_scheduler: str = arg("constant_with_warmup", "A schedule of diffusers.optimization.")
    lr_warmup_steps: int = arg(500, "Steps of linear warm-up.")
    adam_beta1: float = arg(0.9, "AdamW's first beta.")
    adam_beta2: float = arg(0.99, "AdamW's second beta.")
    adam_weight_decay: float = arg(1e-2, "AdamW's weight decay.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this norm.")
    ema_decay: float = arg(0.999, "Decay of the averaged weights, which are what is exported.")
    mixed_precision: str = arg("no", "no, fp16 or bf16.")

    sigma_data: float = arg(0.5, "Standard deviation of the images.")
    p_mean: float = arg(-1.2, "Mean of the training noise levels' logarithm.")
    p_std: float = arg(1.2, "Standard deviation of the training noise levels' logarithm.")
    text_drop_rate: float = arg(0.1, "Rate of dropped captions, for classifier-free guidance.")
    max_augmentation_sigma: float = arg(0.5, "Largest noise level of the conditioning image's augmentation.")

    checkpointing_steps: int = arg(500, "Steps between checkpoints, from which a run is resumed.")
    checkpoints_total_limit: int = arg(2, "Checkpoints kept.")
    resume_from_checkpoint: Optional[str] = arg(None, "A checkpoint folder, or `latest`.")
    report_to: Optional[str] = arg(None, "tensorboard or wandb.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_train_steps", "checkpointing_steps", "checkpoints_total_limit"):
            self._check_at_least(name, 1)
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
