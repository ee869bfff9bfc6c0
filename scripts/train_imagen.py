#!/usr/bin/env python
"""Train one stage of a cascade: a base network, or a super-resolution network with --low_resolution.

    accelerate launch scripts/train_imagen.py --train_data_dir data/emoji --preset emoji_base_64 \
        --text_encoder imagen-emoji --output_dir runs/base-64

This is `diffusers-imagen train` of the installed package; --help lists the options.
"""

from diffusers_imagen.train import main


if __name__ == "__main__":
    main()
