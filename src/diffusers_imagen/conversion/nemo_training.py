"""Translation of the training sections of NVIDIA NeMo's Imagen configurations to this package's `--config`.

Every entry of a file is translated, or reported as having no counterpart. Entries that would train something different
here raise an error.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from ..utils.arguments import bad_argument, shown
from .nemo_entries import ENTRIES, SECTIONS


PRECISIONS = {"bf16": "bf16", "bf16-mixed": "bf16", "16": "fp16", "16-mixed": "fp16", "32": "no", "32-true": "no"}
PREDICTIONS = {"noise": "epsilon", "x_start": "sample"}
NOISE_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
# all of them are AdamW; Apex's and Megatron's default to no weight decay
WEIGHT_DECAY = {"fused_adam": 0.0, "distributed_fused_adam": 0.0, "mcore_distributed_optim": 0.0, "adamw": 0.01}
SAME_NAME = {
    "trainer.max_steps": "max_train_steps",
    "trainer.gradient_clip_val": "max_grad_norm",
    "trainer.log_every_n_steps": "logging_steps",
    "exp_manager.exp_dir": "output_dir",
    "exp_manager.checkpoint_callback_params.every_n_train_steps": "checkpointing_steps",
    "allow_tf32": "allow_tf32",
    "model.seed": "seed",
    "model.inductor": "torch_compile",
    "model.unet.gradient_checkpointing": "gradient_checkpointing",
    "model.conditioning.token_length": "tokenizer_max_length",
    "model.conditioning.drop_rate": "text_drop_rate",
    "model.data.num_workers": "dataloader_num_workers",
    "model.data.train.augmentations.horizontal_flip": "random_flip",
}


class Translation(NamedTuple):
    """Result of translating a configuration."""

    settings: dict[str, Any]  # by name of `TrainingConfig`
    differences: list[str]  # descriptions of differences
    left_out: list[str]  # entries that have no counterpart


class Entries:
    """Entries of a configuration by dotted name; records which of them were read."""

    def __init__(self, config: dict[str, Any]):
        self.values = dict(flatten(config))
        self.seen: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, checked against `ENTRIES`; the default if it is missing or null."""
        self.seen.add(name)
        value = self.resolve(self.values.get(name))
        return default if value is None else ENTRIES[name].read(name, value)

    def resolve(self, value: Any) -> Any:
        """Resolve references such as `${trainer.precision}`."""
        for _ in range(8):
            reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
            if reference is None:
                return value
            value = self.values.get(reference[1])
        raise ValueError(f"{value!r} refers to itself.")

    def require(self, name: str) -> Any:
        """Return a required value."""
        value = self.get(name)
        if value is None:
            raise ValueError(f"The configuration lacks `{name}`.")
        return value

    def refuse(self, name: str, reason: str) -> NoReturn:
        raise ValueError(f"`{name}` is {shown(self.resolve(self.values.get(name)))}, {reason}")


def flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield entries by dotted name; lists are not flattened."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if name in ENTRIES:
                raise ValueError(f"`{name}` is a section, but should be {ENTRIES[name].describe()}.")
            yield from flatten(value, f"{name}.")
            continue
        if name in SECTIONS and value is not None:
            raise bad_argument(name, value, "a section")
        yield name, value


def translate_training(config: dict[str, Any]) -> Translation:
    """Translate NeMo's whole configuration, with `trainer:`, `exp_manager:` and `model:`, to training settings.

    The network in `model.unet` is not included: see `unet_from_nemo_config`.

    Raises:
        ValueError: If an entry is missing, malformed, or would train something different here.
    """
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError("The configuration has no section `model`, which NeMo's have.")
    nemo = Entries(config)
    nemo.require("trainer.max_steps")
    settings, differences = {}, []
    for name, ours in SAME_NAME.items():
        value = nemo.get(name)
        if value is not None:
            settings[ours] = value
    settings.setdefault("max_grad_norm", 0.0)  # Lightning's default is no clipping
    settings["channels_last"] = nemo.get("model.channels_last", False)
    if settings.get("random_flip"):
        differences.append("random_flip: images whose caption mentions left or right are not mirrored here")
    settings |= objective(nemo) | optimizer(nemo) | learning_rates(nemo, settings["max_train_steps"])
    settings |= precision(nemo) | batch_sizes(nemo) | averages(nemo) | trackers(nemo)
    if settings["preconditioning"] == "edm" and settings["loss"] != "l2":
        nemo.refuse(
            "model.preconditioning.loss_type",
            "whose EDM weight NeMo applies inside the distance, and this package outside: train l2.",
        )
    settings |= data(nemo, differences)
    left_out = [name for name in nemo.values if name not in nemo.seen and not name.startswith("model.unet.")]
    return Translation(settings, differences, left_out)


