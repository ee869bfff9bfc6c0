"""Identity of a run: settings and data that must match between a checkpoint and the run that resumes from it.

Every setting belongs to one of the classes below, as checked by `tests/training/test_run_identity.py`; settings in
none of them must match.
"""

import json
from dataclasses import fields
from typing import Any

from ..models.interface import StageNetwork
from ..text.identity import identity_mismatch
from .config import TrainingConfig


# random numbers, data, loss, and settings that the state in a checkpoint depends on: must match
ANOTHER_RUN = (
    *(
        "seed",
        "streaming",
        "shuffle_buffer_size",
        "image_column",
        "caption_column",
        "caption_probabilities",
        "caption",
    ),
    *("train_split", "split_column", "styles", "balance_by", "weight_column", "max_train_samples"),
    *(
        "resolution",
        "center_crop",
        "image_interpolation_mode",
        "random_flip",
        "background",
        "min_resolution",
        "aspect_ratio_buckets",
    ),
    *(
        "bucket_step",
        "low_resolution",
        "low_resolution_column",
        "crop_size",
        "degradation_blur_sigma",
        "degradation_jpeg_quality",
    ),
    *("tokenizer_max_length", "preconditioning", "sigma_data", "p_mean", "p_std", "prediction_type", "beta_schedule"),
    *("loss", "loss_weighting", "snr_gamma", "stratified_noise", "text_drop_rate"),
    *("noise_conditioning_augmentation", "use_ema", "ema_type", "ema_stds", "use_8bit_adam"),
    *("rank", "lora_alpha", "lora_target_modules"),
    *("with_prior_preservation", "instance_prompt", "class_prompt", "prior_loss_weight"),
)
# compared by content, independent of the location
BY_CONTENT = (
    *("train_data_dir", "dataset_name", "dataset_config_name", "instance_data_dir", "class_data_dir"),
    *("text_encoder", "embedding_cache"),
)
# compared as the number of images per step, independent of processes and batches
IN_A_STEP = ("train_batch_size", "gradient_accumulation_steps")
# their results are in the checkpoint
AT_THE_START = (
    *(
        "pretrained_model_name_or_path",
        "revision",
        "variant",
        "grow",
        "layers_per_block",
        "preset",
        "model_config_name_or_path",
    ),
    *("class_model", "num_class_images", "sample_batch_size"),
)
# may change, and changes are logged
CHANGEABLE = (
    *(
        "max_train_steps",
        "num_train_epochs",
        "validation_epochs",
        "learning_rate",
        "scale_lr",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_num_cycles",
    ),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision"),
    *("allow_tf32", "gradient_checkpointing", "channels_last", "torch_compile", "attention_backend", "ema_decay"),
    *("ema_snapshot_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "validation_split"),
    *("validation_metrics", "validation_features", "validation_clip_model", "validation_num_images"),
    *("validation_num_reference", "validation_num_inference_steps", "validation_guidance_scale"),
    *("report_to", "logging_steps", "in_memory", "dataloader_num_workers", *IN_A_STEP),
)
# locations, displayed results, and how the run is started
NOT_COMPARED = (
    *("output_dir", "cache_dir", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir"),
    *(
        "validation_prompts",
        "validation_images",
        "num_validation_images",
        "validation_batch_size",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "license",
    ),
)

IMAGES_IN_A_STEP = "`train_batch_size` x `gradient_accumulation_steps` x processes ="
TEXT_ENCODER = "the text encoder"

# Options that networks and data did not have in earlier versions, with the values that their checkpoints imply.
LATER_OPTIONS = {
    "image_interpolation_mode": "bicubic",
    "unet act_fn": "silu",
    "unet resnet_out_scale_factor": 1.0,
    "unet shared_attention_norm": False,
    "unet mid_block_add_attention": True,
    "unet attends_padding": False,
    "unet low_res_augmentation": "edm",
    "unet trained_beta_schedule": None,
    "unet low_res_upsampling": "bicubic",
}


def describe_run(
    config: TrainingConfig, unet: StageNetwork, mixed_precision: str, num_processes: int = 1, sharing: str = ""
) -> dict[str, Any]:
    """Describe a run by what must match between a checkpoint and the run that resumes from it, except the data.

    Args:
        config (`TrainingConfig`): The configuration.
        unet (`StageNetwork`): The network.
        mixed_precision (`str`): Name in accelerate; only fp16 has a gradient scaler.
        num_processes (`int`): Number of processes that share a step.
        sharing (`str`): How weights are sharded over them.
    """
    network = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    others = BY_CONTENT + IN_A_STEP + AT_THE_START + CHANGEABLE + NOT_COMPARED
    return in_json(
        {
            "network": type(unet).__name__,
            **{f"unet {key}": value for key, value in network.items()},
            **{f.name: getattr(config, f.name) for f in fields(config) if f.name not in others},
            IMAGES_IN_A_STEP: config.train_batch_size * config.gradient_accumulation_steps * num_processes,
            "fp16": mixed_precision == "fp16",
            "weights": sharing,
        }
    )


def changeable_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings that may change between two starts of a run."""
    return in_json({f.name: getattr(config, f.name) for f in fields(config) if f.name in CHANGEABLE})


def find_difference(saved: dict[str, Any], own: dict[str, Any], partly: bool = False) -> str | None:
    """Describe how a run differs from that of a checkpoint; None if it does not.

    Args:
        saved (`dict`), own (`dict`): Results of `describe_run`.
        partly (`bool`): Whether `own` is still incomplete.
    """
    for key in own if partly else {**own, **saved}:
        before, now = (run.get(key, LATER_OPTIONS.get(key)) for run in (saved, own))
        if key == TEXT_ENCODER:
            difference = identity_mismatch(before, now)
            if difference is not None:
                return f"was trained with another text encoder ({difference})"
        elif before != now:
            return f"was trained with {key} {before!r}, but this run has {now!r}"
    return None


def describe_changes(saved: dict[str, Any], own: dict[str, Any]) -> str:
    """Describe the changed settings; empty if there are none."""
    changed = [name for name in own if name in saved and saved[name] != own[name]]
    return ", ".join(f"{name} {own[name]!r} (it was {saved[name]!r})" for name in changed)


def in_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a value as it is after conversion to JSON and back."""
    return json.loads(json.dumps(value))
