"""`diffusers-imagen train`: train a stage of a cascade on images with captions."""

from .parser import Parser


DESCRIPTION = """Train one stage of a cascade: a base network, or a super-resolution network with --low_resolution.
The options are the fields of diffusers_imagen.training.TrainingConfig; --config FILE.yaml accepts the same names.
On several devices: accelerate launch -m diffusers_imagen.train, with the same options."""


def add_arguments(command: Parser) -> None:
    """Leave the arguments to the parser of the configuration."""
    command.leave_unread(train)


def train(argv: list[str], program: str | None = None) -> int:
    """Train with these arguments; `program` is the name in the help. Return the exit code of `run_training`."""
    # imports the packages of the extra `train`
    from ..training import TrainingConfig
    from ..training.command import run_training

    return run_training(TrainingConfig, find_trainer, argv, program, DESCRIPTION)


def find_trainer():
    """Return the trainer class."""
    from ..training import Trainer

    return Trainer
