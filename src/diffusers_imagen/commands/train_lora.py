"""`diffusers-imagen train-lora`: train a LoRA adapter of one stage of a cascade."""

from ..utils.packages import require_packages
from .parser import Parser


DESCRIPTION = """Train a LoRA adapter of one stage of a cascade; of a super-resolution stage with --low_resolution.
The options are those of `train`, and the fields of diffusers_imagen.training.LoraTrainingConfig. Load the result with
pipe.load_lora_weights("OUTPUT_DIR"), and for a cascade with component="base_unet".
On several devices: accelerate launch -m diffusers_imagen.train_lora, with the same options."""


def add_arguments(command: Parser) -> None:
    """Leave the arguments to the parser of the configuration."""
    command.leave_unread(train_lora)


def train_lora(argv: list[str], program: str | None = None) -> int:
    """Train with these arguments; `program` is the name in the help. Return the exit code of `run_training`."""
    require_packages("training of adapters", "train", "datasets", "peft")
    from ..training import LoraTrainingConfig
    from ..training.command import run_training

    return run_training(LoraTrainingConfig, find_trainer, argv, program, DESCRIPTION)


def find_trainer():
    """Return the trainer class."""
    from ..training import LoraTrainer

    return LoraTrainer
