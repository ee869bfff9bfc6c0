"""`accelerate launch -m diffusers_imagen.train_lora`: `diffusers-imagen train-lora` for one or more devices."""

import sys
from typing import NoReturn

from .commands.train_lora import train_lora
from .utils.errors import run_program


def main() -> NoReturn:
    """Train with the command line's arguments, and exit: with code 0, with 2 after a one-line message about invalid
    arguments, files, devices or the Hub, or with 128 plus the number of the signal that stopped the run."""
    run_program(lambda: train_lora(sys.argv[1:]))


if __name__ == "__main__":
    main()
