#!/usr/bin/env python
"""Trains one stage of a cascade: a base network, or a super-resolution network with --low_resolution.

    accelerate launch scripts/train_imagen.py --train_data_dir data/emoji --preset emoji_base_64 \
        --text_encoder checkpoints/imagen-emoji --output_dir runs/base-64

The options are the fields of `diffusers_imagen.training.TrainingConfig`; --help lists them, and --config FILE.yaml
takes the same names.
"""

from diffusers_imagen.training import Trainer, TrainingConfig
from diffusers_imagen.training.command import main


if __name__ == "__main__":
    main(TrainingConfig, Trainer, __doc__)
