"""`accelerate launch -m diffusers_imagen.train_lora`: as `diffusers-imagen train-lora`, on several devices too."""

import sys
from typing import NoReturn

from .commands.train_lora import train_lora
from .utils.errors import run_program


def main() -> NoReturn:
    """Train as the command line says, and end the process: with exit code 0, 2 after one line about what was wrong with
    arguments, files, devices or the Hub, or 128 plus the signal that stopped the run."""
    run_program(lambda: train_lora(sys.argv[1:]))


if __name__ == "__main__":
    main()
