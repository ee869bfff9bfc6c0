"""Training commands, run by `diffusers-imagen` or as separate programs."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .config import TrainingConfig
from .options import parse_args


if TYPE_CHECKING:
    from .loop import Trainer


def run_training(
    config_class: type[TrainingConfig],
    find_trainer: Callable[[], "Callable[..., Trainer]"],
    argv: list[str] | None = None,
    program: str | None = None,
    description: str | None = None,
) -> int:
    """Train with command line arguments.

    Args:
        config_class (`type`): Configuration whose fields are the options.
        find_trainer (`Callable`): Imports and returns the class of the run, or a function that creates the run from a
            configuration and a network. Slow, and not called for `--help`.
        argv (`list[str]`, *optional*): The arguments; those of the process if None.
        program (`str`, *optional*): Name of the program in `--help`; by default the file of the process.
        description (`str`, *optional*): First lines of `--help`.

    Returns:
        0, or 128 plus the number of the signal that stopped the run.

    Raises:
        ValueError: Or another error that `utils.errors.describe` supports, for invalid arguments, files, devices or
            the Hub.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for name in ("httpx", "httpx2"):  # used by huggingface_hub: one line per requested file
        logging.getLogger(name).setLevel(logging.WARNING)
    config = parse_args(argv, description, config_class, program)
    # torch and diffusers take seconds to import; --help should not
    from .interruption import TrainingInterrupted
    from .network import make_unet

    unet = make_unet(config)
    try:
        find_trainer()(config, unet).train()
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    return 0
