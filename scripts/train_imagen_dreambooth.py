#!/usr/bin/env python
"""Teaches one stage of a cascade a subject from a few images of it (DreamBooth), whole or with a LoRA adapter.

    accelerate launch scripts/train_imagen_dreambooth.py --pretrained_model_name_or_path imagen-emoji \
        --text_encoder imagen-emoji --instance_data_dir photos --instance_prompt "a photo of sks dog" \
        --with_prior_preservation --class_data_dir runs/dogs --class_prompt "a photo of a dog" \
        --output_dir runs/sks-dog --rank 8

It is `diffusers-imagen train-dreambooth` of the installed package; --help lists the options.
"""

from diffusers_imagen.train_dreambooth import main


if __name__ == "__main__":
    main()
