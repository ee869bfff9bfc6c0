"""Conversion of diffusers' scheduler configurations to those of this package."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..utils.arguments import bad_argument


NO_BETAS = (
    "none: EDM noise levels"  # the `beta_schedule` of EDM networks, which makes discrete schedulers raise an error
)

# required values of entries, if present, because this package supports no others
EDM_MEANINGS = {"sigma_schedule": "karras", "final_sigmas_type": "zero"}
DISCRETE_MEANINGS = {"rescale_betas_zero_snr": False, "use_flow_sigmas": False, "timestep_type": "discrete"}


def read_config(config: Mapping[str, Any], reader: str) -> dict[str, Any]:
    """Convert a configuration of this package's or diffusers' schedulers for the class named `reader`.

    Entries that describe the network are kept; entries that describe how another scheduler samples are kept for
    converting back. `variance_type` is dropped: no scheduler of this package uses a learned variance.

    Raises:
        ValueError: for a value that this package does not support, as listed in `EDM_MEANINGS` and
            `DISCRETE_MEANINGS`.
    """
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    if "preconditioning" not in config:  # not a configuration of this package
        config = {**_default_values(config.get("_class_name")), **config}
    if config.get("beta_schedule") == NO_BETAS:
        del config["beta_schedule"]
    discrete = "preconditioning" not in config and is_discrete(config)
    for key, expected in {**EDM_MEANINGS, **(DISCRETE_MEANINGS if discrete else {})}.items():
        if config.get(key, expected) != expected:
            raise bad_argument(key, config[key], f"{expected!r} in a configuration for {reader}")
    if discrete:
        config = {"preconditioning": "discrete", "clip_sample": False, **config}
        # in diffusers, None means the noise levels of the betas
        without = {"variance_type", *(key for key in ("sigma_min", "sigma_max") if config.get(key) is None)}
        if config.get("lambda_min_clipped") == -math.inf:  # the default; JSON has no infinity
            without.add("lambda_min_clipped")
        return {key: value for key, value in config.items() if key not in without}
    if "sigma_schedule" in config:  # diffusers' EDM schedulers, which lack these entries
        return {"preconditioning": "edm", "clip_sample": False, **config}
    return config


def is_discrete(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration, of this package or of diffusers, is for a network with discrete betas."""
    # UnCLIPScheduler has betas without a start and an end
    has_betas = "beta_start" in config or config.get("beta_schedule", NO_BETAS) != NO_BETAS
    return config.get("preconditioning", "discrete" if has_betas else None) == "discrete"


def _default_values(class_name: Any) -> dict[str, Any]:
    """Return the defaults of a diffusers scheduler, which configurations saved by earlier versions may lack."""
    source = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (isinstance(source, type) and issubclass(source, SchedulerMixin)):
        return {}
    parameters = inspect.signature(source).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
