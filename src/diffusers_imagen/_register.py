"""Makes diffusers find this package's classes: runs on `import diffusers_imagen`.

diffusers has no plug-in mechanism. It looks up the classes of a saved pipeline in tables of its own, which are no
documented interface; the version range in setup.cfg and tests/test_register.py guard what is changed here.
"""

import sys
from types import ModuleType

import diffusers
from diffusers import ModelMixin, SchedulerMixin, pipelines
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
from transformers import PreTrainedModel

from .models.interface import StageNetwork
from .pipelines.adapted_network import AdaptedNetwork
from .text.reference import ReferencedTextEncoder


COMPONENTS = (
    "ImagenUNetModel",
    "EfficientUNetModel",
    "ContinuousDDPMScheduler",
    "EDMAdamsScheduler",
    "EDMHeunScheduler",
    "AdaptedNetwork",
    "ReferencedTextEncoder",
)
PIPELINES = ("ImagenCascadePipeline", "ImagenPipeline", "ImagenSuperResolutionPipeline")


def register(package: ModuleType) -> None:
    """Enters the package's models, schedulers and pipelines into diffusers' tables."""
    # the loader asks the package itself for the base classes that LOADABLE_CLASSES names
    vars(package).update(ModelMixin=ModelMixin, SchedulerMixin=SchedulerMixin, PreTrainedModel=PreTrainedModel)
    vars(package).update(AdaptedNetwork=AdaptedNetwork, ReferencedTextEncoder=ReferencedTextEncoder)
    pipeline_loading_utils.LOADABLE_CLASSES[package.__name__] = {
        "ModelMixin": ["save_pretrained", "from_pretrained"],
        "SchedulerMixin": ["save_pretrained", "from_pretrained"],
        "PreTrainedModel": ["save_pretrained", "from_pretrained"],
    }
    for name in COMPONENTS + PIPELINES:
        if not hasattr(diffusers, name):
            setattr(diffusers, name, getattr(package, name))
    # transformers 5 asks every model that it loads which weights are tied; diffusers' checker, which has none, does not say
    if not hasattr(IFSafetyChecker, "all_tied_weights_keys"):
        IFSafetyChecker.all_tied_weights_keys = {}
    for name in PIPELINES:
        setattr(pipelines, name, getattr(package, name))
    for mapping in (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        mapping["imagen-cascade"] = package.ImagenCascadePipeline
        mapping["imagen"] = package.ImagenPipeline


def register_network(network_class: type[StageNetwork]) -> None:
    """Make the loaders find a network of another family by the name that its configuration file says.

    A class that is defined again, as in a notebook, takes the place of the one of the same module and name.

    Args:
        network_class: A subclass of `models.interface.StageNetwork` and diffusers' `ModelMixin`.

    Raises:
        ValueError: If it is no such class, or diffusers has another class of its name.
    """
    if not isinstance(network_class, type) or not all(
        issubclass(network_class, base) for base in (StageNetwork, ModelMixin)
    ):
        raise ValueError(
            f"`network_class` is {network_class!r}, but should be a class of StageNetwork and ModelMixin."
        )
    name = network_class.__name__
    known = getattr(diffusers, name, network_class)
    if any(getattr(known, part, None) != getattr(network_class, part) for part in ("__module__", "__qualname__")):
        raise ValueError(f"`network_class` is {name}, but diffusers has another class of that name.")
    setattr(diffusers, name, network_class)


register(sys.modules[__package__])
