"""The stage that a run begins with: what its folder or repository says beside the weights of its network."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..models.unet_base import ConditionalUNet
from ..pipelines.card_files import find_card_folder, read_card_license
from ..pipelines.loading import deepfloyd_repository
from ..pipelines.loading.folders import is_hub_id
from ..pipelines.origin import DEEPFLOYD, check_origin
from ..pipelines.stage_table import BASE, most_steps
from ..schedulers import EDMHeunScheduler
from ..schedulers.foreign_configs import is_discrete
from ..utils.arguments import bad_argument
from ..utils.files import read_json_object
from .config import TrainingConfig
from .network import THEIR_NETWORK, find_network, load_index


class PretrainedStage(NamedTuple):
    """What is known of a stage; nothing of a run that begins with a new network."""

    scheduler: dict[str, Any] | None = None  # its configuration
    call_defaults: dict[str, float] | None = None  # these three as in the pipelines
    clean_caption: bool = False
    origin: dict[str, str] | None = None
    max_length: int | None = None  # tokens of a text, where the kind of network says that
    part: str | None = None  # the component of its pipeline that is trained further, such as `base_unet` of a cascade
    folder: Path | None = None  # with its card and notices
    license: dict[str, str] | None = None  # of its card's metadata

    @property
    def preconditioning(self) -> str | None:
        """How the network was trained, if its scheduler says so."""
        if self.scheduler is None:
            return None
        return "discrete" if is_discrete(self.scheduler) else self.scheduler.get("preconditioning")

    def scheduler_for(self, preconditioning: str) -> dict[str, Any] | None:
        """The scheduler's configuration, if the network is trained further for the same discrete noise levels."""
        return self.scheduler if self.preconditioning == preconditioning == "discrete" else None

    def settings(self, preconditioning: str, sampling: dict[str, Any], upscales: bool) -> dict[str, Any]:
        """The settings of a pipeline with what is trained of this stage; `sampling` is the objective's.

        A network that is trained for something else is called otherwise, and one of discrete noise levels with the solver
        that takes the place of its ancestral sampler.
        """
        own = self.call_defaults if self.preconditioning == preconditioning else None
        call_defaults = {**sampling, **(own or {})} or None
        if call_defaults is not None and "num_inference_steps" in call_defaults and preconditioning == "discrete":
            most = most_steps("adams", upscales)
            call_defaults["num_inference_steps"] = min(call_defaults["num_inference_steps"], most)
        return {"call_defaults": call_defaults, "clean_caption": self.clean_caption, "origin": self.origin}


def find_pretrained(config: TrainingConfig) -> PretrainedStage:
    """What the stage says that the weights of a run are from.

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
    known = PretrainedStage(scheduler, part=subfolder, folder=folder, license=read_card_license(folder) or None)
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


def place_of_network(config: TrainingConfig) -> tuple[str, str]:
    """The folder or repository of the stage or cascade, and the subfolder of the network in it."""
    name = str(config.pretrained_model_name_or_path)
    subfolder = find_network(config)
    if subfolder is not None:
        return name, subfolder
    path = Path(os.path.abspath(name))  # the folder of a network
    return str(path.parent), path.name


def read_scheduler(config: TrainingConfig) -> dict[str, Any] | None:
    """The configuration of the scheduler of the stage that a run begins with, as `load_scheduler_config` has it."""
    return load_scheduler_config(*place_of_network(config), config.revision)


def load_scheduler_config(place: str, subfolder: str, revision: str | None = None) -> dict[str, Any] | None:
    """The configuration of the scheduler beside the network in a subfolder; None if there is none.

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
        return EDMHeunScheduler.load_config(place, subfolder=part, revision=revision)  # reads what any scheduler saved
    except OSError:
        return None


def load_network_config(place: str, subfolder: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a network; nothing if it cannot be read, which the network's own loading says."""
    try:
        found = ConditionalUNet.load_config(place, subfolder=subfolder, revision=revision)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def base_model(place: str, index: Mapping[str, Any]) -> dict[str, str]:
    """The Hub id of a repository that was loaded or downloaded, as far as its folder tells."""
    name = index.get("_name_or_path") if Path(place).is_dir() else place
    return {"base_model": str(name)} if is_hub_id(name) else {}


def read_settings(index: Mapping[str, Any], stage: str) -> tuple[Any, bool, Any]:
    """`call_defaults`, `clean_caption` and `origin` of a stage in the index of its pipeline, or of its cascade.

    Raises:
        ValueError: If one of them is none that it can be; names it.
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
