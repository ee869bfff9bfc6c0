"""Registration with diffusers' loaders: runs on `import diffusers_imagen`, without importing diffusers.

diffusers has no plug-in mechanism. It looks up the classes of a saved pipeline in internal tables, which are not a
documented interface; the version range in setup.cfg and tests/test_register.py guard the changes made here. Modules of
diffusers that are not imported yet are changed on import.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from .utils.imports import after_import, lazy_names


if TYPE_CHECKING:
    from .models.interface import StageNetwork

PACKAGE = __package__
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


def register() -> None:
    """Add the package's models, schedulers and pipelines to diffusers' tables, now or when diffusers is imported."""
    after_import("diffusers", lambda module: add_names(module, COMPONENTS + PIPELINES))
    after_import("diffusers.pipelines", lambda module: add_names(module, PIPELINES))
    after_import("diffusers.pipelines.pipeline_loading_utils", add_loadable_classes)
    after_import("diffusers.pipelines.auto_pipeline", add_tasks)
    after_import("diffusers.pipelines.deepfloyd_if.safety_checker", add_tied_weights)


def add_names(module: ModuleType, names: tuple[str, ...]) -> None:
    """Make the package's classes attributes of a module of diffusers, except for names that the module defines itself.

    Each class is imported on first use. Python calls the `__getattr__` in a module's namespace before that of its
    class, which diffusers' modules define.
    """
    own = {*vars(module), *getattr(module, "__all__", ())}
    before = vars(module).get("__getattr__")
    get, _ = lazy_names(module.__name__, {PACKAGE: [name for name in names if name not in own]})

    def get_attribute(name: str) -> Any:
        try:
            return get(name)
        except AttributeError:
            if before is None:
                raise
            return before(name)

    vars(module)["__getattr__"] = get_attribute


def add_loadable_classes(module: Any) -> None:
    """Make saved pipelines refer to this package as the library of a class, instead of the module of the class."""
    methods = ["save_pretrained", "from_pretrained"]
    module.LOADABLE_CLASSES[PACKAGE] = dict.fromkeys(("ModelMixin", "SchedulerMixin", "PreTrainedModel"), methods)


def add_tasks(module: Any) -> None:
    """Add the pipelines to the tables of diffusers' AutoPipelines."""
    from .pipelines import ImagenCascadePipeline, ImagenPipeline

    for mapping in (
        module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        module.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        module.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        mapping["imagen-cascade"] = ImagenCascadePipeline
        mapping["imagen"] = ImagenPipeline


def add_tied_weights(module: Any) -> None:
    """Declare that DeepFloyd IF's safety checker has no tied weights, an attribute that transformers 5 requires."""
    if not hasattr(module.IFSafetyChecker, "all_tied_weights_keys"):
        module.IFSafetyChecker.all_tied_weights_keys = {}


def register_network(network_class: "type[StageNetwork]") -> None:
    """
    Register a network class of another architecture, so that the loaders find it by the class name in a configuration
    file.

    A class that is defined again, as in a notebook, replaces the class of the same module and name.
    Args:
        network_class: A subclass of `models.interface.StageNetwork` and diffusers' `ModelMixin`.

    Raises:
        ValueError: If it is not such a class, or diffusers has another class of this name.
    """
    import diffusers

    from .models.interface import StageNetwork

    if not isinstance(network_class, type) or not all(
        issubclass(network_class, base) for base in (StageNetwork, diffusers.ModelMixin)
    ):
        raise ValueError(
            f"`network_class` is {network_class!r}, but should be a class of StageNetwork and ModelMixin."
        )
    name = network_class.__name__
    known = getattr(diffusers, name, network_class)
    if any(getattr(known, part, None) != getattr(network_class, part) for part in ("__module__", "__qualname__")):
        raise ValueError(f"`network_class` is {name}, but diffusers has another class of that name.")
    setattr(diffusers, name, network_class)
