#!/usr/bin/env python
"""Trains one stage of a cascade: a base network, or a super-resolution network with --low_resolution.

    accelerate launch scripts/train_imagen.py --train_data_dir data/emoji --preset emoji_base_64 \
        --text_encoder checkpoints/imagen-emoji --output_dir runs/base-64

The options are the fields of `diffusers_imagen.training.TrainingConfig`; --help lists them.
"""

import logging
import sys
from pathlib import Path

from diffusers import AutoModel
from transformers import HfArgumentParser

from diffusers_imagen.models.unet_base import ConditionalUNet
from diffusers_imagen.presets import create_unet
from diffusers_imagen.training import TrainingConfig, train
from diffusers_imagen.training.growing import grow_unet
from diffusers_imagen.training.text import load_text_encoder


def make_unet(config: TrainingConfig) -> ConditionalUNet:
    """The network to train, set to the resolution that it is trained at."""
    if config.preset is not None:
        unet = create_unet(config.preset)
    else:
        unet = load_unet(Path(config.pretrained_model_name_or_path))
    if config.grow:
        unet = grow_unet(unet)
    return unet.at_resolution(config.resolution)


def load_unet(stage: Path) -> ConditionalUNet:
    """The network of a stage folder."""
    if not (stage / "unet" / "config.json").is_file():
        raise ValueError(f"`pretrained_model_name_or_path` is '{stage}', which has no unet/config.json.")
    return AutoModel.from_pretrained(str(stage), subfolder="unet")  # knows our classes: they are registered


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        (config,) = HfArgumentParser(TrainingConfig, description=__doc__).parse_args_into_dataclasses()
        unet = make_unet(config)
        encode = load_text_encoder(config.text_encoder, config.tokenizer_max_length) if config.text_encoder else None
        train(config, unet, encode)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
