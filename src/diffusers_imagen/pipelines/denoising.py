"""The reverse process of one stage: from noise to images, with guidance, kept pixels, tiles and slices."""

import copy
import functools
import inspect
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion.guidance import classifier_free_guidance, rescale_guidance
from ..models.embeddings import TextConditioning
from .callbacks import StepCallback
from .finite import FiniteWatch
from .planning import Generators, NoiseLevel, Request, StagePlan
from .prompts import Branch, TextStates
from .schedules import begin_at
from .stages import UNet
from .tiling import Tile, blend, make_tiles


class Latents(NamedTuple):
    """What a stage starts from."""

    sample: torch.Tensor  # (B, C, H, W), noise of the first level, over an image if there is one
    low_res: torch.Tensor | None = None  # (B, C, H, W), upsampled
    low_res_timestep: torch.Tensor | None = None  # (B,), its noise level as the network is told it


class KnownPixels(NamedTuple):
    """Pixels that inpainting keeps."""

    image: torch.Tensor  # (B, C, H, W) in [-1, 1]
    repainted: torch.Tensor  # (B, 1, H, W), True where the image is painted anew

    def put_into(self, sample: torch.Tensor, level: NoiseLevel, generators: Generators) -> torch.Tensor:
        """The sample with the known pixels as they are at its noise level: the original and fresh noise."""
        known = self.image * level.signal
        if level.noise > 0:
            known = known + level.noise * randn_tensor(sample.shape, generators, sample.device, sample.dtype)
        return torch.where(self.repainted, sample, known)


def run_stages(pipe: DiffusionPipeline, request: Request, text: TextStates) -> dict[int, torch.Tensor]:
    """The stages one after the other, each on what the one before it made: images in [-1, 1] by resolution.

    Raises:
        FloatingPointError: If a stage makes values that are not finite; the stages after it do not run.
    """
    plans = request.plans
    callback = StepCallback(pipe, request.callback)
    pipe._interrupt = False
    pipe._num_timesteps = sum(len(plan.calls) for plan in plans)
    image, added = None, 0.0
    if plans[0].low_res_size is not None:
        image = request.given.resized(plans[0].low_res_size, request.num_images, pipe._execution_device)
    images = {}
    for plan in plans:
        if pipe.interrupt and images:
            break
        # a callback changes the guidance of the stage that runs, and no other's
        pipe._guidance_scale = asked = plan.settings.guidance_scale
        latents = pipe.prepare_latents(plan, image, request)
        image = denoise(pipe, plan, latents, text, request.generators, callback, pipe.prepare_known(plan, request))
        images[plan.stage.resolution] = image
        added += pipe._guidance_scale - asked
        if pipe._guidance_scale != asked:  # for after the call: what was added, step by step, in all stages
            pipe._guidance_scale = asked + added
    return images


def denoise(
    pipe: DiffusionPipeline,
    plan: StagePlan,
    latents: Latents,
    text: TextStates,
    generators: Generators,
    callback: StepCallback,
    known: KnownPixels | None = None,
) -> torch.Tensor:
    """The reverse process of one stage, to images `(B, C, H, W)` in [-1, 1].

    The sample stays in float32 whatever the network's dtype: bf16 cannot hold a low noise level beside an image.

    Raises:
        FloatingPointError: If the network, its guidance, the scheduler or a callback made values that are not finite.
    """
    scheduler = plan.scheduler
    untouched = copy.deepcopy(scheduler) if any(call.back_to is not None for call in plan.calls) else None
    begin_at(scheduler, plan.begins)
    watch = FiniteWatch(plan)
    predict = GuidedPrediction(pipe, plan, text, latents, watch)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": generators} if takes_generator else {}
    sample = latents.sample
    if known is not None:
        sample = known.put_into(sample, plan.levels[plan.begins], generators)
    watch.see("the noise and the image that it starts from are not", sample)
    with pipe.progress_bar(total=len(plan.calls)) as progress:
        progress.set_description(f"{plan.stage.name} {plan.stage.resolution} px")
        for call in plan.calls:
            if pipe.interrupt:
                break
            watch.call += 1
            timestep = scheduler.timesteps[call.index]
            output = predict(scheduler.scale_model_input(sample, timestep), timestep, call.guided)
            sample = scheduler.step(output, timestep, sample, **step_kwargs, return_dict=False)[0]
            if known is not None and call.level_after is not None:
                sample = known.put_into(sample, call.level_after, generators)
            if call.back_to is not None:
                sample = add_more_noise(sample, call.level_after, plan.levels[call.back_to], generators)
                scheduler = copy.deepcopy(untouched)  # without the history of the step that is done again
                begin_at(scheduler, call.back_to)
            watch.see(f"the step of its {type(scheduler).__name__} overflows", sample)
            if callback.function is not None:
                sample = callback(timestep, sample, text)
                watch.see("`callback_on_step_end` returned such `latents`", sample)
            progress.update()
    watch.raise_unless_finite(text)  # before the clamp, which makes finite numbers of infinite ones
    return sample.clamp(-1, 1)


