"""What a training command does, as a command of `diffusers-imagen` or as a program of its own."""

import logging
import sys
from collections.abc import Callable

from .config import TrainingConfig
from .interruption import TrainingInterrupted
from .loop import Trainer
from .network import make_unet
from .options import parse_args


def run_training(
    config_class: type[TrainingConfig],
    make_trainer: Callable[..., Trainer],
    argv: list[str] | None = None,
    program: str | None = None,
    description: str | None = None,
) -> int:
    """Train as flags say.

    Args:
        config_class (`type`): Whose fields are the flags.
        make_trainer (`Callable`): The run's class, or what makes the run of configuration and network.
        argv (`list[str]`, *optional*): The flags; those of the process if None.
        program (`str`, *optional*): What `--help` calls the program; without it, the file of the process.
        description (`str`, *optional*): What `--help` begins with.

    Returns:
        0, or 128 plus the signal that stopped the run.

    Raises:
        ValueError: And what else `utils.errors.describe` knows, for arguments, files, devices or the Hub.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for name in ("httpx", "httpx2"):  # of huggingface_hub: a line for each file that it asks for
        logging.getLogger(name).setLevel(logging.WARNING)
    config = parse_args(argv, description, config_class, program)
    unet = make_unet(config)
    try:
        make_trainer(config, unet).train()
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    return 0
