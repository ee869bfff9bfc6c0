#!/usr/bin/env python
"""Train a LoRA adapter of one stage of a cascade; of a super-resolution stage with --low_resolution.

    accelerate launch scripts/train_imagen_lora.py --pretrained_model_name_or_path runs/base-64 \
        --train_data_dir data/style --text_encoder imagen-emoji --output_dir runs/style --rank 8

This is `diffusers-imagen train-lora` of the installed package; --help lists the options.
"""

from diffusers_imagen.train_lora import main


if __name__ == "__main__":
    main()
