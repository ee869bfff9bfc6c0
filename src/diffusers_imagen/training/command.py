"""What a training command does, as a command of `diffusers-imagen` or as a program of its own."""

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
    """Train as flags say.

    Args:
        config_class (`type`): Whose fields are the flags.
        find_trainer (`Callable`): What imports the run's class, or what makes the run of configuration and network, which
            takes seconds; `--help` does not call it.
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