def add_more_noise(
    sample: torch.Tensor, level: NoiseLevel, higher: NoiseLevel, generators: Generators
) -> torch.Tensor:
    """The forward process between two noise levels, the jump back of RePaint (arXiv 2201.09865, algorithm 1)."""
    factor = higher.signal / level.signal
    std = max(higher.noise**2 - (factor * level.noise) ** 2, 0.0) ** 0.5
    return factor * sample + std * randn_tensor(sample.shape, generators, sample.device, sample.dtype)


class GuidedPrediction:
    """The guided output of a stage's network, `(B, C, H, W)` in float32.

    The guidance scale is read from the pipeline at every call, because a callback may change it.
    """

    def __init__(
        self, pipe: DiffusionPipeline, plan: StagePlan, text: TextStates, latents: Latents, watch: FiniteWatch
    ):
        self.pipe, self.rescale, self.watch = pipe, plan.settings.guidance_rescale, watch
        tiles = None
        if pipe.tiling is not None and latents.low_res is not None:
            tiles = make_tiles(*plan.size, pipe.tiling, latents.sample.device)
        bind = functools.partial(BoundNetwork, text=text, latents=latents, slice_size=pipe.slice_size, tiles=tiles)
        self.network = bind(plan.stage.unet)
        # in place of the unconditional branch, a weaker network: Karras et al. 2024, arXiv 2406.02507
        self.guide = bind(plan.stage.guidance_unet) if plan.stage.guidance_unet is not None else None
        self.guide_branch = "unconditional" if text.negative_given else "conditional"

    def __call__(self, model_input: torch.Tensor, timestep: torch.Tensor, guided: bool) -> torch.Tensor:
        scale = self.pipe.guidance_scale
        guided = guided and scale != 1.0
        if not guided or self.guide is not None:
            (conditional,) = self.network(model_input, timestep, "conditional")
        else:
            unconditional, conditional = self.network(model_input, timestep, "both")
            self.watch.see("unet", unconditional)
        self.watch.see("unet", conditional)
        if not guided:
            return conditional
        if self.guide is not None:
            (unconditional,) = self.guide(model_input, timestep, self.guide_branch)
            self.watch.see("guidance_unet", unconditional)
        output = classifier_free_guidance(conditional, unconditional, scale)
        output = rescale_guidance(output, conditional, self.rescale) if self.rescale > 0 else output
        self.watch.see(f"guidance with the scale {scale:g} and the rescale {self.rescale:g} overflows", output)
        return output


class BoundInputs(NamedTuple):
    """What some images' calls of a network have in common at all steps."""

    text: TextConditioning | None
    low_res: torch.Tensor | None
    low_res_timestep: torch.Tensor | None


class BoundNetwork:
    """A network with its text and its low-resolution image, called on some images and some tiles at a time."""

    def __init__(
        self, unet: UNet, text: TextStates, latents: Latents, slice_size: int | None, tiles: list[Tile] | None
    ):
        self.unet, self.text, self.latents, self.tiles = unet, text, latents, tiles
        num_images = len(latents.sample)
        size = slice_size or num_images
        self.slices = [slice(start, start + size) for start in range(0, num_images, size)]
        self.bound: dict[tuple[int, Branch, int], BoundInputs] = {}

    def __call__(self, model_input: torch.Tensor, timestep: torch.Tensor, branch: Branch) -> list[torch.Tensor]:
        """The outputs `(B, C, H, W)` in float32 of one branch, or of the unconditional and then the conditional one."""
        branches = 2 if branch == "both" else 1
        model_input = model_input.to(self.unet.dtype)
        parts = []
        for images in self.slices:
            x = model_input[images]
            x = torch.cat([x, x]) if branches == 2 else x
            parts.append(self.predict(x, timestep, self.bind(images, branch)).chunk(branches))
        return [torch.cat(outputs) if len(outputs) > 1 else outputs[0] for outputs in zip(*parts)]

    def bind(self, images: slice, branch: Branch) -> BoundInputs:
        """What is constant over the steps, made at the first one."""
        key = (images.start, branch, self.text.version)
        if key not in self.bound:
            low_res, level = self.latents.low_res, self.latents.low_res_timestep
            low_res = None if low_res is None else low_res[images].to(self.unet.dtype)
            level = None if level is None else level[images]
            if branch == "both":  # both branches see one low-resolution image
                low_res, level = (None if t is None else torch.cat([t, t]) for t in (low_res, level))
            self.bound[key] = BoundInputs(self.text.encode_for(self.unet, branch, images), low_res, level)
        return self.bound[key]

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, inputs: BoundInputs) -> torch.Tensor:
        """The network's output, blended from that of the tiles if there are any."""
        if self.tiles is None:
            return self.call(x, timestep, inputs, inputs.low_res)
        parts = ((x[..., t.rows, t.columns], inputs.low_res[..., t.rows, t.columns]) for t in self.tiles)
        return blend((self.call(tile, timestep, inputs, low_res) for tile, low_res in parts), self.tiles, like=x)

    def call(
        self, x: torch.Tensor, timestep: torch.Tensor, inputs: BoundInputs, low_res: torch.Tensor | None
    ) -> torch.Tensor:
        """One call of the network."""
        return self.unet(
            x,
            timestep,
            inputs.text,
            low_res_sample=low_res,
            low_res_timestep=inputs.low_res_timestep,
            return_dict=False,
        )[0].float()
