"""`python -m diffusers_imagen`: the command `diffusers-imagen`."""

import sys

from .commands.main import main


if __name__ == "__main__":
    sys.exit(main())
