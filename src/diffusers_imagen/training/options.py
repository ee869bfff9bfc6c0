"""The options of a training script: flags, and a YAML file of the same names."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from transformers import HfArgumentParser

from ..utils.flags import BothSpellings
from ..utils.yaml import read_yaml
from .config import TrainingConfig
from .settings import hints_of


Config = TypeVar("Config", bound=TrainingConfig)


# flags of diffusers' training scripts that these do not have, with the reason or what stands for them
OFFSET = (
    "noise is independent in each pixel, as the samplers draw it; for brightness, which high noise levels decide, train on "
    "more of those by a larger --p_mean"
)
ELSEWHERE = {
    "noise_offset": OFFSET,
    "offset_noise": OFFSET,
    "input_perturbation": "--noise_conditioning_augmentation is the noise that a network is trained to expect",
    "validation_prompt": "--validation_prompts takes one or several",
    "validation_scheduler": "samples are drawn by the scheduler that the stage is exported with",
    "enable_xformers_memory_efficient_attention": "--attention_backend chooses the attention",
    "local_rank": "`accelerate launch` numbers the processes",
    "set_grads_to_none": "gradients are always set to None",
    "lr_power": "--lr_scheduler polynomial has the power 1",
    "tracker_project_name": "trackers get the name diffusers-imagen",
    "train_text_encoder": "the text encoder is frozen, as in Imagen",
    "tokenizer_name": "the tokenizer is that of --text_encoder",
    "text_encoder_use_attention_mask": "the text encoder always gets its mask",
    "pre_compute_text_embeddings": "captions are encoded once where they fit in memory; --embedding_cache keeps them on disk",
    "skip_save_text_encoder": "the text encoder is saved by reference, without its weights",
    "class_labels_conditioning": "the configuration of the network says what it is conditioned on",
    "prior_generation_precision": "class images are drawn in --mixed_precision",
    "proportion_empty_prompts": "--text_drop_rate is the rate of dropped captions",
    "dream_training": "--preconditioning, --prediction_type and --loss_weighting choose the objective",
    "non_ema_revision": "a stage has one set of weights, of which --revision chooses the commit",
}


def refuse_elsewhere(names: Iterable[str], where: str) -> None:
    """Raises ValueError for the first name that is a flag of diffusers' scripts only, with what there is in its place."""
    for name in names:
        if name in ELSEWHERE:
            raise ValueError(
                f"`{name}`{where} is an option of diffusers' scripts, but not of these: {ELSEWHERE[name]}."
            )


class OneLineErrors(BothSpellings):
    """A parser that raises instead of showing all options and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options.")


class OptionParser(OneLineErrors, HfArgumentParser):
    """A parser of a dataclass's fields."""

    def add_argument(self, *names: Any, place: str | None = None, **kwargs: Any) -> argparse.Action:
        """As argparse, without what `arg` says of places: HfArgumentParser hands on all metadata of a field."""
        return super().add_argument(*names, **kwargs)


def parse_args(
    argv: list[str] | None = None,
    description: str | None = None,
    config_class: type[Config] = TrainingConfig,  # type: ignore[assignment]  # mypy knows no defaults of type variables
    program: str | None = None,
) -> Config:
    """The settings of a run from the command line; flags win over what `--config FILE.yaml` says.

    Args:
        argv (`list[str]`, *optional*): The flags; those of the process if None.
        description (`str`, *optional*): What `--help` begins with.
        config_class (`type`, defaults to `TrainingConfig`): Whose fields are the flags.
        program (`str`, *optional*): What `--help` calls the program; without it, the file of the process.

    Raises:
        ValueError: If the file cannot be read, there is a name that is no option, or a value does not fit.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = (flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in argv if flag.startswith("--"))
    refuse_elsewhere(flags, "")
    file = OneLineErrors(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    given, rest = file.parse_known_args(argv)

    # HfArgumentParser takes a dataclass, its base class does not
    options = {"prog": program, "description": description, "allow_abbrev": False}
    parser = OptionParser(config_class, **options)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="File with the same names; flags win over it.")
    if given.config is not None:
        parser.set_defaults(**read_settings(given.config, config_class))
    namespace = parser.parse_args(rest)
    return config_class(**{f.name: getattr(namespace, f.name) for f in fields(config_class)})


def read_settings(path: str, config_class: type[TrainingConfig] = TrainingConfig) -> dict[str, Any]:
    """The entries of a YAML file but for those that are null, which leave the default.

    Raises:
        ValueError: If it is no file of names and values, or has names that are no options.
    """
    entries = read_yaml(path, "config")
    if not isinstance(entries, dict):
        raise ValueError(f"`config` is '{path}', but should have a line `name: value` for each option.")
    known = {f.name for f in fields(config_class)}
    refuse_elsewhere((name for name in entries if name not in known), f" in '{path}'")
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise ValueError(f"`config` '{path}' has {unknown}, which are no options; --help lists those there are.")
    hints = hints_of(config_class)
    return {name: read_value(value, hints[name]) for name, value in entries.items() if value is not None}


def read_value(value: Any, hint: Any) -> Any:
    """An entry as the option takes it: one value for a list of one, and numbers that YAML takes for strings (1e-4).

    What does not fit is left to the check of types, and a single string to argparse.
    """
    kinds = [kind for part in (hint, *get_args(hint)) if get_origin(part) is list for kind in get_args(part)]
    if not kinds:
        return value
    entries = value if isinstance(value, list) else [value]
    try:
        return [float(entry) if float in kinds and isinstance(entry, str) else entry for entry in entries]
    except ValueError:
        return entries
