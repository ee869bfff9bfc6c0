"""What the pipelines share besides the reverse process: checks of a call, the start of a stage, tiles and slices."""

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..diffusion.augmentation import augment_low_res
from ..text.encoder import keep_in_fp32
from ..utils.arguments import as_integer, as_number, shown
from . import inputs, prompts
from .callbacks import check_callback
from .denoising import KnownPixels, Latents
from .image_inputs import GivenImages, ImageInput, read_given, warn_of_stretching
from .pipeline_output import ImagenPipelineOutput
from .planning import Request, Size, StagePlan, StageSettings, plan_sizes, plan_stages
from .prompts import TEXT_TENSORS, TextStates
from .stages import Stage, check_components, check_stages
from .tiling import Tiling


class ImagenPipelineMixin:
    """
    Put before `DiffusionPipeline` in a pipeline's bases. The pipeline names its `stages`, and its `__call__` goes
    `check_inputs`, `encode_prompt`, `run_stages`, which calls `prepare_latents` and `denoise` for each stage.
    """

    _callback_tensor_inputs = ["latents", *TEXT_TENSORS]
    tiling: Tiling | None = None
    slice_size: int | None = None
    _num_timesteps = 0
    _guidance_scale = 1.0
    _interrupt = False

    def register_modules(self, **components) -> None:
        """As diffusers' `register_modules`, which gets every component; refuses those that lack weights."""
        check_components(components)
        super().register_modules(**components)

    @property
    def stages(self) -> list[Stage]:
        """The stages that are present, in the order in which they run."""
        raise NotImplementedError

    @property
    def num_timesteps(self) -> int:
        """Network calls of the running or last call, over all stages."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the stage that runs; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after the step that runs."""
        return self._interrupt

    # ---- memory

    def enable_tiling(self, tile_size: int = 256, overlap: int = 64) -> None:
        """
        Runs super-resolution networks on overlapping tiles and blends their outputs at every step.

        The memory of a network is that of a tile then, whatever the size of the image.

        Args:
            tile_size (`int`, defaults to 256): Side of a tile, in pixels of the stage's image.
            overlap (`int`, defaults to 64): Pixels that neighbours share.

        Raises:
            ValueError: If a network cannot take such tiles, or they do not advance.
        """
        self.tiling = inputs.check_tiling(tile_size, overlap, [stage for stage in self.stages if stage.name != "base"])

    def disable_tiling(self) -> None:
        """Runs super-resolution networks on whole images again."""
        self.tiling = None

    def enable_slicing(self, slice_size: int = 1) -> None:
        """
        Runs every network on a few images at a time, so that many fit into memory.

        With slices of one, an image made alone and one made in a batch are the same to the last bit.

        Args:
            slice_size (`int`, defaults to 1): Images a call; with guidance a call has twice as many samples.
        """
        self.slice_size = as_integer("slice_size", slice_size, 1, inputs.MAX_IMAGES)

    def disable_slicing(self) -> None:
        """Runs networks on the whole batch again."""
        self.slice_size = None

    def memory_report(self) -> str:
        """A line for each model: parameters, memory of its weights in MiB, dtype and device, and their sum."""
        lines, total = [], 0
        for name, module in self.components.items():
            if not isinstance(module, torch.nn.Module):
                continue
            parameters = list(module.parameters())
            size = sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20
            count = sum(parameter.numel() for parameter in parameters) / 1e6
            lines.append(f"{name:<20}{count:>10.1f} M{size:>12.1f} MiB  {module.dtype}  {module.device}")
            total += size
        return "\n".join([*lines, f"{'all weights':<20}{'':>12}{total:>12.1f} MiB"])

    def to(self, *args, **kwargs):
        """As diffusers' `to`; layers of the text encoder that float16 is too narrow for stay in float32."""
        pipe = super().to(*args, **kwargs)
        keep_in_fp32(pipe.text_encoder)
        return pipe

    def set_progress_bar_config(self, **kwargs) -> None:
        """As diffusers' `set_progress_bar_config`, but refuses here what tqdm would refuse in the middle of a call."""
        own = {"total", "iterable"} & set(kwargs)
        if own:
            raise ValueError(f"A progress bar's {sorted(own)} are the pipeline's to say.")
        try:
            with tqdm(**{"file": io.StringIO(), **kwargs, "disable": False, "total": 1}) as bar:
                bar.set_description("base 64 px")
                bar.update()
        except Exception as error:
            raise ValueError(f"{shown(kwargs)} are no arguments of a progress bar: {error}") from error
        super().set_progress_bar_config(**kwargs)

    # ---- a call

    def check_inputs(
        self,
        stages: list[Stage],
        settings: list[StageSettings],
        low_resolution: int | None,
        image: ImageInput | None,
        mask_image: ImageInput | None,
        strength: float | None,
        num_resample_times: int,
        height: int | None,
        width: int | None,
        texts: dict[str, Any],
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> Request:
        """
        Checks a call and lays out what every network call of it will be, before any network runs.

        Args:
            stages: Those that run.
            settings: What is asked of each.
            low_resolution: Of `image`, if the first stage is one for super-resolution; else None.
            texts: The prompts and embeddings, by argument name.

        The others are arguments of `__call__`.

        Raises:
            ValueError: If anything does not fit.
        """
        inputs.check_output_type(output_type)
        inputs.check_flag("return_dict", return_dict)
        times = as_integer("num_resample_times", num_resample_times, 1, inputs.MAX_RESAMPLE_TIMES)
        callback = check_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        prompts.check_text(stages, self.usable_tokenizer(), **texts)
        check_stages(stages, self.text_encoder)
        num_prompts = prompts.count_prompts(texts["prompt"], texts["prompt_embeds"])
        num_images = num_prompts * inputs.as_images_per_prompt(num_images_per_prompt, num_prompts)
        inputs.check_generator(generator, num_images, self._execution_device)
        inputs.check_latents(latents, num_images, stages[0])

        for name, value in (("mask_image", mask_image), ("strength", strength)):
            if value is not None and image is None:
                raise ValueError(f"`{name}` was given without `image`.")
        if strength is not None:
            strength = as_number("strength", strength, 0.0, 1.0)
        given = None if image is None else read_given(image, mask_image, num_prompts)
        sizes = self.stage_sizes(stages, low_resolution, given, latents, height, width)
        inputs.check_pixels(num_images, sizes)
        if given is not None:
            first, last = (sizes[low_resolution or stages[0].resolution], sizes[stages[-1].resolution])
            warn_of_stretching(given, first, last)
        strength = 1.0 if strength is None else strength
        times = times if mask_image is not None else 1
        plans = plan_stages(stages, settings, sizes, low_resolution, strength, times, self._execution_device)
        generators = inputs.per_image_generators(generator, num_images)
        return Request(plans, num_images, generators, latents, given, strength < 1, callback)

    def stage_sizes(
        self,
        stages: list[Stage],
        low_resolution: int | None,
        given: GivenImages | None,
        latents: torch.Tensor | None,
        height: int | None,
        width: int | None,
    ) -> dict[int, Size]:
        """Height and width by resolution: as asked for, as `latents` have it, or squares of the trained resolution."""
        if latents is None:
            return plan_sizes(stages, low_resolution, height, width)
        first, last = stages[0].resolution, stages[-1].resolution
        implied = [side * last // first for side in latents.shape[-2:]]
        for name, asked, side in zip(("height", "width"), (height, width), implied):
            if asked is not None and asked != side:
                raise ValueError(f"`{name}` is {asked}, but `latents` {tuple(latents.shape)} lead to {side}.")
        return plan_sizes(stages, low_resolution, *implied)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Encodes prompts, unless embeddings are given, and repeats everything for the images of each prompt.

        Without a negative prompt the negative states are zeros under the prompt's mask: what the networks saw of
        dropped captions in training. To free the text encoder before the networks run, call this first, and then the
        pipeline with what it returns (docs/memory.md).

        Returns:
            `prompt_embeds` `(images, tokens, width)`, `prompt_attention_mask` `(images, tokens)`,
            `negative_prompt_embeds`, `negative_prompt_attention_mask`.

        Raises:
            ValueError: If an argument does not fit, or the encoder's states are not finite.
        """
        texts = (
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        if any(value is not None for value in texts):  # networks without text need none
            prompts.check_text(None, self.usable_tokenizer(), *texts)
        num_prompts = prompts.count_prompts(prompt, prompt_embeds)
        num_images_per_prompt = inputs.as_images_per_prompt(num_images_per_prompt, num_prompts)
        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            prompts.encode_prompt(
                self,
                prompt,
                negative_prompt,
                num_images_per_prompt,
                prompt_embeds,
                prompt_attention_mask,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
            )
        )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def usable_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if there is an encoder to read its tokens."""
        return self.tokenizer if self.text_encoder is not None else None

    def encode_texts(self, texts: dict[str, Any], num_images_per_prompt: int) -> TextStates:
        """The text of all images; see `encode_prompt`."""
        states = self.encode_prompt(num_images_per_prompt=num_images_per_prompt, **texts)
        negative_given = texts["negative_prompt"] is not None or texts["negative_prompt_embeds"] is not None
        return TextStates(*states, negative_given=negative_given)

    def prepare_latents(self, plan: StagePlan, image: torch.Tensor | None, request: Request) -> Latents:
        """What a stage starts from.

        Args:
            plan: The stage.
            image: `(B, C, h, w)` in [-1, 1], the low-resolution image of a super-resolution stage; None for a base stage.
            request: The call.
        """
        device, generators = self._execution_device, request.generators
        unet, low_res, low_res_timestep = plan.stage.unet, None, None
        if image is not None:
            low_res = image
            if unet.config.low_res_noise_conditioning:
                # drawn once, before the loop: both branches of guidance see the same image at every step
                noise = randn_tensor(image.shape, generators, device, image.dtype)
                sigma_data = getattr(plan.scheduler.config, "sigma_data", 0.5)
                low_res, low_res_timestep = augment_low_res(
                    image, plan.settings.low_res_noise_level, noise, sigma_data
                )
            # the network would do this at every step
            low_res = F.interpolate(low_res, plan.size, mode="bicubic")
        noise = request.noise if plan is request.plans[0] else None
        if noise is None:
            shape = (request.num_images, unet.config.in_channels, *plan.size)
            noise = randn_tensor(shape, generators, device, torch.float32)
        noise = noise.to(device, torch.float32)
        sample = noise * plan.scheduler.init_noise_sigma
        if image is None and request.starts_from_image:
            level = plan.levels[plan.begins]
            given = request.given.resized(plan.size, request.num_images, device)
            sample = level.signal * given + level.noise * noise
        return Latents(sample, low_res, low_res_timestep)

    def prepare_known(self, plan: StagePlan, request: Request) -> KnownPixels | None:
        """The pixels that a stage keeps: at its own resolution, if the caller's images have as many."""
        given = request.given
        if given is None or given.repainted is None:
            return None
        if plan.stage.name != "base" and not given.are_as_large_as(plan.size):
            return None
        where = plan.size, request.num_images, self._execution_device
        return KnownPixels(given.resized(*where), given.mask(*where))

    def postprocess(
        self, images: dict[int, torch.Tensor], output_type: str, return_dict: bool
    ) -> ImagenPipelineOutput | tuple:
        """Images of all stages in [-1, 1] to the form that was asked for."""
        images = {side: self.image_processor.postprocess(x, output_type=output_type) for side, x in images.items()}
        self.maybe_free_model_hooks()
        last = images[max(images)]
        return ImagenPipelineOutput(images=last, stage_images=images) if return_dict else (last, images)
