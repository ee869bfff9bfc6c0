"""`diffusers-imagen train-dreambooth`: a stage of a cascade learns a subject from a few images of it."""

from .parser import Parser


DESCRIPTION = """Teaches one stage of a cascade a subject from a few images of it (DreamBooth), whole, or with --rank a
LoRA adapter for pipe.load_lora_weights("OUTPUT_DIR").
The options are those of `train-lora`, and the fields of diffusers_imagen.training.DreamBoothTrainingConfig.
On several devices: accelerate launch -m diffusers_imagen.train_dreambooth, with the same options."""


def add_arguments(command: Parser) -> None:
    """Leave the arguments to the parser of the configuration."""
    command.leave_unread(train_dreambooth)


def train_dreambooth(argv: list[str], program: str | None = None) -> int:
    """Train as flags say; `program` is what `--help` calls itself. Return the exit code of `run_training`."""
    # imports the packages of the extra `train`
    from ..training import DreamBoothTrainingConfig
    from ..training.command import run_training

    return run_training(DreamBoothTrainingConfig, find_trainer, argv, program, DESCRIPTION)


def find_trainer():
    """Import what makes the run of a configuration and a network."""
    from ..training.finetuning.dreambooth import make_trainer

    return make_trainer
