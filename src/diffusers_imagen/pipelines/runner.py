"""Runner of a pipeline call, in order from its arguments to its images. Next, read `prediction.py`."""

import copy
import inspect
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion.augmentation import (
    augment_low_res,
    augment_upsampled,
    upsample_before_noise,
    upsample_low_res,
)
from ..diffusion.residual import SampleSpace
from ..utils.arguments import as_integer, as_number, check_choice
from . import inputs
from .call_arguments import CallArguments
from .callbacks import PREDICTED, Callback, check_callback, read_changes, read_scale
from .content_filter import check_filter, finish_images
from .finite import FiniteWatch
from .image_inputs import GivenImages, read_given, warn_of_stretching
from .pipeline_output import ImagenPipelineOutput
from .planning import Generators, NoiseLevel, Request, Size, StagePlan, plan_sizes, plan_stages
from .prediction import GuidedPrediction, Latents
from .prompts import PromptEmbeds
from .schedules import begin_at
from .stages import Stage, check_kinds, check_stages


class Runner:
    """
    Runs one call of a pipeline.

    Args:
        pipe: The pipeline.
        arguments: The arguments of its `__call__`.
        stages: The stages that run, in order.
        low_resolution: Resolution of `image` in the arguments, if the first stage upscales it; else None.
        scale_factor: Ratio of the result's size to that of `image`, unless the arguments set the size; None for the
            resolution of the last stage.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        arguments: CallArguments,
        stages: list[Stage],
        low_resolution: int | None = None,
        scale_factor: int | None = None,
    ):
        self.pipe, self.arguments, self.stages = pipe, arguments, stages
        self.low_resolution, self.scale_factor = low_resolution, scale_factor
        self.calls = 0  # number of network calls so far, as passed to callbacks

    def run(self) -> ImagenPipelineOutput | tuple:
        """Generate the images.

        Raises:
            ValueError: If an argument is invalid; raised before any network runs.
            FloatingPointError: If a stage computes values that are not finite; names the stage and the likely cause.
        """
        arguments, pipe = self.arguments, self.pipe
        with pipe.scaled_adapters(arguments.cross_attention_kwargs):
            # 1. Check all arguments and plan every network call, before any network runs
            request = self.plan()

            # 2. Encode the prompt, once for all stages and images
            text = self.encode_text()

            # 3. Run the base stage, then each super-resolution stage on the images of the previous: (B, 3, 64, 64), ...
            images = self.run_stages(request, text)

        # 4. Convert pixels in [-1, 1] to the output type, with the safety checker and the watermarker
        finished = finish_images(pipe, images, arguments.output_type)
        pipe.maybe_free_model_hooks()
        last = finished.images[max(finished.images)]
        output = ImagenPipelineOutput(last, *finished)
        return output if arguments.return_dict else output.to_tuple()

    def encode_text(self) -> PromptEmbeds:
        """Encode the text of all images by the pipeline's `encode_prompt`."""
        if not any(stage.reads_text for stage in self.stages):
            return PromptEmbeds(None, None, None, None)
        text = self.arguments.text
        number = self.arguments.num_images_per_prompt
        embeds, mask, negative_embeds, negative_mask = self.pipe.encode_prompt(
            **vars(text), num_images_per_prompt=number
        )
        keeps_padding = self.pipe.keeps_padding
        return PromptEmbeds(embeds, mask, negative_embeds, negative_mask, text.negative_given, keeps_padding)

    # ---- 1. checks and plans

    def plan(self) -> Request:
        """Check the arguments, and plan every network call."""
        arguments, pipe, stages = self.arguments, self.pipe, self.stages
        check_kinds(stages, starts_from_noise=self.low_resolution is None)
        inputs.check_stage_arguments(arguments, pipe.stages)
        settings = inputs.stage_settings(arguments, stages)
        check_choice("output_type", arguments.output_type, inputs.OUTPUT_TYPES)
        check_filter(pipe.components)
        inputs.check_flag("return_dict", arguments.return_dict)
        times = as_integer("num_resample_times", arguments.num_resample_times, 1, inputs.MAX_RESAMPLE_TIMES)
        callback = check_callback(
            arguments.callback_on_step_end, arguments.callback_on_step_end_tensor_inputs, pipe._callback_tensor_inputs
        )
        arguments.text.check(pipe.text_source, stages)
        check_stages(stages, pipe.text_width)
        given, strength = self.read_images()
        num_prompts = given.number if given is not None and self.counts_images else arguments.text.number
        num_images = num_prompts * inputs.as_images_per_prompt(arguments.num_images_per_prompt, num_prompts)
        inputs.check_generator(arguments.generator, num_images, pipe._execution_device)
        inputs.check_latents(arguments.latents, num_images, stages[0])

        sizes = self.sizes(given)
        inputs.check_pixels(num_images, sizes)
        if given is not None:
            first = self.low_resolution or stages[0].resolution
            warn_of_stretching(given, sizes[first], sizes[stages[-1].resolution])
        times = times if arguments.mask_image is not None else 1
        plans = plan_stages(stages, settings, sizes, self.low_resolution, strength, times, pipe._execution_device)
        generators = inputs.per_image_generators(arguments.generator, num_images)
        return Request(plans, num_images, generators, arguments.latents, given, strength < 1, callback)

    @property
    def counts_images(self) -> bool:
        """
        Whether the number of the caller's images determines the number of results: without text or several prompts.
        """
        return self.arguments.text.number == 1 and not any(stage.reads_text for stage in self.stages)

    def read_images(self) -> tuple[GivenImages | None, float]:
        """Return the caller's images and masks, if any, and the share of the base stage's steps that run."""

        arguments = self.arguments
        for name in ("mask_image", "strength"):
            if getattr(arguments, name) is not None and arguments.image is None:
                raise ValueError(f"`{name}` is given without `image`.")
        strength = 1.0 if arguments.strength is None else as_number("strength", arguments.strength, 0.0, 1.0)
        if arguments.image is None:
            return None, strength
        num_prompts = None if self.counts_images else arguments.text.number
        return read_given(arguments.image, arguments.mask_image, num_prompts), strength

    def sizes(self, given: GivenImages | None) -> dict[int, Size]:
        """Return height and width of the images of each stage, by resolution."""
        asked = {"height": self.arguments.height, "width": self.arguments.width}
        implied: list[int | None] = [None, None]
        if self.arguments.latents is not None:
            shape = tuple(self.arguments.latents.shape)
            first, last = self.stages[0].resolution, self.stages[-1].resolution
            implied = [pixels * last // first for pixels in shape[-2:]]
            for (name, pixels), own in zip(asked.items(), implied):
                if pixels not in (None, own):
                    raise ValueError(f"`{name}` is {pixels}, but should be {own} for `latents` of shape {shape}.")
            asked = {}
        elif self.scale_factor is not None and given is not None:
            found = {tuple(image.shape[-2:]) for image in given.pixels}
            if len(found) > 1 and None in asked.values():
                raise ValueError(f"`image` has images of the sizes {sorted(found)}: pass `height` and `width`.")
            implied = [pixels * self.scale_factor for pixels in found.pop()]
        height, width = (
            own if asked.get(name) is None else asked[name] for name, own in zip(("height", "width"), implied)
        )
        return plan_sizes(self.stages, self.low_resolution, height, width)

    # ---- 3. stages

    def run_stages(self, request: Request, text: PromptEmbeds) -> dict[int, torch.Tensor]:
        """Run the stages in order, each on the images of the previous one; return images in [-1, 1] by resolution."""
        pipe, plans = self.pipe, request.plans
        pipe._interrupt = False
        pipe._num_timesteps = sum(len(plan.calls) for plan in plans)
        image, added = None, 0.0
        if plans[0].low_res_size is not None and request.given is not None:
            image = request.given.resized(plans[0].low_res_size, request.num_images, pipe._execution_device)
        images: dict[int, torch.Tensor] = {}
        for plan in plans:
            if pipe.interrupt and images:
                break
            # a callback changes the guidance of the running stage only
            pipe._guidance_scale = asked = plan.settings.guidance_scale
            image = StageRunner(self, plan, request, text).run(image)
            images[plan.stage.resolution] = image
            added += pipe._guidance_scale - asked
            if pipe._guidance_scale != asked:  # for readers after the call: the sum of the changes in all stages
                pipe._guidance_scale = asked + added
        return images

    def call_back(
        self,
        callback: Callback,
        timestep: Any,
        sample: torch.Tensor,
        predicted: torch.Tensor | None,
        text: PromptEmbeds,
    ) -> torch.Tensor:
        """Call the caller's function after a network call; apply its changes to the sample, the text and the guidance.

        `predicted`, the clean image that the call predicted, is read-only.
        """
        function, given = callback.function, {"latents": sample, **text.tensors()}
        if function is None:
            return sample
        shown = {**given, PREDICTED: predicted}
        tensors = {name: shown[name] for name in callback.tensor_inputs}
        before = text.copies(callback.tensor_inputs)
        changed = read_changes(function(self.pipe, self.calls, timestep, tensors), given)
        text.update(changed, before)
        self.pipe._guidance_scale = read_scale(self.pipe._guidance_scale, function)
        self.calls += 1
        return changed.get("latents", sample)


class StageRunner:
    """Runs the reverse process of one stage: from noise to images, with guidance and known pixels."""

    def __init__(self, runner: Runner, plan: StagePlan, request: Request, text: PromptEmbeds):
        self.runner, self.plan, self.request, self.text = runner, plan, request, text
        self.pipe, self.generators = runner.pipe, request.generators
        self.device = self.pipe._execution_device
        self.watch = FiniteWatch(plan)
        self.space = SampleSpace()

    def run(self, image: torch.Tensor | None) -> torch.Tensor:
        """Return the stage's images `(B, C, H, W)` in [-1, 1].

        The sample stays in float32 regardless of the network's dtype: bfloat16 cannot represent low noise levels added to
        an image.

        Args:
            image: `(B, C, h, w)` in [-1, 1], the low-resolution image of a super-resolution stage; None for a base
                stage.

        Raises:
            FloatingPointError: If the network, guidance, the scheduler or a callback returned values that are not
                finite.
        """
        plan, watch, scheduler = self.plan, self.watch, self.plan.scheduler
        self.space = self.choose_space(image)
        latents, known = self.prepare_latents(image), self.prepare_known()
        untouched = copy.deepcopy(scheduler) if any(call.back_to is not None for call in plan.calls) else None
        begin_at(scheduler, plan.begins)
        predict = GuidedPrediction(plan, self.text, latents, watch, self.pipe.tiling, self.pipe.slice_size)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": self.generators} if takes_generator else {}
        sample = latents.sample
        if known is not None:
            sample = known.put_into(sample, plan.noise_levels[plan.begins], self.generators)
        watch.see("the noise and the image that it starts from are not", sample)
        with self.pipe.progress_bar(total=len(plan.calls)) as progress:
            progress.set_description(f"{plan.stage.name} {plan.stage.resolution} px")
            for call in plan.calls:
                if self.pipe.interrupt:
                    break
                watch.call += 1
                timestep = scheduler.timesteps[call.index]
                scale = self.pipe.guidance_scale if call.guided else 1.0  # may have been changed by a callback
                output = predict(scheduler.scale_model_input(sample, timestep), timestep, scale)
                sample, *denoised = scheduler.step(output, timestep, sample, **step_kwargs, return_dict=False)
                if known is not None and call.noise_level_after is not None:
                    sample = known.put_into(sample, call.noise_level_after, self.generators)
                if call.back_to is not None and call.noise_level_after is not None:
                    higher = plan.noise_levels[call.back_to]
                    sample = add_more_noise(sample, call.noise_level_after, higher, self.generators)
                    scheduler = copy.deepcopy(untouched)  # without the history of the step that is repeated
                    begin_at(scheduler, call.back_to)
                watch.see(f"the step of its {type(scheduler).__name__} overflows", sample)
                if self.request.callback.function is not None:
                    images = self.space.decode(sample)
                    # some schedulers do not return it
                    predicted = self.space.decode(denoised[0]) if denoised else None
                    given = images.clone()  # which the callback may change in place
                    changed = self.runner.call_back(self.request.callback, timestep, given, predicted, self.text)
                    # unchanged pixels are not rounded by the conversion
                    sample = torch.where(changed == images, sample, self.space.encode(changed))
                    watch.see("`callback_on_step_end` returned such `latents`", sample)
                progress.update()
        watch.raise_unless_finite(self.text)  # before the clamp, which turns infinite values into finite ones
        return self.space.decode(sample).clamp(-1, 1)

    def choose_space(self, image: torch.Tensor | None) -> SampleSpace:
        """Return the space that the network denoises in, with its low-resolution image `(B, C, h, w)`."""
        scale = self.plan.stage.unet.residual_scale
        if image is None or scale is None:
            return SampleSpace()
        return SampleSpace(self.upsample(image).float(), scale)

    def upsample(self, image: torch.Tensor) -> torch.Tensor:
        """Upsample the low-resolution image `(B, C, h, w)` to the size of the sample, with the network's kernel."""
        unet = self.plan.stage.unet
        if unet.low_res_augmentation == "discrete":
            return upsample_before_noise(image, self.plan.size)
        return upsample_low_res(image, self.plan.size, unet.low_res_upsampling == "bicubic_antialias")

    def prepare_latents(self, image: torch.Tensor | None) -> Latents:
        """Return the initial tensors: noise, and the low-resolution image `(B, C, h, w)` with its own noise."""
        plan, request, unet = self.plan, self.request, self.plan.stage.unet
        low_res, low_res_timestep = (None, None) if image is None else self.prepare_low_res(image)
        noise = request.noise if plan is request.plans[0] else None
        if noise is None:
            shape = (request.num_images, unet.in_channels, *plan.size)
            noise = randn_tensor(shape, self.generators, self.device, torch.float32)
        noise = noise.to(self.device, torch.float32)
        sample = noise * plan.scheduler.init_noise_sigma
        if image is None and request.given is not None and request.starts_from_image:
            start = plan.noise_levels[plan.begins]
            given = request.given.resized(plan.size, request.num_images, self.device)
            sample = start.signal * given + start.noise * noise
        return Latents(sample, low_res, low_res_timestep)

    def prepare_low_res(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the upsampled low-resolution image `(B, C, h, w)` with noise, and its conditioning value.

        The noise is drawn once, before the loop: both branches of guidance have the same image at every step.
        """
        plan, unet, timestep = self.plan, self.plan.stage.unet, None
        sigma, discrete = plan.settings.low_res_noise_level, unet.low_res_augmentation == "discrete"
        if discrete:
            image = self.upsample(image)
        if unet.takes_low_res_noise_level:
            noise = randn_tensor(image.shape, self.generators, self.device, image.dtype)
            if discrete:
                image, timestep = augment_upsampled(image, sigma, noise)
            else:
                sigma_data = getattr(plan.scheduler.config, "sigma_data", 0.5)
                image, timestep = augment_low_res(image, sigma, noise, sigma_data)
        if not discrete:  # otherwise the network would do this at every step
            image = self.upsample(image)
        return image, timestep

    def prepare_known(self) -> "KnownPixels | None":
        """Return the pixels to keep, at the stage's resolution, unless the caller's images are smaller."""
        given, plan = self.request.given, self.plan
        if given is None or given.repainted is None:
            return None
        if not plan.stage.is_base and not given.are_as_large_as(plan.size):
            return None
        where = plan.size, self.request.num_images, self.device
        return KnownPixels(self.space.encode(given.resized(*where)), given.mask(*where))


class KnownPixels(NamedTuple):
    """Known pixels, which inpainting keeps."""

    image: torch.Tensor  # (B, C, H, W), in the space of the stage's diffusion
    repainted: torch.Tensor  # (B, 1, H, W), True where the image is repainted

    def put_into(self, sample: torch.Tensor, noise_level: NoiseLevel, generators: Generators) -> torch.Tensor:
        """Replace the known pixels of the sample: by the original with fresh noise at the sample's noise level."""
        known = self.image * noise_level.signal
        if noise_level.noise > 0:
            known = known + noise_level.noise * randn_tensor(sample.shape, generators, sample.device, sample.dtype)
        return torch.where(self.repainted, sample, known)


def add_more_noise(
    sample: torch.Tensor, noise_level: NoiseLevel, higher: NoiseLevel, generators: Generators
) -> torch.Tensor:
    """
    Add noise from one noise level to a higher one, as in the resampling of RePaint (arXiv 2201.09865, algorithm 1).
    """
    factor = higher.signal / noise_level.signal
    std = max(higher.noise**2 - (factor * noise_level.noise) ** 2, 0.0) ** 0.5
    return factor * sample + std * randn_tensor(sample.shape, generators, sample.device, sample.dtype)
