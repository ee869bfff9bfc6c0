"""What a training run is told. Field names are those of diffusers' training scripts where they have one."""

import importlib.util
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal

from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..diffusion.kinds import BetaSchedule, NetworkPreconditioning, PredictionType
from ..utils.arguments import check_choice, check_exactly_one
from ..utils.bounds import MIN_AUGMENTATION_SIGMA
from ..utils.shipped import find_source
from .data.data_config import arg
from .validation.metric_settings import MetricSettings


POLYNOMIAL_END = 1e-7  # learning rate at the end of diffusers' polynomial schedule
# each may be the name of the shipped cascade too
NETWORK_SOURCES = {"pretrained_model_name_or_path", "model_config_name_or_path", "text_encoder", "class_model"}
TRACKER_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of them serves


@dataclass
class TrainingConfig(MetricSettings):
    """Settings of one run, which trains one stage."""

    output_dir: str = arg("imagen-stage", "Where checkpoints and the trained stage are written.", place="local")
    overwrite_output_dir: bool = arg(
        False, "Set aside what another run left in output_dir, in output_dir/set-aside-1, instead of refusing it."
    )
    pretrained_model_name_or_path: str | None = arg(
        None,
        "Stage whose weights are trained further, or a cascade, of which the resolutions name the stage: a folder, a "
        "Hub id, or imagen-emoji, the shipped cascade.",
        place="local_or_hub",
    )
    grow: bool = arg(False, "Put a finer level around the pretrained network, for images of twice the resolution.")
    layers_per_block: list[int] | None = field(
        default=None, metadata={"help": "Give the pretrained ImagenUNetModel so many blocks at each level."}
    )
    preset: str | None = arg(None, "Name of a network in diffusers_imagen.models.presets, trained from scratch.")
    model_config_name_or_path: str | None = arg(
        None, "Network, by its config.json in a folder or on the Hub, trained from scratch.", place="local_or_hub"
    )
    text_encoder: str | None = arg(
        None,
        "Folder or Hub id with text_encoder/ and tokenizer/, or imagen-emoji; None trains without text.",
        place="local_or_hub",
    )

    preconditioning: NetworkPreconditioning = arg(
        "edm",
        "How the network is trained: edm of Karras et al. 2022, variance_preserving as DDPM, in continuous time, or "
        "discrete as DDPM, of whose 1000 noise levels it is told the index, as DeepFloyd IF's networks are.",
    )
    sigma_data: float = arg(0.5, "Standard deviation of the images.")
    p_mean: float = arg(-1.2, "edm: mean of the training noise levels' logarithm.")
    p_std: float = arg(1.2, "edm: standard deviation of the training noise levels' logarithm.")
    prediction_type: PredictionType = arg(
        "epsilon", "variance_preserving: what the network predicts: noise, image or velocity."
    )
    beta_schedule: BetaSchedule = arg(
        "squaredcos_cap_v2",
        "variance_preserving: noise schedule, whose times are drawn uniformly, squaredcos_cap_v2 or linear. discrete: "
        "betas by diffusers' name, whose indices are drawn uniformly.",
    )
    loss: Literal["l2", "l1", "huber"] = arg("l2", "Distance of prediction and target.")
    loss_weighting: Literal["uniform", "min_snr", "uncertainty"] = arg(
        "uniform",
        "What a noise level counts: all alike; min_snr of Hang et al. 2023 with variance_preserving or discrete; "
        "uncertainty learns it along with the network (Karras et al. 2024, EDM2).",
    )
    snr_gamma: float | None = arg(None, "min_snr: gamma; 5 if not given.")
    stratified_noise: bool = arg(False, "Spread the noise levels of a step evenly over their distribution.")
    text_drop_rate: float = arg(0.1, "Rate of dropped captions, for classifier-free guidance.")
    noise_conditioning_augmentation: float = arg(
        0.5,
        "Largest noise level of the conditioning image's augmentation; 0 for none. To be left out for networks that are "
        "told an index, as DeepFloyd IF's are: theirs is drawn uniformly among all 1000.",
    )

    max_train_steps: int = arg(10_000, "Optimizer steps.")
    learning_rate: float = arg(4e-4, "Peak learning rate.")
    scale_lr: bool = arg(False, "Multiply the learning rate by the images of a step.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = arg("constant_with_warmup", "A schedule of diffusers.optimization.")
    lr_warmup_steps: int = arg(500, "Steps of linear warm-up.")
    lr_num_cycles: int = arg(1, "Hard restarts of cosine_with_restarts.")
    adam_beta1: float = arg(0.9, "AdamW's first beta.")
    adam_beta2: float = arg(0.99, "AdamW's second beta.")
    adam_weight_decay: float = arg(1e-2, "AdamW's weight decay.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    use_8bit_adam: bool = arg(False, "Keep AdamW's state in 8 bits, with bitsandbytes.")
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this norm; 0 does not clip.")

    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(
        None, "Precision of the network's arithmetic; without it, that of `accelerate launch`, or none."
    )
    allow_tf32: bool = arg(False, "Multiply float32 matrices in TF32 on NVIDIA GPUs.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass, to save memory.")
    channels_last: bool = arg(True, "Keep images as (height, width, channels) in memory, as convolutions like it.")
    torch_compile: bool = arg(False, "Compile the network with torch.compile.")
    attention_backend: str | None = arg(
        None, "Attention of diffusers' dispatch, such as flash or _native_math; without it, torch's own choice."
    )

    use_ema: bool = arg(True, "Average the weights over steps; the average is what is exported.")
    ema_type: Literal["warmup", "constant", "power"] = arg(
        "warmup",
        "warmup: the decay rises to ema_decay; constant: it does not; power: power functions of EDM2, snapshots of "
        "which `diffusers-imagen reconstruct-ema` turns into averages of other lengths.",
    )
    ema_decay: float = arg(0.999, "Decay of the averaged weights.")
    ema_stds: list[float] = arg([0.05, 0.1], "power: widths of the averages as shares of the run; the first exports.")
    ema_snapshot_steps: int | None = arg(None, "power: steps between snapshots; without it, checkpointing_steps.")

    checkpointing_steps: int = arg(500, "Steps between checkpoints, from which a run is resumed.")
    checkpoints_total_limit: int = arg(2, "Checkpoints kept.")
    resume_from_checkpoint: str | None = arg(None, "A checkpoint folder, or `latest`.", place="local_or_hub")
    validation_steps: int | None = arg(
        None, "Steps between validation losses, metrics and sample grids; without it, checkpointing_steps."
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts that samples are drawn for."}
    )
    validation_images: list[str] | None = arg(
        None, "For a super-resolution stage: the image of each prompt, to be enlarged.", place="local"
    )
    report_to: Literal["tensorboard", "wandb"] | None = arg(None, "Where the losses are shown; it must be installed.")
    logging_dir: str = arg("logs", "Folder of those logs inside output_dir.", place="local")
    logging_steps: int = arg(10, "Steps between looks at the losses, each of which waits for the device.")
    push_to_hub: bool = arg(False, "Upload the trained stage.")
    hub_model_id: str | None = arg(None, "Repository to upload to; without it, the name of output_dir.")
    hub_token: str | None = arg(None, "Token to upload with; without it, that of `hf auth login`.")

    def __post_init__(self):
        super().__post_init__()
        for name in NETWORK_SOURCES & {f.name for f in fields(self)}:
            if getattr(self, name) is not None:
                setattr(self, name, find_source(getattr(self, name)))
        names = ("preset", "model_config_name_or_path", "pretrained_model_name_or_path")
        check_exactly_one(**{name: getattr(self, name) for name in names})
        if self.pretrained_model_name_or_path is None:
            if self.grow:
                raise ValueError("`grow` is True, but there is no `pretrained_model_name_or_path` to grow.")
            if self.layers_per_block:
                raise ValueError(
                    f"`layers_per_block` is {self.layers_per_block}, but there is no `pretrained_model_name_or_path` to "
                    "change: a fresh network has those of its configuration."
                )
        self._check_objective()
        self._check_ema()
        self._check_validation()
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"`learning_rate` is {self.learning_rate}, but `lr_scheduler` 'polynomial' ends at {POLYNOMIAL_END}: it "
                "should be above that."
            )
        self._check_tracker()
        self._check_hub()

    def tags(self) -> list[str]:
        """What a model card adds to the tags of all stages."""
        return []

    def _check_objective(self) -> None:
        from ..diffusion.preconditioning import PRECONDITIONINGS
        from .objective.weightings import WEIGHTINGS

        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TrainingConfig)
        }
        for setting, of_values in settings_of_choices().items():
            chosen = getattr(self, setting)
            for name in (name for names in of_values.values() for name in names):
                if name not in of_values.get(chosen, ()) and getattr(self, name) != defaults[name]:
                    raise ValueError(f"`{name}` is {getattr(self, name)!r}, but `{setting}` {chosen!r} has none.")
        kind, when = PRECONDITIONINGS[self.preconditioning], f" with `preconditioning` {self.preconditioning!r}"
        check_choice("beta_schedule", self.beta_schedule, kind.beta_schedules, when)
        if self.preconditioning not in WEIGHTINGS[self.loss_weighting].preconditionings:
            raise ValueError(
                f"`loss_weighting` is {self.loss_weighting!r}, but should be another with `preconditioning` "
                f"{self.preconditioning!r}."
            )
        if not (
            self.noise_conditioning_augmentation == 0 or self.noise_conditioning_augmentation > MIN_AUGMENTATION_SIGMA
        ):
            raise ValueError(
                f"`noise_conditioning_augmentation` is {self.noise_conditioning_augmentation}, but should be 0, for none, or above "
                f"{MIN_AUGMENTATION_SIGMA}."
            )

    def _check_ema(self) -> None:
        if not self.ema_stds:
            raise ValueError(f"`ema_stds` is {self.ema_stds}, but should be shares of the run between 0 and 0.25.")
        if len({f"{std:.4f}" for std in self.ema_stds}) < len(self.ema_stds):  # names of snapshots
            raise ValueError(f"`ema_stds` is {self.ema_stds}, but should differ in their first four digits.")
        if self.ema_snapshot_steps is not None and not (self.use_ema and self.ema_type == "power"):
            raise ValueError(
                f"`ema_snapshot_steps` is {self.ema_snapshot_steps}, but only `ema_type` 'power' has snapshots."
            )

    def _check_validation(self) -> None:
        images, prompts = self.validation_images, self.validation_prompts
        if images is not None and self.low_resolution is None:
            raise ValueError("`validation_images` is given, but only super-resolution (`low_resolution`) enlarges.")
        if self.low_resolution is not None and len(images or []) != len(prompts or []):
            raise ValueError(
                f"`validation_images` has {len(images or [])} entries, but should have one for each of the "
                f"{len(prompts or [])} `validation_prompts`."
            )

    def _check_tracker(self) -> None:
        modules = TRACKER_MODULES.get(self.report_to or "", ())
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(
                f"`report_to` is {self.report_to!r}, which is not installed: pip install {self.report_to}, or leave it out."
            )

    def _check_hub(self) -> None:
        """Checks what can be known of an upload without asking the Hub."""
        if not self.push_to_hub:
            if self.hub_model_id or self.hub_token:
                raise ValueError("`hub_model_id` or `hub_token` is given, but `push_to_hub` is False.")
            return
        name = Path(self.output_dir).name if self.hub_model_id is None else self.hub_model_id
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"`hub_model_id` is {self.hub_model_id!r}, and {name!r} cannot be the name of a repository: {error}"
            ) from error
        token = get_token() if self.hub_token is None else self.hub_token
        if not token:
            raise ValueError("`push_to_hub` is True, but there is no token: give `hub_token`, or `hf auth login`.")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError("`hub_token` has characters that no token has: is it whole, in one line?")


def settings_of_choices() -> dict[str, dict[str, tuple[str, ...]]]:
    """By setting and value, the settings that have a meaning for that one value only."""
    from .objective.weightings import WEIGHTINGS

    return {
        "preconditioning": {
            "edm": ("p_mean", "p_std"),
            "variance_preserving": ("prediction_type", "beta_schedule", "snr_gamma"),
            "discrete": ("beta_schedule", "snr_gamma"),
        },
        "loss_weighting": {name: weighting.settings for name, weighting in WEIGHTINGS.items()},
    }
