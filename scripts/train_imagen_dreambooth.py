#!/usr/bin/env python
"""Fine-tune one stage of a cascade on a few images of a subject (DreamBooth): all weights, or a LoRA adapter.

    accelerate launch scripts/train_imagen_dreambooth.py --pretrained_model_name_or_path imagen-emoji \
        --text_encoder imagen-emoji --instance_data_dir photos --instance_prompt "a photo of sks dog" \
        --with_prior_preservation --class_data_dir runs/dogs --class_prompt "a photo of a dog" \
        --output_dir runs/sks-dog --rank 8

This is `diffusers-imagen train-dreambooth` of the installed package; --help lists the options.
"""

from diffusers_imagen.train_dreambooth import main


if __name__ == "__main__":
    main()
