"""Pretrained stage of a run: the metadata of its folder or repository besides the network's weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import logging

from ..models.interface import StageNetwork
from ..models.unet_base import ConditionalUNet
from ..pipelines.card_files import find_card_folder, read_card_license
from ..pipelines.loading import deepfloyd_repository
from ..pipelines.loading.folders import is_hub_id
from ..pipelines.origin import DEEPFLOYD, check_origin
from ..pipelines.stage_table import BASE, TEXT_PARTS, most_steps
from ..schedulers import EDMHeunScheduler
from ..schedulers.foreign_configs import is_discrete
from ..utils.arguments import bad_argument
from ..utils.files import read_json_object
from .config import TrainingConfig
from .network import THEIR_NETWORK, find_network, has_part, load_index


logger = logging.get_logger(__name__)


class PretrainedStage(NamedTuple):
    """Metadata of a pretrained stage; empty for a run that starts with a new network."""

    scheduler: dict[str, Any] | None = None  # its configuration
    call_defaults: dict[str, float] | None = None  # this and the next two are settings of pipelines
    clean_caption: bool = False
    origin: dict[str, str] | None = None
    max_length: int | None = None  # maximum tokens per text, if the kind of network determines it
    part: str | None = None  # the component of its pipeline to train, such as `base_unet` of a cascade
    folder: Path | None = None  # with its model card and notices
    license: dict[str, str] | None = None  # from the metadata of its model card
    text_encoder: str | None = None  # folder or repository with its text encoder and tokenizer, if it has them

    @property
    def preconditioning(self) -> str | None:
        """Preconditioning of the network in training, according to its scheduler."""
        if self.scheduler is None:
            return None
        return "discrete" if is_discrete(self.scheduler) else self.scheduler.get("preconditioning")

    def scheduler_for(self, preconditioning: str) -> dict[str, Any] | None:
        """Return the scheduler's configuration, if the network is trained for the same discrete noise levels again."""
        return self.scheduler if self.preconditioning == preconditioning == "discrete" else None

    def settings(self, preconditioning: str, sampling: dict[str, Any], upscales: bool) -> dict[str, Any]:
        """Return the settings of a pipeline with the trained network; `sampling` is the objective's.

        Call defaults are not kept for another preconditioning; for discrete noise levels, steps are limited to those
        of the solver that replaces the ancestral sampler.
        """
        own = self.call_defaults if self.preconditioning == preconditioning else None
        call_defaults = {**sampling, **(own or {})} or None
        if call_defaults is not None and "num_inference_steps" in call_defaults and preconditioning == "discrete":
            most = most_steps("adams", upscales)
            call_defaults["num_inference_steps"] = min(call_defaults["num_inference_steps"], most)
        return {"call_defaults": call_defaults, "clean_caption": self.clean_caption, "origin": self.origin}


def find_pretrained(config: TrainingConfig) -> PretrainedStage:
    """Find the metadata of the stage that a run starts from.

    Raises:
        ValueError: If one of its files is malformed.
    """
    if config.pretrained_model_name_or_path is None:
        return PretrainedStage()
    place, subfolder = place_of_network(config)
    revision = config.revision
    scheduler, index = load_scheduler_config(place, subfolder, revision), load_index(place, revision)
    network = load_network_config(place, subfolder, revision)
    folder = find_card_folder(place, revision=revision, with_pictures=False)
    known = PretrainedStage(
        scheduler,
        part=subfolder,
        folder=folder,
        license=read_card_license(folder) or None,
        text_encoder=place if all(has_part(index, part) for part in TEXT_PARTS) else None,
    )
    if network.get("_class_name") == THEIR_NETWORK:
        origin = {"license": DEEPFLOYD, **base_model(place, index)}
        defaults = deepfloyd_repository.call_defaults(network.get("class_embed_type") is not None)
        max_length = deepfloyd_repository.MAX_TOKENS
        return known._replace(call_defaults=defaults, clean_caption=True, origin=origin, max_length=max_length)
    try:
        call_defaults, clean_caption, origin = read_settings(index, subfolder.removesuffix("_unet"))
    except ValueError as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` is '{place}', whose model_index.json is malformed: {error}"
        ) from error
    return known._replace(call_defaults=call_defaults, clean_caption=clean_caption, origin=origin)


def use_own_text_encoder(config: TrainingConfig, unet: StageNetwork, pretrained: PretrainedStage) -> None:
    """Set `config.text_encoder` to the text encoder of the pretrained stage, if the network is conditioned on text and
    the configuration names no source of embeddings."""
    if config.names_text or unet.text_width is None or pretrained.text_encoder is None:
        return
    config.text_encoder = pretrained.text_encoder
    logger.info(f"`text_encoder` is not given: that of the pretrained stage, '{config.text_encoder}', is used.")


def place_of_network(config: TrainingConfig) -> tuple[str, str]:
    """Return the folder or repository of the stage or cascade, and the subfolder of the network in it."""
    name = str(config.pretrained_model_name_or_path)
    subfolder = find_network(config)
    if subfolder is not None:
        return name, subfolder
    path = Path(os.path.abspath(name))  # the folder of a network
    return str(path.parent), path.name


def read_scheduler(config: TrainingConfig) -> dict[str, Any] | None:
    """Read the configuration of the pretrained stage's scheduler; see `load_scheduler_config`."""
    return load_scheduler_config(*place_of_network(config), config.revision)


def load_scheduler_config(place: str, subfolder: str, revision: str | None = None) -> dict[str, Any] | None:
    """Load the configuration of the scheduler of the network in a subfolder; None if there is none.

    Raises:
        ValueError: If it is malformed.
    """
    part = subfolder.replace("unet", "scheduler")
    file = Path(place) / part / EDMHeunScheduler.config_name
    if file.exists():
        return read_json_object(file)
    if Path(place).is_dir():
        return None
    try:
        return EDMHeunScheduler.load_config(place, subfolder=part, revision=revision)  # reads that of any scheduler
    except OSError:
        return None


def load_network_config(place: str, subfolder: str, revision: str | None = None) -> dict[str, Any]:
    """
    Load the configuration of a network; empty if it cannot be read, which raises an error when the network is loaded.
    """
    try:
        found = ConditionalUNet.load_config(place, subfolder=subfolder, revision=revision)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def base_model(place: str, index: Mapping[str, Any]) -> dict[str, str]:
    """Return the Hub id of a loaded or downloaded repository, if its folder has it."""
    name = index.get("_name_or_path") if Path(place).is_dir() else place
    return {"base_model": str(name)} if is_hub_id(name) else {}


def read_settings(index: Mapping[str, Any], stage: str) -> tuple[Any, bool, Any]:
    """Read `call_defaults`, `clean_caption` and `origin` of a stage from the index of its pipeline, or of its cascade.

    Raises:
        ValueError: If one of them is invalid; names it.
    """
    found = []
    for name in ("call_defaults", "origin"):
        value = index.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise bad_argument(name, value, "an object")
        by_stage = value is not None and all(isinstance(entry, Mapping) for entry in value.values())
        found.append(value.get(stage) if value is not None and by_stage else value)
    call_defaults, origin = found
    BASE.defaults.updated("call_defaults", call_defaults)
    check_origin("origin", origin)
    clean_caption = index.get("clean_caption", False)
    if not isinstance(clean_caption, bool):
        raise bad_argument("clean_caption", clean_caption, "true or false")
    return call_defaults, clean_caption, origin
