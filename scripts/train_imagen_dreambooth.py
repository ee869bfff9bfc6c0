#!/usr/bin/env python
"""Teaches one stage of a cascade a subject from a few images of it (DreamBooth), whole or with a LoRA adapter.

    accelerate launch scripts/train_imagen_dreambooth.py --pretrained_model_name_or_path checkpoints/imagen-emoji \
        --text_encoder checkpoints/imagen-emoji --instance_data_dir photos --instance_prompt "a photo of sks dog" \
        --with_prior_preservation --class_data_dir runs/dogs --class_prompt "a photo of a dog" \
        --output_dir runs/sks-dog --rank 8

The options are those of train_imagen_lora.py, and the fields of `diffusers_imagen.training.DreamBoothTrainingConfig`.
Without --rank the result is a stage, with it an adapter for `pipe.load_lora_weights("runs/sks-dog")`.
"""

from diffusers_imagen.training import DreamBoothTrainingConfig
from diffusers_imagen.training.command import main
from diffusers_imagen.training.finetuning.dreambooth import make_trainer


if __name__ == "__main__":
    main(DreamBoothTrainingConfig, make_trainer, __doc__)
