#!/usr/bin/env python
"""Writes docs/training_flags.md, a table of every setting of a training run: a part of `make docs`.

python scripts/write_training_flags.py
"""

from dataclasses import MISSING, Field, fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from diffusers_imagen.training import DreamBoothTrainingConfig, LoraTrainingConfig, TrainingConfig, run_identity
from diffusers_imagen.training.data import DataConfig
from diffusers_imagen.training.settings import hints_of


PAGE = Path(__file__).resolve().parents[1] / "docs" / "training_flags.md"
INTRODUCTION = """# Training flags

This page is written by `scripts/write_training_flags.py`. Each setting is a flag of `scripts/train_imagen.py`, an entry of the YAML file given as `--config`, and a field of `TrainingConfig`. [Train from scratch](training.md) explains how to use them.

The last column shows whether a run that is resumed from a checkpoint may change a setting:
"""
ON_RESUME = {
    "ANOTHER_RUN": ("same", "it must be the same"),
    "BY_CONTENT": ("same content", "the content must be the same, in any location"),
    "AT_THE_START": ("start", "it is read at the start of a run only"),
    "CHANGEABLE": ("free", "it may change, and the run logs the change"),
    "NOT_COMPARED": ("-", "it may change, without a message"),
}
SECTIONS = (
    (DataConfig, "Data", "For every training script."),
    (TrainingConfig, "Network, objective and loop", "For every training script."),
    (LoraTrainingConfig, "LoRA", "For `scripts/train_imagen_lora.py` and `scripts/train_imagen_dreambooth.py`."),
    (
        DreamBoothTrainingConfig,
        "DreamBooth",
        "For `scripts/train_imagen_dreambooth.py`; some have other defaults there.",
    ),
)


def show_type(hint: Any) -> str:
    """A type as a reader of the table takes it: None is told by the default."""
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
    """A line of the table."""
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
