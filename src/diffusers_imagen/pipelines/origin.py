"""Origin and license of weights: checks, and their description in model cards.

A pipeline's configuration has its `origin`: a dict with `base_model`, a Hub id, and `license`, a key of `LICENSES`;
for a cascade, a dict of these by stage name. Copies and fine-tuned weights keep it.
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
    """License of published weights, as named in a model card."""

    title: str
    link: str
    fields: dict[str, str]  # of the card's metadata
    notice: str  # required in copies and derivatives, verbatim
    meaning: str  # summary


DEEPFLOYD = "deepfloyd"
DEEPFLOYD_LINK = "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license"
# the strictest first: with several licenses, a card names the strictest
LICENSES = {
    DEEPFLOYD: License(
        "DeepFloyd IF License",
        DEEPFLOYD_LINK,
        {"license": "other", "license_name": "deepfloyd-if-license", "license_link": DEEPFLOYD_LINK},
        "DeepFloyd is licensed under the DeepFloyd License, Copyright (c) Stability AI Ltd. All Rights Reserved.",
        "The weights, and everything that they generate, are for non-commercial research. Copies and derivatives, "
        "including fine-tuned weights and adapters, are under the same license, and must include it and the line "
        "above. The safety checker and the watermark are protections that must not be circumvented.",
    ),
    "karlo": License(
        "CreativeML OpenRAIL-M",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
        {"license": "creativeml-openrail-m"},
        "Karlo's weights are licensed under the CreativeML OpenRAIL-M license.",
        "They may be used, changed and distributed, also commercially, but not for the uses listed in attachment A of "
        "the license. Copies and derivatives, including fine-tuned weights and adapters, must include the license and "
        "these restrictions.",
    ),
}  # fmt: skip
KEYS = ("base_model", "license")
MODEL_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)


def check_origin(name: str, origin: Any) -> None:
    """Raise ValueError unless `origin`, of the argument `name`, is None or the origin of one stage's weights."""
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
    """Check a dict of origins by stage name; see `check_origin`."""
    check_stage_names(name, origins)
    for stage, origin in (origins or {}).items():
        if origin is None:
            raise bad_argument(f"{name} of {stage}", origin, f"a dict of strings by name, of {', '.join(KEYS)}")
        check_origin(f"{name} of {stage}", origin)


def list_origins(origin: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """
    Return the non-empty origins of the stages of a pipeline's `origin`: that of one stage, or a dict by stage name.
    """
    stages = [value for value in (origin or {}).values() if isinstance(value, Mapping)]
    return [dict(stage) for stage in (stages or [origin or {}]) if stage]


def licenses_of(origins: list[dict[str, str]]) -> list[License]:
    """Return the licenses of weights, the strictest first, without duplicates."""
    keys = {origin.get("license") for origin in origins}
    return [license for key, license in LICENSES.items() if key in keys]


def card_metadata(origins: list[dict[str, str]]) -> dict[str, Any]:
    """
    Return the metadata of a card for such weights: `base_model`, all of them, and the fields of the strictest license.
    """
    models = list(dict.fromkeys(origin["base_model"] for origin in origins if "base_model" in origin))
    on_hub = [model for model in models if "/" in model]  # the Hub rejects a card with others
    found = {"base_model": on_hub[0] if len(on_hub) == 1 else on_hub} if on_hub else {}
    return {**found, **next((license.fields for license in licenses_of(origins)), {})}


def license_section(origins: list[dict[str, str]]) -> str:
    """
    Return the section of a card with the origin of the weights and the terms of their licenses; empty if unknown.
    """
    if not origins:
        return ""
    lines = ["## License"]
    for origin in map(dict, dict.fromkeys(tuple(sorted(origin.items())) for origin in origins)):
        source = f"`{origin['base_model']}`" if "base_model" in origin else "published weights"
        license = LICENSES.get(origin.get("license", ""))
        terms = "" if license is None else f", under the [{license.title}]({license.link})"
        lines.append(f"- Made from {source}{terms}.")
    for license in licenses_of(origins):
        lines += ["", license.notice, "", license.meaning]
    return "\n".join([lines[0], "", *lines[1:]]) + "\n"


@functools.cache
def warn_of_missing_filter(pipeline: str) -> None:
    """Log, once per pipeline class, that a pipeline with weights of DeepFloyd IF has no safety checker."""
    logger.warning(
        f"This {pipeline} has weights of DeepFloyd IF, but no `safety_checker`: its images are not checked. IF's "
        f"license ({DEEPFLOYD_LINK}) permits only research and forbids circumventing the filters: use the safety "
        "checker, the feature extractor and the watermarker of IF's repositories if images are shown to others."
    )
