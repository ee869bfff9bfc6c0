"""ImagenCascadePipeline: from a prompt to a picture. Read `__call__` first; the methods below it follow its order."""

import inspect
from typing import Any, Callable, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..diffusion.augmentation import augment_low_res
from ..diffusion.guidance import classifier_free_guidance
from ..loaders import ImagenLoraLoaderMixin
from ..model_card import ModelCardMixin
from ..models.embeddings import TextConditioning
from ..models.unet_base import ConditionalUNet, check_choice
from . import inputs
from .inputs import double, full_mask, per_image_generators, per_stage
from .pipeline_output import ImagenPipelineOutput
from .text import encode_text


STAGE_NAMES = ("base", "sr256", "sr1024")
# the low-resolution image leaves little to decide: super-resolution needs few steps and no guidance
DEFAULT_STEPS = {"base": 18, "sr256": 8, "sr1024": 8}
DEFAULT_GUIDANCE = {"base": 4.0, "sr256": 1.0, "sr1024": 1.0}
MIN_NOISE_LEVEL = 0.002  # EDM's lowest noise level; its conditioning value, a logarithm, has none at zero

TextStates = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]  # prompt, its mask, negative prompt, its mask
Generators = Optional[list[torch.Generator]]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_imagen import ImagenCascadePipeline

        >>> pipe = ImagenCascadePipeline.from_pretrained("checkpoints/imagen-emoji")
        >>> out = pipe("a 3d render of a tiger face", generator=torch.Generator().manual_seed(0))
        >>> out.images[0].save("tiger.png")  # out.stage_images has the images of every stage
        ```
"""


class Stage(NamedTuple):
    """One diffusion model of the cascade."""

    name: str
    unet: ConditionalUNet
    scheduler: SchedulerMixin

    @property
    def resolution(self) -> int:
        """Side of its images, in pixels."""
        return self.unet.config.sample_size


class ImagenCascadePipeline(ModelCardMixin, DiffusionPipeline, ImagenLoraLoaderMixin):
    r"""
    Text to image through a base stage and super-resolution stages (Imagen, arXiv 2205.11487).

    Every component after the base stage is optional; so are tokenizer and text encoder, if embeddings are given.

    Args:
        base_unet ([`ImagenUNetModel`]): Network of the base stage.
        base_scheduler ([`SchedulerMixin`]): Scheduler of the base stage.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its `model_max_length` is the number of tokens that the stages were trained with.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Frozen text encoder.
        sr256_unet, sr1024_unet ([`EfficientUNetModel`] or [`ImagenUNetModel`], *optional*):
            Networks of the super-resolution stages.
        sr256_scheduler, sr1024_scheduler ([`SchedulerMixin`], *optional*): Their schedulers.
    """

    model_cpu_offload_seq = "text_encoder->base_unet->sr256_unet->sr1024_unet"
    _optional_components = [
        "tokenizer",
        "text_encoder",
        "sr256_unet",
        "sr256_scheduler",
        "sr1024_unet",
        "sr1024_scheduler",
    ]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        base_unet: ConditionalUNet,
        base_scheduler: SchedulerMixin,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        text_encoder: Optional[PreTrainedModel] = None,
        sr256_unet: Optional[ConditionalUNet] = None,
        sr256_scheduler: Optional[SchedulerMixin] = None,
        sr1024_unet: Optional[ConditionalUNet] = None,
        sr1024_scheduler: Optional[SchedulerMixin] = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            base_unet=base_unet,
            base_scheduler=base_scheduler,
            sr256_unet=sr256_unet,
            sr256_scheduler=sr256_scheduler,
            sr1024_unet=sr1024_unet,
            sr1024_scheduler=sr1024_scheduler,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def stages(self) -> list[Stage]:
        """The stages that are present, in the order in which they run."""
        named = ((name, getattr(self, f"{name}_unet"), getattr(self, f"{name}_scheduler")) for name in STAGE_NAMES)
        return [Stage(name, unet, scheduler) for name, unet, scheduler in named if unet is not None]

    @property
    def num_timesteps(self) -> int:
        """Network calls of the running or last call, over all stages."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the stage that runs."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after the step that runs."""
        return self._interrupt

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: Union[str, list[str], None] = None,
        negative_prompt: Union[str, list[str], None] = None,
        output_resolution: Optional[int] = None,
        num_inference_steps: Union[int, list[int], dict[str, int]] = DEFAULT_STEPS,
        guidance_scale: Union[float, list[float], dict[str, float]] = DEFAULT_GUIDANCE,
        low_res_noise_level: Union[float, list[float], dict[str, float]] = 0.1,
        num_images_per_prompt: int = 1,
        generator: Union[torch.Generator, list[torch.Generator], None] = None,
        latents: Optional[torch.Tensor] = None,
        prompt_embeds: Optional[torch.Tensor] = None,
        prompt_attention_mask: Optional[torch.Tensor] = None,
        negative_prompt_embeds: Optional[torch.Tensor] = None,
        negative_prompt_attention_mask: Optional[torch.Tensor] = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Optional[Callable] = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> Union[ImagenPipelineOutput, tuple]:
        r"""
        Args:
            prompt (`str` or `list[str]`): What to draw.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from; without it, guidance is away from the absence of text, as in training.
            output_resolution (`int`, *optional*): Resolution of the stage to stop after; the last stage's if None.
            num_inference_steps (`int`, `list[int]` or `dict[str, int]`, defaults to 18 and then 8):
                Steps of all stages, of each that runs, or by stage name: `base`, `sr256`, `sr1024`.
            guidance_scale (`float`, `list[float]` or `dict[str, float]`, defaults to 4 and then 1):
                Weight of classifier-free guidance, in the same forms; 1 turns it off.
            low_res_noise_level (`float`, `list[float]` or `dict[str, float]`, defaults to 0.1):
                Sigma of the noise in the low-resolution image, for all super-resolution stages, each that runs, or
                by stage name. Stages without noise conditioning take none.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise. From one generator each image gets a generator of its own, so that an image
                depends on the seed and its place and not on the size of the batch; a list has one an image.
            latents (`torch.Tensor`, *optional*): Unit noise `(images, 3, height, width)` of the base stage.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, width)`, *optional*):
                Text states in place of the texts, zero at padded positions.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`):
                Which tokens count; all if not given.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): An [`ImagenPipelineOutput`], or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after every network call, counted over all stages.
            callback_on_step_end_tensor_inputs (`list[str]`): Tensors it takes and may return changed.

        Examples:

        Returns:
            [`ImagenPipelineOutput`] or `tuple`: images of the last stage, and of every stage by resolution.

        Raises:
            ValueError: If an argument does not fit, before any network runs.
        """
        # 1. Check everything before any network runs
        stages = self.stages_up_to(output_resolution)
        steps = per_stage("num_inference_steps", num_inference_steps, stages)
        scales = per_stage("guidance_scale", guidance_scale, stages)
        noise_levels = per_stage("low_res_noise_level", low_res_noise_level, stages[1:])
        inputs.check_count("num_inference_steps", steps)
        inputs.check_finite("guidance_scale", scales, minimum=0.0)
        inputs.check_finite("low_res_noise_level", noise_levels, minimum=MIN_NOISE_LEVEL)
        check_choice("output_type", output_type, inputs.OUTPUT_TYPES)
        inputs.check_count("num_images_per_prompt", [num_images_per_prompt])
        self.check_text(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        num_images = inputs.count_prompts(prompt, prompt_embeds) * num_images_per_prompt
        self.check_noise(generator, latents, num_images)
        generators = per_image_generators(generator, num_images)

        # 2. Encode the prompt, once for all stages and images
        text = self.encode_prompt(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )

        # 3. Lay out the schedules of all stages, so that callbacks know the total
        self._interrupt = False
        for stage, num_steps in zip(stages, steps):
            stage.scheduler.set_timesteps(num_steps, device=self._execution_device)
        self._num_timesteps = sum(len(stage.scheduler.timesteps) for stage in stages)
        callback = StepCallback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 4. Base stage, then each super-resolution stage on what the one before it made
        image = self.denoise(stages[0], text, scales[0], generators, callback, noise=latents)  # (B, 3, 64, 64)
        images = {stages[0].resolution: image}
        for below, stage, scale, noise_level in zip(stages, stages[1:], scales[1:], noise_levels):
            if self.interrupt:
                break
            factor = stage.resolution // below.resolution
            image = self.upscale(stage, image, factor, text, scale, noise_level, generators, callback)
            images[stage.resolution] = image  # (B, 3, 256, 256)

        # 5. Pixels in [-1, 1] to what was asked for
        images = {side: self.image_processor.postprocess(x, output_type=output_type) for side, x in images.items()}
        self.maybe_free_model_hooks()
        last = images[max(images)]
        return ImagenPipelineOutput(images=last, stage_images=images) if return_dict else (last, images)

    def stages_up_to(self, output_resolution: Optional[int]) -> list[Stage]:
        """The stages that lead to a resolution.

        Raises:
            ValueError: If no stage ends there.
        """
        stages = self.stages
        resolutions = [stage.resolution for stage in stages]
        if output_resolution is None:
            return stages
        if output_resolution not in resolutions:
            raise ValueError(
                f"`output_resolution` is {output_resolution!r}, but the stages of this cascade end at {resolutions}."
            )
        return stages[: resolutions.index(output_resolution) + 1]

    def check_text(
        self,
        prompt: Union[str, list[str], None],
        negative_prompt: Union[str, list[str], None],
        prompt_embeds: Optional[torch.Tensor],
        prompt_attention_mask: Optional[torch.Tensor],
        negative_prompt_embeds: Optional[torch.Tensor],
        negative_prompt_attention_mask: Optional[torch.Tensor],
    ) -> None:
        """Checks that there is one description of each prompt, and that the networks can read it."""
        unets = [stage.unet for stage in self.stages]
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"Exactly one of `prompt` ({prompt!r}) and `prompt_embeds` must be given.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` can be given.")
        for name, texts, embeds, mask in (
            ("prompt", prompt, prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if texts is not None:
                inputs.check_prompt(name, texts)
                if self.text_encoder is None or self.tokenizer is None:
                    raise ValueError(f"`{name}` needs a text encoder and a tokenizer; give `{name}_embeds` instead.")
            if embeds is not None:
                inputs.check_embeds(name, embeds, mask, unets)
            elif mask is not None:
                raise ValueError(f"`{name}_attention_mask` was given without `{name}_embeds`.")

        count = inputs.count_prompts(prompt, prompt_embeds)
        is_list = isinstance(negative_prompt, list) or negative_prompt_embeds is not None
        if is_list and inputs.count_prompts(negative_prompt, negative_prompt_embeds) != count:
            raise ValueError(
                f"There are {inputs.count_prompts(negative_prompt, negative_prompt_embeds)} negative prompts, but "
                f"{count} prompts."
            )

    def check_noise(
        self,
        generator: Union[torch.Generator, list[torch.Generator], None],
        latents: Optional[torch.Tensor],
        num_images: int,
    ) -> None:
        """Checks that there is noise for every image."""
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"`generator` has {len(generator)} entries, but {num_images} images are to be made.")
        if latents is None:
            return
        stride = self.base_unet.total_stride
        channels = self.base_unet.config.in_channels
        if (
            latents.ndim != 4
            or latents.shape[:2] != (num_images, channels)
            or any(n % stride for n in latents.shape[2:])
        ):
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but should be ({num_images}, {channels}, height, width) "
                f"with multiples of {stride}."
            )

    def encode_prompt(
        self,
        prompt: Union[str, list[str], None] = None,
        negative_prompt: Union[str, list[str], None] = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Optional[torch.Tensor] = None,
        prompt_attention_mask: Optional[torch.Tensor] = None,
        negative_prompt_embeds: Optional[torch.Tensor] = None,
        negative_prompt_attention_mask: Optional[torch.Tensor] = None,
    ) -> TextStates:
        r"""
        Encodes prompts, unless embeddings are given, and repeats everything for the images of each prompt.

        Without a negative prompt the negative states are zeros under the prompt's mask: what the networks saw of
        dropped captions in training.

        Returns:
            `prompt_embeds` `(images, tokens, width)`, `prompt_attention_mask` `(images, tokens)`,
            `negative_prompt_embeds`, `negative_prompt_attention_mask`.
        """
        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, prompt_attention_mask = encode_text(self.tokenizer, self.text_encoder, prompt)
        prompt_attention_mask = full_mask(prompt_embeds, prompt_attention_mask)

        if negative_prompt_embeds is None and negative_prompt is not None:
            texts = [negative_prompt] * len(prompt_embeds) if isinstance(negative_prompt, str) else negative_prompt
            negative_prompt_embeds, negative_prompt_attention_mask = encode_text(
                self.tokenizer, self.text_encoder, texts
            )
        elif negative_prompt_embeds is None:
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)
            negative_prompt_attention_mask = prompt_attention_mask
        negative_prompt_attention_mask = full_mask(negative_prompt_embeds, negative_prompt_attention_mask)

        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            tensor.repeat_interleave(num_images_per_prompt, dim=0).to(self._execution_device)
            for tensor in (
                prompt_embeds,
                prompt_attention_mask,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
            )
        )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def condition(self, unet: ConditionalUNet, text: TextStates, guided: bool) -> TextConditioning:
        """Does a network's work on the text, once for all steps; with guidance, negative prompts come first."""
        embeds, mask, negative_embeds, negative_mask = text
        if guided:
            embeds, mask = torch.cat([negative_embeds, embeds]), torch.cat([negative_mask, mask])
        return unet.encode_text(embeds, mask)

    def upscale(
        self,
        stage: Stage,
        image: torch.Tensor,
        factor: int,
        text: TextStates,
        guidance_scale: float,
        noise_level: float,
        generators: Generators,
        callback: "StepCallback",
    ) -> torch.Tensor:
        """One super-resolution stage, `(B, C, h, w)` to `factor` times that size, both in [-1, 1]."""
        low_res, low_res_timestep = image, None
        if stage.unet.config.low_res_noise_conditioning:
            # drawn once, before the loop: both branches of guidance see the same image at every step
            noise = randn_tensor(image.shape, generators, image.device, image.dtype)
            low_res, low_res_timestep = augment_low_res(image, noise_level, noise, stage.scheduler.config.sigma_data)
        # the network would do this at every step
        low_res = F.interpolate(low_res, scale_factor=factor, mode="bicubic")
        return self.denoise(stage, text, guidance_scale, generators, callback, None, low_res, low_res_timestep)

    def denoise(
        self,
        stage: Stage,
        text: TextStates,
        guidance_scale: float,
        generators: Generators,
        callback: "StepCallback",
        noise: Optional[torch.Tensor] = None,
        low_res: Optional[torch.Tensor] = None,
        low_res_timestep: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The reverse process of one stage, from unit noise (drawn if not given) to images `(B, C, H, W)` in [-1, 1].

        The sample stays in float32 whatever the network's dtype: bf16 cannot hold a low noise level beside an image.
        """
        unet, scheduler, device = stage.unet, stage.scheduler, self._execution_device
        self._guidance_scale = guidance_scale
        guided = guidance_scale != 1.0
        conditioning = self.condition(unet, text, guided)
        if noise is None:
            size = (stage.resolution, stage.resolution) if low_res is None else low_res.shape[-2:]
            shape = (len(text[0]), unet.config.in_channels, *size)
            noise = randn_tensor(shape, generators, device, torch.float32)
        sample = noise.to(device, torch.float32) * scheduler.init_noise_sigma
        if low_res is not None:
            low_res = double(low_res, guided).to(unet.dtype)
            low_res_timestep = None if low_res_timestep is None else double(low_res_timestep, guided)

        step_kwargs = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        with self.progress_bar(total=len(scheduler.timesteps)) as progress:
            progress.set_description(f"{stage.name} {stage.resolution} px")
            for timestep in scheduler.timesteps:
                if self.interrupt:
                    break
                model_input = double(scheduler.scale_model_input(sample, timestep), guided).to(unet.dtype)
                output = unet(
                    model_input,
                    timestep,
                    conditioning,
                    low_res_sample=low_res,
                    low_res_timestep=low_res_timestep,
                    return_dict=False,
                )[0].float()
                if guided:
                    unconditional, conditional = output.chunk(2)
                    output = classifier_free_guidance(conditional, unconditional, guidance_scale)
                sample = scheduler.step(output, timestep, sample, **step_kwargs, return_dict=False)[0]
                sample = callback(timestep, sample)
                progress.update()
        return sample.clamp(-1, 1)


class StepCallback:
    """Calls the user's function after every network call of every stage, counted through."""

    def __init__(self, pipe: ImagenCascadePipeline, function: Optional[Callable], tensor_inputs: list[str]):
        unknown = set(tensor_inputs) - set(pipe._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but should be among "
                f"{pipe._callback_tensor_inputs}."
            )
        self.pipe, self.function, self.tensor_inputs = pipe, function, tensor_inputs
        self.step = 0

    def __call__(self, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        """Returns the sample, changed if the function returns one."""
        if self.function is not None:
            tensors = {"latents": latents} if "latents" in self.tensor_inputs else {}
            latents = self.function(self.pipe, self.step, timestep, tensors).pop("latents", latents)
        self.step += 1
        return latents
