"""Configuration of a training run. Field names are those of diffusers' training scripts where they exist."""

import importlib.util
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from huggingface_hub import get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..diffusion.kinds import BetaSchedule, NetworkPreconditioning, PredictionType
from ..utils.arguments import check_choice, check_exactly_one
from ..utils.bounds import MIN_AUGMENTATION_SIGMA
from ..utils.shipped import find_source
from .data.data_config import arg
from .validation.metric_settings import MetricSettings


POLYNOMIAL_END = 1e-7  # learning rate at the end of diffusers' polynomial schedule
# each accepts the name of the shipped cascade too
NETWORK_SOURCES = {"pretrained_model_name_or_path", "model_config_name_or_path", "text_encoder", "class_model"}
TRACKER_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of them is sufficient

STEPS, MAX_STEPS = 10_000, 10**9
OF_EPOCHS = {"num_train_epochs": "max_train_steps", "validation_epochs": "validation_steps"}


@dataclass
class TrainingConfig(MetricSettings):
    """Configuration of a run, which trains one stage."""

    default_steps: ClassVar[int] = STEPS

    output_dir: str = arg("imagen-stage", "Folder for checkpoints and the trained stage.", place="local")
    overwrite_output_dir: bool = arg(
        False, "Move the files of another run in output_dir to output_dir/set-aside-1, instead of raising an error."
    )
    pretrained_model_name_or_path: str | None = arg(
        None,
        "Stage to continue training from, or a cascade, from which the resolutions select the stage: a folder, a "
        "Hub id, or imagen-emoji, the shipped cascade.",
        place="local_or_hub",
    )
    revision: str | None = arg(
        None,
        "Branch, tag or commit of this repository on the Hub, and of text_encoder if it is the same repository.",
    )
    variant: str | None = arg(
        None, "Variant of its weight files, such as fp16, and of those of text_encoder if it is the same repository."
    )
    grow: bool = arg(False, "Add a level of twice the resolution around the pretrained network.")
    layers_per_block: list[int] | None = field(
        default=None, metadata={"help": "Change the number of blocks at each level of the pretrained ImagenUNetModel."}
    )
    preset: str | None = arg(None, "Name of a network in diffusers_imagen.models.presets, trained from scratch.")
    model_config_name_or_path: str | None = arg(
        None, "Folder or Hub id with the config.json of a network, trained from scratch.", place="local_or_hub"
    )
    text_encoder: str | None = arg(
        None,
        "Folder or Hub id with text_encoder/ and tokenizer/, or imagen-emoji; by default that of "
        "pretrained_model_name_or_path, if its network is conditioned on text and embedding_cache is not given.",
        place="local_or_hub",
    )

    preconditioning: NetworkPreconditioning = arg(
        "edm",
        "Preconditioning of the network: edm as in Karras et al. 2022, variance_preserving as in DDPM, in continuous "
        "time, or discrete as in DDPM, conditioned on the index of one of 1000 noise levels, as in DeepFloyd IF.",
    )
    sigma_data: float = arg(0.5, "Standard deviation of the images.")
    p_mean: float = arg(-1.2, "edm: mean of the logarithm of noise levels in training.")
    p_std: float = arg(1.2, "edm: standard deviation of the logarithm of noise levels in training.")
    prediction_type: PredictionType = arg(
        "epsilon", "variance_preserving: prediction of the network: noise, image or velocity."
    )
    beta_schedule: BetaSchedule = arg(
        "squaredcos_cap_v2",
        "variance_preserving: noise schedule with uniformly drawn times, squaredcos_cap_v2 or linear. discrete: "
        "beta schedule by diffusers' name, with uniformly drawn indices.",
    )
    loss: Literal["l2", "l1", "huber"] = arg("l2", "Distance between prediction and target.")
    loss_weighting: Literal["uniform", "min_snr", "uncertainty"] = arg(
        "uniform",
        "Weight of a noise level: uniform; min_snr of Hang et al. 2023 with variance_preserving or discrete; "
        "uncertainty, learned with the network (Karras et al. 2024, EDM2).",
    )
    snr_gamma: float | None = arg(None, "min_snr: gamma; 5 if not given.")
    stratified_noise: bool = arg(False, "Draw the noise levels of a step by stratified sampling.")
    text_drop_rate: float = arg(0.1, "Share of captions to drop, for classifier-free guidance.")
    noise_conditioning_augmentation: float = arg(
        0.5,
        "Highest noise level of the low-resolution image's augmentation; 0 for none. Leave out for networks "
        "conditioned on an index, such as DeepFloyd IF's, for which it is drawn uniformly among all 1000.",
    )

    # None until `_set_defaults`, to recognize that it is given together with num_train_epochs
    max_train_steps: int = arg(
        None, f"Number of optimizer steps; by default {STEPS}, or those of num_train_epochs; not both."
    )
    num_train_epochs: int | None = arg(None, "Instead of max_train_steps: number of passes over the images.")
    learning_rate: float = arg(4e-4, "Peak learning rate.")
    scale_lr: bool = arg(False, "Multiply the learning rate by the number of images per step.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = arg("constant_with_warmup", "Learning rate schedule of diffusers.optimization.")
    lr_warmup_steps: int = arg(500, "Number of steps of linear warm-up.")
    lr_num_cycles: int = arg(1, "Number of hard restarts of cosine_with_restarts.")
    adam_beta1: float = arg(0.9, "AdamW's first beta.")
    adam_beta2: float = arg(0.99, "AdamW's second beta.")
    adam_weight_decay: float = arg(1e-2, "AdamW's weight decay.")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon.")
    use_8bit_adam: bool = arg(False, "Keep AdamW's state in 8 bits, with bitsandbytes.")
    max_grad_norm: float = arg(1.0, "Maximum norm of gradients, which are clipped; 0 disables clipping.")

    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(
        None, "Precision of the network's arithmetic; by default that of `accelerate launch`, or none."
    )
    allow_tf32: bool = arg(False, "Multiply float32 matrices in TF32 on NVIDIA GPUs.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass, to reduce memory.")
    channels_last: bool = arg(True, "Use the channels-last memory format, which is faster for convolutions.")
    torch_compile: bool = arg(False, "Compile the network with torch.compile.")
    attention_backend: str | None = arg(
        None, "Attention backend of diffusers' dispatch, such as flash or _native_math; by default chosen by torch."
    )

    use_ema: bool = arg(True, "Average the weights over steps; the averaged weights are exported.")
    ema_type: Literal["warmup", "constant", "power"] = arg(
        "warmup",
        "warmup: the decay increases to ema_decay; constant: fixed decay; power: power functions of EDM2, with "
        "snapshots from which `diffusers-imagen reconstruct-ema` computes averages of other lengths.",
    )
    ema_decay: float = arg(0.999, "Decay of the averaged weights.")
    ema_stds: list[float] = arg(
        [0.05, 0.1], "power: widths of the averages as fractions of the run; the first is exported."
    )
    ema_snapshot_steps: int | None = arg(None, "power: steps between snapshots; by default checkpointing_steps.")

    checkpointing_steps: int = arg(500, "Steps between checkpoints, from which a run is resumed.")
    checkpoints_total_limit: int = arg(2, "Maximum number of checkpoints to keep.")
    resume_from_checkpoint: str | None = arg(
        None, "Checkpoint folder to resume from, or `latest`.", place="local_or_hub"
    )
    validation_steps: int | None = arg(
        None, "Steps between validation losses, metrics and sample grids; by default checkpointing_steps."
    )
    validation_epochs: int | None = arg(None, "Instead of validation_steps: passes over the images between them.")
    validation_prompts: list[str] | None = field(default=None, metadata={"help": "Prompts for samples."})
    num_validation_images: int = arg(1, "Number of samples per prompt.")
    validation_images: list[str] | None = arg(
        None, "For a super-resolution stage: the image to upscale for each prompt.", place="local"
    )
    report_to: Literal["tensorboard", "wandb"] | None = arg(None, "Tracker of the losses; it must be installed.")
    logging_dir: str = arg("logs", "Folder of the tracker's logs inside output_dir.", place="local")
    logging_steps: int = arg(10, "Steps between logs of the losses, each of which synchronizes the device.")
    push_to_hub: bool = arg(False, "Upload the trained stage.")
    hub_model_id: str | None = arg(None, "Repository to upload to; by default the name of output_dir.")
    license: str | None = arg(
        None,
        "License of the trained weights for the model card, by its Hub name, such as apache-2.0; by default that of "
        "the pretrained weights.",
    )
    hub_token: str | None = arg(None, "Token for the upload; by default that of `hf auth login`.")

    def __post_init__(self):
        self._set_defaults()
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
                    f"`layers_per_block` is {self.layers_per_block}, but there is no `pretrained_model_name_or_path` "
                    "to change: a new network has the number of its configuration."
                )
        self._check_source()
        self._check_epochs()
        self._check_objective()
        self._check_ema()
        self._check_validation()
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"`learning_rate` is {self.learning_rate}, but should be above {POLYNOMIAL_END}, at which "
                "`lr_scheduler` 'polynomial' ends."
            )
        self._check_tracker()
        self._check_hub()
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(f"`license` is {self.license!r}, but should be a name like 'apache-2.0' or 'cc0-1.0'.")

    def unused(self) -> dict[str, str]:
        unused = super().unused()
        for setting, of_values in settings_of_choices().items():
            chosen = getattr(self, setting)
            for name in (name for names in of_values.values() for name in names):
                if name not in of_values.get(chosen, ()):
                    unused.setdefault(name, f"is not used with `{setting}` {chosen!r}")
        return unused

    def tags(self) -> list[str]:
        """Return additional tags of the model card."""
        return []

    @property
    def names_text(self) -> bool:
        """Whether there is a source of text embeddings."""
        return bool(self.text_encoder) or self.embedding_cache is not None

    def hub_options(self, name: str) -> dict[str, str]:
        """Return `revision` and `variant` if they apply to this folder or repository."""
        is_source = name in (self.pretrained_model_name_or_path, self.model_config_name_or_path)
        given = {"revision": self.revision, "variant": self.variant} if is_source else {}
        return {option: value for option, value in given.items() if value is not None}

    def set_epoch(self, steps: int | None) -> None:
        """Convert numbers of epochs to numbers of steps, given the number of steps per epoch.

        Raises:
            ValueError: If this number is unknown, as for a stream, or the result is too large.
        """
        for name, of_steps in OF_EPOCHS.items():
            epochs = getattr(self, name)
            if epochs is None:
                continue
            if steps is None:
                raise ValueError(
                    f"`{name}` is {epochs}, but the number of images in a stream is unknown: set `{of_steps}`."
                )
            if epochs * steps > MAX_STEPS:
                raise ValueError(
                    f"`{name}` is {epochs}, which is {epochs * steps} steps, but should be at most {MAX_STEPS}."
                )
            setattr(self, of_steps, epochs * steps)
            setattr(self, name, None)

    def _set_defaults(self) -> None:
        """Set defaults that depend on other settings."""
        if self.max_train_steps is None:
            # with epochs, until `set_epoch`
            self.max_train_steps = self.default_steps if self.num_train_epochs is None else MAX_STEPS

    def _check_source(self) -> None:
        source = self.pretrained_model_name_or_path or self.model_config_name_or_path
        if self.revision is not None and (source is None or os.path.isdir(source)):
            raise ValueError(
                f"`revision` is {self.revision!r}, but should not be given: nothing is loaded from the Hub."
            )
        if self.variant is not None and self.pretrained_model_name_or_path is None:
            raise ValueError(f"`variant` is {self.variant!r}, but no weights are loaded.")

    def _check_epochs(self) -> None:
        for name, of_steps in OF_EPOCHS.items():
            value = getattr(self, of_steps)
            if getattr(self, name) is not None and value not in (None, MAX_STEPS):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} and `{of_steps}` {value}, but only one of them can be given."
                )

    def _check_objective(self) -> None:
        from ..diffusion.preconditioning import PRECONDITIONINGS
        from .objective.weightings import WEIGHTINGS

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
                f"`noise_conditioning_augmentation` is {self.noise_conditioning_augmentation}, but should be 0, for "
                f"none, or above {MIN_AUGMENTATION_SIGMA}."
            )

    def _check_ema(self) -> None:
        if not self.ema_stds:
            raise ValueError(f"`ema_stds` is {self.ema_stds}, but should be fractions of the run between 0 and 0.25.")
        if len({f"{std:.4f}" for std in self.ema_stds}) < len(self.ema_stds):  # names of snapshots
            raise ValueError(f"`ema_stds` is {self.ema_stds}, but should differ in their first four digits.")
        if self.ema_snapshot_steps is not None and not (self.use_ema and self.ema_type == "power"):
            raise ValueError(
                f"`ema_snapshot_steps` is {self.ema_snapshot_steps}, but only `ema_type` 'power' has snapshots."
            )

    def _check_validation(self) -> None:
        images, prompts = self.validation_images, self.validation_prompts
        if images is not None and self.low_resolution is None:
            raise ValueError("`validation_images` is given, but only super-resolution (`low_resolution`) uses it.")
        if self.low_resolution is not None and len(images or []) != len(prompts or []):
            raise ValueError(
                f"`validation_images` has {len(images or [])} entries, but should have one for each of the "
                f"{len(prompts or [])} `validation_prompts`."
            )

    def _check_tracker(self) -> None:
        modules = TRACKER_MODULES.get(self.report_to or "", ())
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(
                f"`report_to` is {self.report_to!r}, which is not installed: pip install {self.report_to}, or leave "
                "it out."
            )

    def _check_hub(self) -> None:
        """Check an upload as far as possible without requests to the Hub."""
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
            raise ValueError("`push_to_hub` is True, but there is no token: pass `hub_token`, or run `hf auth login`.")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError("`hub_token` has invalid characters: it should be complete and on one line.")


def settings_of_choices() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return, by setting and value, the settings that apply only to that value."""
    from .objective.weightings import WEIGHTINGS

    return {
        "preconditioning": {
            "edm": ("p_mean", "p_std"),
            "variance_preserving": ("prediction_type", "beta_schedule", "snr_gamma"),
            "discrete": ("beta_schedule", "snr_gamma"),
        },
        "loss_weighting": {name: weighting.settings for name, weighting in WEIGHTINGS.items()},
    }
