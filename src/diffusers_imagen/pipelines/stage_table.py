"""The table of stages: all that pipelines, commands and the web demo know of a stage by its name."""

from typing import NamedTuple


class StageKind(NamedTuple):
    """A stage that a cascade can have: its place in the cascade, and the defaults of a call."""

    name: str  # of the components `{name}_unet` and `{name}_scheduler`, and in arguments by stage
    title: str
    resolution: int  # of the published network, in pixels; a pipeline asks its own network
    takes_low_res: bool  # whether a network in this place enlarges the images of the stage before
    num_inference_steps: int
    guidance_scale: float

    @property
    def unet(self) -> str:
        """The component that is the stage's network."""
        return f"{self.name}_unet"

    @property
    def scheduler(self) -> str:
        """The component that is its scheduler."""
        return f"{self.name}_scheduler"


# the low-resolution image leaves little to decide: super-resolution needs few steps and no guidance
STAGES = (
    StageKind("base", "Base", 64, False, num_inference_steps=18, guidance_scale=4.0),
    StageKind("sr256", "Super-resolution", 256, True, num_inference_steps=8, guidance_scale=1.0),
    StageKind("sr1024", "Super-resolution", 1024, True, num_inference_steps=8, guidance_scale=1.0),
)
BASE, FIRST_UPSCALER = STAGES[0], STAGES[1]
DEFAULT_STEPS = {kind.name: kind.num_inference_steps for kind in STAGES}
DEFAULT_GUIDANCE = {kind.name: kind.guidance_scale for kind in STAGES}
# the networks of the pipelines of a single stage, and of a cascade
NETWORKS = ("unet", *(kind.unet for kind in STAGES))


def upscaler_of(resolution: int) -> StageKind:
    """The stage as which a cascade would have a super-resolution network of this resolution."""
    upscalers = [kind for kind in STAGES if kind.takes_low_res]
    return next((kind for kind in upscalers if resolution <= kind.resolution), upscalers[-1])
