"""Makes diffusers find this package's classes: runs on `import diffusers_imagen`, which imports no diffusers for it.

diffusers has no plug-in mechanism. It looks up the classes of a saved pipeline in tables of its own, which are no
documented interface; the version range in setup.cfg and tests/test_register.py guard what is changed here. A module of
diffusers that is not imported yet is changed when somebody imports it.
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
    """Enter the package's models, schedulers and pipelines into diffusers' tables, now or when diffusers is imported."""
    after_import("diffusers", lambda module: add_names(module, COMPONENTS + PIPELINES))
    after_import("diffusers.pipelines", lambda module: add_names(module, PIPELINES))
    after_import("diffusers.pipelines.pipeline_loading_utils", add_loadable_classes)
    after_import("diffusers.pipelines.auto_pipeline", add_tasks)
    after_import("diffusers.pipelines.deepfloyd_if.safety_checker", add_tied_weights)


def add_names(module: ModuleType, names: tuple[str, ...]) -> None:
    """Make the package's classes attributes of a module of diffusers, but for those that it has itself.

    Each is imported when it is used. Python asks the `__getattr__` in a module's namespace before that of its class, which
    diffusers' modules have.
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
    """Make a saved pipeline name this package, and not the module of a class, as where it is found."""
    methods = ["save_pretrained", "from_pretrained"]
    module.LOADABLE_CLASSES[PACKAGE] = dict.fromkeys(("ModelMixin", "SchedulerMixin", "PreTrainedModel"), methods)


def add_tasks(module: Any) -> None:
    """Make diffusers' AutoPipelines find the pipelines."""
    from .pipelines import ImagenCascadePipeline, ImagenPipeline

    for mapping in (
        module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        module.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        module.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        mapping["imagen-cascade"] = ImagenCascadePipeline
        mapping["imagen"] = ImagenPipeline


def add_tied_weights(module: Any) -> None:
    """Say for DeepFloyd IF's safety checker which weights are tied, which transformers 5 asks every model: none."""
    if not hasattr(module.IFSafetyChecker, "all_tied_weights_keys"):
        module.IFSafetyChecker.all_tied_weights_keys = {}


def register_network(network_class: "type[StageNetwork]") -> None:
    """Make the loaders find a network of another family by the name that its configuration file says.

    A class that is defined again, as in a notebook, takes the place of the one of the same module and name.

    Args:
        network_class: A subclass of `models.interface.StageNetwork` and diffusers' `ModelMixin`.

    Raises:
        ValueError: If it is no such class, or diffusers has another class of its name.
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
