"""Where weights are from and under which license: checked, and put into words for model cards.

A pipeline has its `origin` in its configuration: a dict of `base_model`, a Hub id, and `license`, a key of `LICENSES`;
a cascade one by stage name. Copies and fine-tuned weights keep it.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusers.utils import logging

from ..utils.arguments import bad_argument, check_choice
from .stage_table import check_stage_names


logger = logging.get_logger(__name__)


class License(NamedTuple):
    """A license of published weights, as a card names it."""

    title: str
    link: str
    fields: dict[str, str]  # of the card's metadata
    notice: str  # that copies and derivatives carry, word by word
    meaning: str  # in plain words


DEEPFLOYD = "deepfloyd"
DEEPFLOYD_LINK = "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license"
# the strictest first: it is the one that a card of several names
LICENSES = {
    DEEPFLOYD: License(
        "DeepFloyd IF License",
        DEEPFLOYD_LINK,
        {"license": "other", "license_name": "deepfloyd-if-license", "license_link": DEEPFLOYD_LINK},
        "DeepFloyd is licensed under the DeepFloyd License, Copyright (c) Stability AI Ltd. All Rights Reserved.",
        "The weights, and whatever they produce, are for non-commercial research. Copies and derivatives, fine-tuned "
        "weights and adapters among them, are under the same license, and carry it and the line above. The safety checker "
        "and the watermark are protections that are not to be circumvented.",
    ),
    "karlo": License(
        "CreativeML OpenRAIL-M",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        {"license": "creativeml-openrail-m"},
        "Karlo's weights are licensed under the CreativeML OpenRAIL-M license.",
        "They may be used, changed and passed on, also for money, but not for the uses that the license's attachment A "
        "lists. Copies and derivatives, fine-tuned weights and adapters among them, carry the license and these "
        "restrictions.",
    ),
}  # fmt: skip
KEYS = ("base_model", "license")
MODEL_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)


def check_origin(name: str, origin: Any) -> None:
    """Raises ValueError unless `origin` of the argument `name` is None, or says where one stage's weights are from."""
    if origin is None:
        return
    if not isinstance(origin, Mapping):
        raise bad_argument(name, origin, f"a dict of strings by name, of {', '.join(KEYS)}")
    for key, value in origin.items():
        check_choice(f"key of {name}", key, KEYS)
        if key == "license":
            check_choice(f"license of {name}", value, tuple(LICENSES))
        elif not (isinstance(value, str) and MODEL_ID.fullmatch(value)):
            raise bad_argument(f"base_model of {name}", value, "a Hub id like 'name/repository'")


def check_origins(name: str, origins: Any) -> None:
    """As `check_origin`, of a dict by stage name."""
    check_stage_names(name, origins)
    for stage, origin in (origins or {}).items():
        if origin is None:
            raise bad_argument(f"{name} of {stage}", origin, f"a dict of strings by name, of {', '.join(KEYS)}")
        check_origin(f"{name} of {stage}", origin)


def list_origins(origin: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Each stage's own, none of them empty, of a pipeline's `origin`: that of one stage, or a dict by stage name."""
    stages = [value for value in (origin or {}).values() if isinstance(value, Mapping)]
    return [dict(stage) for stage in (stages or [origin or {}]) if stage]


def licenses_of(origins: list[dict[str, str]]) -> list[License]:
    """The licenses of weights, the strictest first, each once."""
    keys = {origin.get("license") for origin in origins}
    return [license for key, license in LICENSES.items() if key in keys]


def card_metadata(origins: list[dict[str, str]]) -> dict[str, Any]:
    """Of a card of such weights: `base_model`, all of them, and the fields of the strictest license."""
    models = list(dict.fromkeys(origin["base_model"] for origin in origins if "base_model" in origin))
    on_hub = [model for model in models if "/" in model]  # the Hub refuses a card with others
    found = {"base_model": on_hub[0] if len(on_hub) == 1 else on_hub} if on_hub else {}
    return {**found, **next((license.fields for license in licenses_of(origins)), {})}


def license_section(origins: list[dict[str, str]]) -> str:
    """The section of a card that says whose the weights are, and what their licenses ask; empty where nothing is known."""
    if not origins:
        return ""
    lines = ["## License"]
    for origin in map(dict, dict.fromkeys(tuple(sorted(origin.items())) for origin in origins)):
        source = f"`{origin['base_model']}`" if "base_model" in origin else "weights of others"
        license = LICENSES.get(origin.get("license", ""))
        terms = "" if license is None else f", under the [{license.title}]({license.link})"
        lines.append(f"- Made from {source}{terms}.")
    for license in licenses_of(origins):
        lines += ["", license.notice, "", license.meaning]
    return "\n".join([lines[0], "", *lines[1:]]) + "\n"


@functools.cache
def warn_of_missing_filter(pipeline: str) -> None:
    """Says in the log, once for each class of pipelines, that one of DeepFloyd IF's weights has no safety checker."""
    logger.warning(
        f"This {pipeline} has weights of DeepFloyd IF, but no `safety_checker`: its images are not checked. IF's license "
        f"({DEEPFLOYD_LINK}) permits research alone and forbids to circumvent the filters: give the safety checker, the "
        "feature extractor and the watermarker of IF's repositories to whatever others see the images of."
    )