def objective(nemo: Entries) -> dict[str, Any]:
    """Return the settings of the training objective."""
    section = "model.preconditioning"
    kind = nemo.get(f"{section}_type", "DDPM")
    loss = nemo.get(f"{section}.loss_type", "l2")
    if kind not in ("EDM", "DDPM"):
        nemo.refuse(f"{section}_type", "but should be EDM or DDPM.")
    if loss not in ("l1", "l2", "huber"):
        nemo.refuse(f"{section}.loss_type", "but should be l1, l2 or huber.")
    if kind == "EDM":
        defaults = {"sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2}
        numbers = {name: nemo.get(f"{section}.{name}", default) for name, default in defaults.items()}
        return {"preconditioning": "edm", "loss": loss, **numbers}
    choices = {
        "prediction_type": ("pred_objective", PREDICTIONS, "noise"),
        "beta_schedule": ("noise_schedule", NOISE_SCHEDULES, "cosine"),
    }
    chosen = {}
    for ours, (name, table, default) in choices.items():
        value = nemo.get(f"{section}.{name}", default)
        if value not in table:
            nemo.refuse(f"{section}.{name}", f"but should be one of {list(table)}.")
        chosen[ours] = table[value]
    return {"preconditioning": "variance_preserving", "loss": loss, **chosen}


def optimizer(nemo: Entries) -> dict[str, Any]:
    """Return the settings of AdamW."""
    name = nemo.require("model.optim.name")
    if name not in WEIGHT_DECAY:
        nemo.refuse("model.optim.name", f"but training has AdamW only, which NeMo calls {list(WEIGHT_DECAY)}.")
    betas = nemo.get("model.optim.betas", [0.9, 0.999])
    if len(betas) != 2:
        nemo.refuse("model.optim.betas", "but should be two numbers.")
    return {
        "learning_rate": nemo.require("model.optim.lr"),
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "adam_weight_decay": nemo.get("model.optim.weight_decay", WEIGHT_DECAY[name]),
        "adam_epsilon": nemo.get("model.optim.eps", 1e-8),
    }


def learning_rates(nemo: Entries, max_steps: int) -> dict[str, Any]:
    """Return the settings of the learning rate schedule."""
    section = "model.optim.sched"
    name = nemo.get(f"{section}.name")
    warmup = nemo.get(f"{section}.warmup_steps")
    ratio = nemo.get(f"{section}.warmup_ratio")
    min_lr = nemo.get(f"{section}.min_lr", 0.0)
    if warmup is not None and ratio is not None:
        nemo.refuse(f"{section}.warmup_ratio", "but `warmup_steps` is given too.")
    steps = warmup if ratio is None else int(ratio * max_steps)
    if name is None:
        return {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    if name == "WarmupPolicy":
        return {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": steps or 0}
    if name != "CosineAnnealing":
        nemo.refuse(f"{section}.name", "but should be WarmupPolicy or CosineAnnealing.")
    if min_lr:
        nemo.refuse(f"{section}.min_lr", "but the cosine of training ends at 0.")
    if nemo.get(f"{section}.constant_steps"):
        nemo.refuse(f"{section}.constant_steps", "but the cosine of training ends with the run.")
    return {"lr_scheduler": "cosine", "lr_warmup_steps": steps or 0}


def precision(nemo: Entries) -> dict[str, Any]:
    """Return the precision of the network's arithmetic."""
    nemo.get("model.precision")  # refers to the trainer's
    value = nemo.get("trainer.precision", "32")
    if value not in PRECISIONS:
        nemo.refuse("trainer.precision", f"but should be one of {list(PRECISIONS)}.")
    return {"mixed_precision": PRECISIONS[value]}


def batch_sizes(nemo: Entries) -> dict[str, Any]:
    """Return the batch size per device and gradient accumulation steps, for the number of devices in the configuration."""
    micro, whole = (nemo.require(f"model.{name}_batch_size") for name in ("micro", "global"))
    devices = nemo.get("trainer.devices", 1)
    count = len(devices) if isinstance(devices, list) else devices
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 2**20:
        nemo.refuse("trainer.devices", "but should be their number: batches are counted by it.")
    processes = count * nemo.get("trainer.num_nodes", 1)
    if nemo.get("trainer.accumulate_grad_batches", 1) != 1:
        nemo.refuse("trainer.accumulate_grad_batches", "but should be 1, as NeMo requires.")
    if micro < 1 or whole < 1 or whole % (micro * processes):
        nemo.refuse("model.global_batch_size", f"but should be a multiple of {micro} images on {processes} devices.")
    return {"train_batch_size": micro, "gradient_accumulation_steps": whole // (micro * processes)}


def averages(nemo: Entries) -> dict[str, Any]:
    """Return the settings of the weights' average (EMA)."""
    section = "exp_manager.ema"
    decay = nemo.get(f"{section}.decay", 0.9999)
    interval = nemo.get(f"{section}.every_n_steps", 1)
    if not nemo.get(f"{section}.enable", False):
        return {"use_ema": False}
    if interval != 1:
        nemo.refuse(f"{section}.every_n_steps", f"but should be 1: with it, take `decay` {decay ** (1 / interval):g}.")
    return {"use_ema": True, "ema_type": "constant", "ema_decay": decay}


def trackers(nemo: Entries) -> dict[str, Any]:
    """Return the settings of experiment trackers."""
    if nemo.get("exp_manager.create_wandb_logger", False):
        return {"report_to": "wandb"}
    return {"report_to": "tensorboard"} if nemo.get("exp_manager.create_tensorboard_logger", False) else {}


def data(nemo: Entries, differences: list[str]) -> dict[str, Any]:
    """Return image sizes and augmentation of the conditioning image; append to `differences`."""
    section = "model.data.train"
    if nemo.get("model.data.synthetic_data", False):
        nemo.refuse("model.data.synthetic_data", "but training needs images.")
    settings = {"resolution": nemo.require(f"{section}.augmentations.resize_smallest_side")}
    crop = crop_resolution(nemo, f"{section}.augmentations.center_crop_h_w", settings["resolution"])
    if nemo.get(f"{section}.filterings.resolution.method") == "larger":
        settings["min_resolution"] = nemo.require(f"{section}.filterings.resolution.value")
    elif f"{section}.filterings.resolution.method" in nemo.values:
        nemo.refuse(f"{section}.filterings.resolution.method", "but only smaller images can be left out: 'larger'.")

    unet_type = nemo.require("model.unet_type")
    if unet_type not in ("base", "sr", "sr-unet"):
        nemo.refuse("model.unet_type", "but should be 'base', 'sr' or 'sr-unet'.")
    if unet_type == "base":
        if crop != settings["resolution"]:
            nemo.refuse(f"{section}.augmentations.center_crop_h_w", "but a base stage trains on whole images.")
        return settings
    return settings | super_resolution(nemo, settings["resolution"], crop, differences)


def super_resolution(nemo: Entries, resolution: int, crop: int, differences: list[str]) -> dict[str, Any]:
    """Return the settings of the conditioning image; append to `differences`."""
    name = "model.data.train.target_resolutions"
    older = "model.data.train.corruption_aug.target_resolution"
    if name not in nemo.values and older in nemo.values:
        name = older
    targets = nemo.require(name)
    if len(targets) != 2 or targets[1] != crop or crop % targets[0]:
        nemo.refuse(name, f"but should be a resolution that divides {crop}, and {crop}.")
    factor = crop // targets[0]
    settings = {"low_resolution": resolution // factor}
    if crop != resolution:
        settings["crop_size"] = crop
        differences.append("crop_size: crops are random here, and centered in NeMo")
    if not nemo.get("model.noise_cond_aug", False):
        return {**settings, "noise_conditioning_augmentation": 0.0}
    if nemo.get("model.preconditioning_type", "DDPM") != "EDM":
        nemo.refuse("model.noise_cond_aug", "but NeMo has it for EDM only.")
    differences.append(
        "noise_conditioning_augmentation: noise levels of the conditioning image are uniform up to it here, in NeMo log-normal as "
        "those of the image are"
    )
    return {**settings, "noise_conditioning_augmentation": 0.5}


def crop_resolution(nemo: Entries, name: str, resolution: int) -> int:
    """Return the resolution of the crop; NeMo has height and width as text."""
    value = nemo.get(name)
    if value is None:
        return resolution
    text = value if isinstance(value, str) else shown(value)
    size = re.fullmatch(r"[\[(]?\s*(\d{1,6})\s*(?:,\s*(\d{1,6})\s*)?[\])]?", text.strip())
    if size is None or size[2] not in (None, size[1]) or not 1 <= int(size[1]) <= resolution:
        nemo.refuse(name, f"but should be a square of up to {resolution}.")
    return int(size[1])


def to_be_given(settings: dict[str, Any], network: str | None = None) -> list[str]:
    """Return the arguments that a run needs in addition to the settings."""
    needed = ["train_data_dir or dataset_name", "text_encoder or embedding_cache"]
    return needed + ["pretrained_model_name_or_path, preset or model_config_name_or_path"] * (network is None)
