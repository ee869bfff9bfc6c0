#!/usr/bin/env python
"""Trains a LoRA adapter of one stage of a cascade, of a super-resolution stage with --low_resolution.

    accelerate launch scripts/train_imagen_lora.py --pretrained_model_name_or_path runs/base-64 \
        --train_data_dir data/style --text_encoder checkpoints/imagen-emoji --output_dir runs/style --rank 8

The options are those of train_imagen.py, and the fields of `diffusers_imagen.training.LoraTrainingConfig`. The result
is for `pipe.load_lora_weights("runs/style")`, of a cascade with `component="base_unet"`.
"""

from diffusers_imagen.training import LoraTrainer, LoraTrainingConfig
from diffusers_imagen.training.command import main


if __name__ == "__main__":
    main(LoraTrainingConfig, LoraTrainer, __doc__)
