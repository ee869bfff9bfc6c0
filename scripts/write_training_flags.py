#!/usr/bin/env python
"""Write docs/training_flags.md, a table of all settings of a training run; part of `make docs`.

python scripts/write_training_flags.py
"""

from dataclasses import MISSING, Field, fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from diffusers_imagen.training import DreamBoothTrainingConfig, LoraTrainingConfig, TrainingConfig, run_identity
from diffusers_imagen.training.data import DataConfig
from diffusers_imagen.training.options import ELSEWHERE
from diffusers_imagen.training.settings import hints_of
from diffusers_imagen.training.validation.metric_settings import MetricSettings


PAGE = Path(__file__).resolve().parents[1] / "docs" / "training_flags.md"
INTRODUCTION = """# Training flags

This page is written by `scripts/write_training_flags.py`. Each setting is a flag of `diffusers-imagen train` and of `scripts/train_imagen.py`, an entry of the YAML file given as `--config`, and a field of `TrainingConfig`. [Train from scratch](training.md) explains how to use them.

The last column shows whether a run that is resumed from a checkpoint may change a setting:
"""
# of train_text_to_image.py, its LoRA script, train_dreambooth.py and its LoRA script, which train DeepFloyd IF too
DIFFUSERS = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir image_column caption_column
max_train_samples cache_dir validation_prompts num_validation_images validation_epochs validation_steps validation_images
output_dir logging_dir seed resolution center_crop random_flip image_interpolation_mode train_batch_size num_train_epochs
max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
lr_num_cycles snr_gamma use_8bit_adam allow_tf32 use_ema dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id prediction_type mixed_precision report_to checkpointing_steps
checkpoints_total_limit resume_from_checkpoint rank tokenizer_max_length instance_data_dir instance_prompt class_data_dir
class_prompt with_prior_preservation prior_loss_weight num_class_images sample_batch_size
""".split()
OTHERS = """## Flags of diffusers' scripts

Of the flags of diffusers' `train_text_to_image.py`, `train_text_to_image_lora.py`, `train_dreambooth.py` and `train_dreambooth_lora.py`, these have the same name here:

{same}.

These are refused by name, in one line that says why:

| diffusers' flag | here |
| --- | --- |
{refused}
"""
ON_RESUME = {
    "ANOTHER_RUN": ("same", "it must be the same"),
    "BY_CONTENT": ("same content", "the content must be the same, in any location"),
    "AT_THE_START": ("start", "it is read at the start of a run only"),
    "CHANGEABLE": ("free", "it may change, and the run logs the change"),
    "NOT_COMPARED": ("-", "it may change, without a message"),
}
SECTIONS = (
    (DataConfig, "Data", "For every training command."),
    (TrainingConfig, "Network, objective and loop", "For every training command."),
    (
        MetricSettings,
        "Metrics of held-out images",
        "For every training command; see [evaluation.md](evaluation.md).",
    ),
    (
        LoraTrainingConfig,
        "LoRA",
        "For `train-lora` (`scripts/train_imagen_lora.py`) and `train-dreambooth` (`scripts/train_imagen_dreambooth.py`).",
    ),
    (
        DreamBoothTrainingConfig,
        "DreamBooth",
        "For `train-dreambooth`; some have other defaults there.",
    ),
)


def show_type(hint: Any) -> str:
    """Format a type for the table, without None, which the default shows."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"{show_type(get_args(hint)[0])}, several"
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return show_type(kinds[0]) if kinds else hint.__name__


def show_default(field: Field) -> str:
    default = field.default if field.default is not MISSING else field.default_factory()
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def describe(field: Field, hint: Any) -> str:
    """Return the table row of a setting."""
    kept = next((word for name, (word, _) in ON_RESUME.items() if field.name in getattr(run_identity, name)), None)
    if kept is None:
        raise ValueError(
            f"`{field.name}` is in no class of training/run_identity.py, but should be in one of {', '.join(ON_RESUME)}."
        )
    meaning = field.metadata["help"].replace("|", "\\|")
    return f"| `{field.name}` | {show_type(hint)} | {show_default(field)} | {meaning} | {kept} |"


def write_page() -> str:
    lines = [INTRODUCTION, *(f"- {word}: {meaning};" for word, meaning in ON_RESUME.values())]
    lines[-1] = lines[-1].replace(";", ".")
    for settings, title, scripts in SECTIONS:
        own = [field for field in fields(settings) if field.name in get_annotations(settings)]
        lines += [
            "",
            f"## {title}",
            "",
            scripts,
            "",
            "| flag | type | default | meaning | on resume |",
            "| --- " * 5 + "|",
        ]
        lines += [describe(field, hints_of(settings)[field.name]) for field in own]
    names = {field.name for field in fields(DreamBoothTrainingConfig)}
    same = ", ".join(f"`{name}`" for name in DIFFUSERS if name in names)
    refused = "\n".join(f"| `{name}` | {reason} |" for name, reason in ELSEWHERE.items())
    return "\n".join(lines) + "\n\n" + OTHERS.format(same=same, refused=refused)


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
