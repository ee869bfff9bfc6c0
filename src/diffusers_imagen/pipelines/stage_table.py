"""Table of stages: names, components, resolutions and defaults, for pipelines, commands and the web demo."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..utils.arguments import as_integer, as_number, bad_argument, check_choice, shown
from ..utils.bounds import MAX_GUIDANCE, MAX_NOISE_LEVEL, MAX_STEPS, MIN_AUGMENTATION_SIGMA


class CallDefaults(NamedTuple):
    """Default arguments of a stage's call; see the pipelines' arguments of the same names."""

    num_inference_steps: int
    guidance_scale: float
    low_res_noise_level: float = 0.1

    def updated(self, name: str, given: Mapping[str, Any] | None) -> "CallDefaults":
        """Return these defaults with the values in a configuration, which is the argument `name`.

        Raises:
            ValueError: If it has other keys, or a value that is out of range.
        """
        if given is None:
            return self
        if not isinstance(given, Mapping):
            raise bad_argument(name, given, f"a dict of values by name, of {', '.join(self._fields)}")
        for key in given:
            check_choice(f"key of {name}", key, self._fields)
        values = {**self._asdict(), **given}
        return CallDefaults(
            as_integer("num_inference_steps", values["num_inference_steps"], 1, MAX_STEPS),
            as_number("guidance_scale", values["guidance_scale"], 0.0, MAX_GUIDANCE),
            as_number("low_res_noise_level", values["low_res_noise_level"], MIN_AUGMENTATION_SIGMA, MAX_NOISE_LEVEL),
        )


class StageKind(NamedTuple):
    """Kind of stage in a cascade: its position, and the defaults of a call."""

    name: str  # of the components `{name}_unet` and `{name}_scheduler`, and in arguments by stage
    title: str
    resolution: int  # of the published network, in pixels; a pipeline uses the resolution of its own network
    takes_low_res: bool  # whether the network upscales the images of the previous stage
    defaults: CallDefaults  # of a stage whose pipeline has no others in its configuration

    @property
    def unet(self) -> str:
        """Name of the component with the stage's network."""
        return f"{self.name}_unet"

    @property
    def scheduler(self) -> str:
        """Name of the component with the stage's scheduler."""
        return f"{self.name}_scheduler"


# the low-resolution image determines most of the result: super-resolution needs few steps and no guidance
UPSCALING = CallDefaults(num_inference_steps=8, guidance_scale=1.0)
STAGES = (
    StageKind("base", "Base", 64, False, CallDefaults(num_inference_steps=18, guidance_scale=4.0)),
    StageKind("sr256", "Super-resolution", 256, True, UPSCALING),
    StageKind("sr1024", "Super-resolution", 1024, True, UPSCALING),
)
BASE = STAGES[0]
STAGE_NAMES = tuple(kind.name for kind in STAGES)
DEFAULT_STRENGTH = 0.7  # how much the base stage changes an image; the default of DeepFloyd IF
# For base and super-resolution stages; Adams calls the network once per step, Heun twice. Figures in docs/deepfloyd.md.
MOST_STEPS = {"adams": (31, 18), "heun": (18, 9)}
# the networks of the pipelines of a single stage, and of a cascade
NETWORKS = ("unet", *(kind.unet for kind in STAGES))
TEXT_PARTS = ("tokenizer", "text_encoder")  # components of all pipelines that are conditioned on text
# components of all pipelines that process the final images, and are published with DeepFloyd IF's weights
SAFETY_PARTS = ("safety_checker", "feature_extractor", "watermarker")

# advice in error messages for users of the Python package; the command line replaces it with its own
AS_UPSCALER = "pass it to ImagenCascadePipeline as an upscaler, or open it with ImagenSuperResolutionPipeline"
AS_BASE = "pass it to ImagenCascadePipeline as `base`, or open it with ImagenPipeline"
AS_STAGES = "ImagenCascadePipeline.from_stages composes single stages, and from_pretrained opens each of them"


def most_steps(solver: str, takes_low_res: bool) -> int:
    """Return the default maximum number of a stage's steps with a solver that replaces an ancestral sampler."""
    base, upscaling = MOST_STEPS[solver]
    return upscaling if takes_low_res else base


def check_stage_names(name: str, value: Any, known: Collection[str] = STAGE_NAMES) -> None:
    """Raise ValueError unless `value`, of the argument `name`, is None or a dict by stage name, of those in `known`."""
    if value is not None and not isinstance(value, Mapping):
        raise bad_argument(name, value, f"a dict by stage name, of {', '.join(known)}")
    unknown = [key for key in value or () if key not in known]
    if unknown:
        raise ValueError(f"`{name}` has {shown(unknown)}, but should have stage names among {list(known)}.")


def upscaler_of(resolution: int) -> StageKind:
    """Return the stage of a cascade for a super-resolution network of this resolution."""
    upscalers = [kind for kind in STAGES if kind.takes_low_res]
    return next((kind for kind in upscalers if resolution <= kind.resolution), upscalers[-1])
