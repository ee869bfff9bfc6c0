"""What the training scripts do."""

import logging
import sys
from typing import Callable, Optional

from .config import TrainingConfig
from .interruption import TrainingInterrupted
from .loop import Trainer
from .network import make_unet
from .options import parse_args
from .text import load_text_encoder


def main(
    config_class: type[TrainingConfig], make_trainer: Callable[..., Trainer], description: Optional[str] = None
) -> None:
    """Trains as the command line says; a bad argument is one line on stderr, and a signal the exit code.

    Args:
        config_class (`type`): Whose fields are the flags.
        make_trainer (`Callable`): The run's class, or what makes the run of configuration, network and text encoder.
        description (`str`, *optional*): What `--help` begins with.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        config = parse_args(description=description, config_class=config_class)
        unet = make_unet(config)
        encode = load_text_encoder(config.text_encoder, config.tokenizer_max_length) if config.text_encoder else None
        make_trainer(config, unet, encode).train()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)
