"""What the training scripts do."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..utils.errors import run_to_exit_code
from .config import TrainingConfig
from .interruption import TrainingInterrupted
from .loop import Trainer
from .network import make_unet
from .options import parse_args


def main(
    config_class: type[TrainingConfig], make_trainer: Callable[..., Trainer], description: str | None = None
) -> NoReturn:
    """Trains as the command line says, and ends the process.

    Its exit code is 0, 2 after one line about what was wrong with arguments, files, devices or the Hub, and 128 plus
    the signal that stopped the run.

    Args:
        config_class (`type`): Whose fields are the flags.
        make_trainer (`Callable`): The run's class, or what makes the run of configuration and network.
        description (`str`, *optional*): What `--help` begins with.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for name in ("httpx", "httpx2"):  # of huggingface_hub: a line for each file that it asks for
        logging.getLogger(name).setLevel(logging.WARNING)

    def run() -> int:
        config = parse_args(description=description, config_class=config_class)
        unet = make_unet(config)
        try:
            make_trainer(config, unet).train()
        except TrainingInterrupted as stopped:
            print(stopped, file=sys.stderr)
            return 128 + stopped.signum
        return 0

    sys.exit(run_to_exit_code(run, Path(sys.argv[0]).name))
