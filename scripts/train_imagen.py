#!/usr/bin/env python
"""Trains one stage of a cascade: a base network, or a super-resolution network with --low_resolution.

    accelerate launch scripts/train_imagen.py --train_data_dir data/emoji --preset emoji_base_64 \
        --text_encoder checkpoints/imagen-emoji --output_dir runs/base-64

The options are the fields of `diffusers_imagen.training.TrainingConfig`; --help lists them, and --config FILE.yaml
takes the same names.
"""

import logging
import sys

from diffusers_imagen.training import TrainingConfig, TrainingInterrupted, parse_args, train
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.training.text import load_text_encoder


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        config: TrainingConfig = parse_args(description=__doc__)
        unet = make_unet(config)
        encode = load_text_encoder(config.text_encoder, config.tokenizer_max_length) if config.text_encoder else None
        train(config, unet, encode)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    main()
