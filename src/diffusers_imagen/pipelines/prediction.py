"""Prediction of a stage at one noise level: guidance, tiles and slices around calls of its network."""

import functools
from typing import Any, NamedTuple

import torch

from ..diffusion.guidance import classifier_free_guidance, rescale_guidance
from ..models.interface import StageNetwork
from ..utils.modules import is_compiled
from .finite import FiniteWatch
from .planning import StagePlan
from .prompts import Branch, PromptEmbeds
from .schedules import reads_variance
from .slicing import SliceSize, make_slices, size_of_stage
from .tiling import Tile, Tiling, blend, make_tiles


class Latents(NamedTuple):
    """Initial tensors of a stage."""

    sample: torch.Tensor  # (B, C, H, W), noise at the first noise level, added to an image if there is one
    low_res: torch.Tensor | None = None  # (B, C, H, W), upsampled
    low_res_timestep: torch.Tensor | None = None  # (B,), the conditioning value of its noise level


class GuidedPrediction:
    """
    The guided output of a stage's network, `(B, C, H, W)` in float32, or `(B, 2 C, H, W)` with a predicted variance.

    Guidance applies to the prediction; the variance, for schedulers that use it, is that of the conditional branch.
    """

    def __init__(
        self,
        plan: StagePlan,
        text: PromptEmbeds,
        latents: Latents,
        watch: FiniteWatch,
        tiling: Tiling | None,
        slice_size: SliceSize,
    ):
        self.rescale, self.watch = plan.settings.guidance_rescale, watch
        self.channels, self.keeps_variance = plan.stage.unet.in_channels, reads_variance(plan.scheduler)
        tiling = None if latents.low_res is None else tiling
        tiles = None if tiling is None else make_tiles(*plan.size, tiling, latents.sample.device)
        at_once = size_of_stage(slice_size, plan.stage.name, *plan.size, tiling)
        slices = make_slices(len(latents.sample), at_once)
        bind = functools.partial(BoundNetwork, text=text, latents=latents, slices=slices, tiles=tiles)
        self.network = bind(plan.stage.unet)
        # a weaker network instead of the unconditional branch: Karras et al. 2024, arXiv 2406.02507
        self.guide = bind(plan.stage.guidance_unet) if plan.stage.guidance_unet is not None else None
        self.guide_branch: Branch = "unconditional" if text.negative_given else "conditional"
        self.bind_text(plan)

    def bind_text(self, plan: StagePlan) -> None:
        """Encode the text for all calls before the first: `encode_text` may synchronize the device."""
        guided = [call.guided and plan.settings.guidance_scale != 1.0 for call in plan.calls]
        if self.guide is not None or not all(guided):
            self.network.bind_all("conditional")
        if any(guided):
            self.network.bind_all("both") if self.guide is None else self.guide.bind_all(self.guide_branch)

    def __call__(self, model_input: torch.Tensor, timestep: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the prediction at a noise level, guided unless the guidance scale is 1."""
        guided = scale != 1.0
        if not guided or self.guide is not None:
            (conditional,) = self.network(model_input, timestep, "conditional")
        else:
            unconditional, conditional = self.network(model_input, timestep, "both")
            self.watch.see("unet", unconditional)
        self.watch.see("unet", conditional)
        conditional, variance = conditional[:, : self.channels], conditional[:, self.channels :]
        if not guided:
            return self.with_variance(conditional, variance)
        if self.guide is not None:
            (unconditional,) = self.guide(model_input, timestep, self.guide_branch)
            self.watch.see("guidance_unet", unconditional)
        output = classifier_free_guidance(conditional, unconditional[:, : self.channels], scale)
        output = rescale_guidance(output, conditional, self.rescale) if self.rescale > 0 else output
        self.watch.see(f"guidance with the scale {scale:g} and the rescale {self.rescale:g} overflows", output)
        return self.with_variance(output, variance)

    def with_variance(self, prediction: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Append the variance to the prediction if the scheduler's step uses it."""
        return torch.cat([prediction, variance], dim=1) if self.keeps_variance else prediction


class BoundInputs(NamedTuple):
    """Inputs of a network for some images that are the same at all steps."""

    text: Any  # the result of the network's `encode_text`
    low_res: torch.Tensor | None
    low_res_timestep: torch.Tensor | None


class BoundNetwork:
    """A network with its text and low-resolution image, called on slices of the batch and on tiles."""

    def __init__(
        self,
        unet: StageNetwork,
        text: PromptEmbeds,
        latents: Latents,
        slices: list[slice],
        tiles: list[Tile] | None,
    ):
        self.unet, self.text, self.latents, self.slices, self.tiles = unet, text, latents, slices, tiles
        self.bound: dict[tuple[int, Branch], BoundInputs] = {}
        self.version = text.version
        self.is_compiled = latents.sample.device.type == "cuda" and is_compiled(unet)

    def __call__(self, model_input: torch.Tensor, timestep: torch.Tensor, branch: Branch) -> list[torch.Tensor]:
        """
        Return the outputs `(B, C, H, W)` in float32 of one branch, or of the unconditional and the conditional one.
        """
        branches = 2 if branch == "both" else 1
        model_input = model_input.to(self.unet.dtype)
        parts = []
        for images in self.slices:
            x = model_input[images]
            x = torch.cat([x, x]) if branches == 2 else x
            parts.append(self.predict(x, timestep, self.bind(images, branch)).chunk(branches))
        return [torch.cat(outputs) if len(outputs) > 1 else outputs[0] for outputs in zip(*parts)]

    def bind_all(self, branch: Branch) -> None:
        """Compute the inputs that a branch's calls have in common."""
        for images in self.slices:
            self.bind(images, branch)

    def bind(self, images: slice, branch: Branch) -> BoundInputs:
        """Return the inputs that are the same at all steps, until a callback changes the text."""
        if self.version != self.text.version:  # a callback changed the text
            self.bound, self.version = {}, self.text.version
        key = (images.start, branch)
        if key not in self.bound:
            low_res, timestep = self.latents.low_res, self.latents.low_res_timestep
            low_res = None if low_res is None else low_res[images].to(self.unet.dtype)
            timestep = None if timestep is None else timestep[images]
            if branch == "both":  # both branches have the same low-resolution image
                low_res, timestep = (None if t is None else torch.cat([t, t]) for t in (low_res, timestep))
            self.bound[key] = BoundInputs(self.text.encode_for(self.unet, branch, images), low_res, timestep)
        return self.bound[key]

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, inputs: BoundInputs) -> torch.Tensor:
        """Return the network's output, blended from those of the tiles if there are any."""
        low_res = inputs.low_res
        if self.tiles is None or low_res is None:
            return self.call(x, timestep, inputs, low_res)
        parts = ((x[..., t.rows, t.columns], low_res[..., t.rows, t.columns]) for t in self.tiles)
        return blend((self.call(tile, timestep, inputs, low_res) for tile, low_res in parts), self.tiles, like=x)

    def call(
        self, x: torch.Tensor, timestep: torch.Tensor, inputs: BoundInputs, low_res: torch.Tensor | None
    ) -> torch.Tensor:
        """Call the network; return its output in float32, as a copy, because CUDA graphs reuse their memory."""
        if self.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()
        output = self.unet(
            x,
            timestep,
            inputs.text,
            low_res_sample=low_res,
            low_res_timestep=inputs.low_res_timestep,
            return_dict=False,
        )[0]
        return output.to(torch.float32, copy=True)
