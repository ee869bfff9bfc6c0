"""ImagenSuperResolutionPipeline: one super-resolution stage alone, as training leaves it in a folder."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from diffusers.utils import replace_example_docstring
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..loaders import ImagenLoraLoaderMixin
from ..utils.arguments import as_integer
from .call_arguments import CallArguments
from .image_inputs import ImageInput
from .pipeline_mixin import ImagenPipelineMixin
from .pipeline_output import ImagenPipelineOutput
from .runner import Runner
from .stage_table import SAFETY_PARTS, upscaler_of
from .stages import Stage, UNet


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import load_image
        >>> from diffusers_imagen import ImagenSuperResolutionPipeline

        >>> pipe = ImagenSuperResolutionPipeline.from_pretrained("runs/sr-256")
        >>> image = pipe("a 3d render of a tiger face", image=load_image("tiger-64.png")).images[0]
        ```
"""


class ImagenSuperResolutionPipeline(ImagenPipelineMixin, DiffusionPipeline, ImagenLoraLoaderMixin):
    r"""
    Makes images larger, with a text that says what is on them (Imagen, arXiv 2205.11487).

    Args:
        unet ([`EfficientUNetModel`] or [`ImagenUNetModel`]): Network.
        scheduler ([`SchedulerMixin`]): Its scheduler.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its `model_max_length` is the number of tokens that the network was trained with.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Frozen text encoder.
        scale_factor (`int`, defaults to 4): How many times larger the network was trained to make images.
        safety_checker ([`IFSafetyChecker`], *optional*):
            Of DeepFloyd IF: images that it flags are black, see [`ImagenPipelineOutput`].
        feature_extractor ([`CLIPImageProcessor`], *optional*): What it reads images by; it cannot do without.
        watermarker ([`IFWatermarker`], *optional*): Puts IF's watermark on pictures (`output_type="pil"`).
        call_defaults (`dict[str, float]`, *optional*):
            What a call has for `num_inference_steps`, `guidance_scale` and `low_res_noise_level` where it does not say.
        clean_caption (`bool`, defaults to `False`):
            Whether prompts are cleaned up as DeepFloyd IF's captions were, before they are encoded.
        origin (`dict[str, str]`, *optional*):
            Where the weights are from, for the model card: `base_model`, a Hub id, and `license`.
    """

    model_cpu_offload_seq = "text_encoder->unet->safety_checker"
    _optional_components = ["tokenizer", "text_encoder", *SAFETY_PARTS]

    def __init__(
        self,
        unet: UNet,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        scale_factor: int = 4,
        safety_checker: IFSafetyChecker | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        watermarker: IFWatermarker | None = None,
        call_defaults: dict | None = None,
        clean_caption: bool = False,
        origin: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_to_config(scale_factor=scale_factor)
        self.register_settings(call_defaults, clean_caption, origin)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def low_resolution(self) -> int:
        """Resolution of the images that the network was trained to enlarge, in pixels."""
        resolution, factor = self.unet.resolution, self.config.scale_factor
        as_integer("scale_factor", factor)
        if resolution % factor:
            raise ValueError(f"`scale_factor` is {factor}, which does not divide the network's {resolution} px.")
        return resolution // factor

    @property
    def stages(self) -> list[Stage]:
        """The one stage, under the name of those that a cascade has."""
        kind = upscaler_of(self.unet.resolution)
        defaults = kind.defaults.updated("call_defaults", self.config.call_defaults)
        return [Stage(kind, self.unet, self.scheduler, given_defaults=defaults)]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        low_res_noise_level: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        cross_attention_kwargs: dict[str, float] | None = None,
    ) -> ImagenPipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or `list[str]`): What is on the image.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from; the absence of text if not given.
            image (PIL image, `np.ndarray`, `torch.Tensor` or a list of them):
                The image to enlarge, one for all prompts or one for each, or any number for a network without text;
                see [`ImagenCascadePipeline.__call__`].
            height, width (`int`, *optional*):
                Of the result, in pixels; the image is brought to `1 / scale_factor` of that. `scale_factor` times the
                image's own if None.
            num_inference_steps (`int`, *optional*): Steps; 8, or as `call_defaults` says.
            sigmas, timesteps (`list[float]`, *optional*):
                The scheduler's noise levels or conditioning values in place of a number of steps.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance; 1 turns it off. 1, or as `call_defaults` says.
            guidance_interval (`tuple[float, float]`, *optional*):
                Lowest and highest noise level (EDM's sigma) with guidance.
            guidance_rescale (`float`, defaults to 0):
                Share of the guided prediction that is brought back to the contrast without.
            low_res_noise_level (`float`, *optional*):
                Sigma of the noise in the low-resolution image, if the network is conditioned on it. 0.1, or as
                `call_defaults` says.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise: one, from which each image gets its own, or one an image.
            latents (`torch.Tensor`, *optional*): Unit noise `(images, 3, height, width)`, of the result's size.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, width)`, *optional*):
                Text embeddings in place of the texts, zero at padded positions.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`):
                Which tokens of the embeddings count.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): An [`ImagenPipelineOutput`], or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after every network call.
            callback_on_step_end_tensor_inputs (`list[str]`):
                Tensors it takes and may return changed; diffusers' `PipelineCallback` names its own.
                `pred_original_sample`, the clean image predicted by the call, it may not change; None if the scheduler
                does not return it.
            cross_attention_kwargs (`dict`, *optional*): `{"scale": 0.5}` weighs the LoRA adapters of this call.

        Examples:

        Returns:
            [`ImagenPipelineOutput`] or `tuple`: the images, and the same by the stage's resolution.

        Raises:
            ValueError: If an argument does not fit, before any network runs.
            FloatingPointError: If a stage makes values that are not finite; names the stage and the likely cause.
        """
        if image is None:
            raise ValueError("`image` is None, but should be the image to enlarge.")
        arguments = CallArguments.of(locals())
        return Runner(self, arguments, self.stages, self.low_resolution, self.config.scale_factor).run()
