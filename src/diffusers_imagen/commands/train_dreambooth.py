"""`diffusers-imagen train-dreambooth`: fine-tune a stage on a few images of a subject (DreamBooth)."""

from .parser import Parser


DESCRIPTION = """Fine-tune one stage of a cascade on a few images of a subject (DreamBooth): all weights, or with --rank
a LoRA adapter for pipe.load_lora_weights("OUTPUT_DIR").
The options are those of `train-lora`, and the fields of diffusers_imagen.training.DreamBoothTrainingConfig.
On several devices: accelerate launch -m diffusers_imagen.train_dreambooth, with the same options."""


def add_arguments(command: Parser) -> None:
    """Leave the arguments to the parser of the configuration."""
    command.leave_unread(train_dreambooth)


def train_dreambooth(argv: list[str], program: str | None = None) -> int:
    """Train with these arguments; `program` is the name in the help. Return the exit code of `run_training`."""
    # imports the packages of the extra `train`
    from ..training import DreamBoothTrainingConfig
    from ..training.command import run_training

    return run_training(DreamBoothTrainingConfig, find_trainer, argv, program, DESCRIPTION)


def find_trainer():
    """Return the function that creates the trainer."""
    from ..training.finetuning.dreambooth import make_trainer

    return make_trainer
