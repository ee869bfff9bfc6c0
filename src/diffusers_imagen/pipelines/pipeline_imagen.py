"""ImagenPipeline: the base stage alone, as training leaves it in a folder."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from diffusers.utils import replace_example_docstring
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..loaders import ImagenLoraLoaderMixin
from .call_arguments import CallArguments
from .image_inputs import ImageInput
from .pipeline_mixin import ImagenPipelineMixin
from .pipeline_output import ImagenPipelineOutput
from .runner import Runner
from .stage_table import BASE, DEFAULT_STRENGTH, SAFETY_PARTS
from .stages import Stage, UNet


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_imagen import ImagenPipeline

        >>> pipe = ImagenPipeline.from_pretrained("runs/base-64")
        >>> image = pipe("a 3d render of a tiger face", generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""


class ImagenPipeline(ImagenPipelineMixin, DiffusionPipeline, ImagenLoraLoaderMixin):
    r"""
    Text to image, image to image and inpainting with a base stage (Imagen, arXiv 2205.11487).

    Args:
        unet ([`ImagenUNetModel`] or [`EfficientUNetModel`]): Network.
        scheduler ([`SchedulerMixin`]): Its scheduler.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its `model_max_length` is the number of tokens that the network was trained with.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Frozen text encoder.
        guidance_unet ([`ImagenUNetModel`] or [`EfficientUNetModel`], *optional*):
            A weaker network for autoguidance, see [`ImagenCascadePipeline`].
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

    model_cpu_offload_seq = "text_encoder->guidance_unet->unet->safety_checker"
    _optional_components = ["tokenizer", "text_encoder", "guidance_unet", *SAFETY_PARTS]

    def __init__(
        self,
        unet: UNet,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        guidance_unet: UNet | None = None,
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
            guidance_unet=guidance_unet,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_settings(call_defaults, clean_caption, origin)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def stages(self) -> list[Stage]:
        """The one stage."""
        defaults = BASE.defaults.updated("call_defaults", self.config.call_defaults)
        return [Stage(BASE, self.unet, self.scheduler, self.guidance_unet, defaults)]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        num_resample_times: int = 4,
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
            prompt (`str` or `list[str]`): What to draw.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from; the absence of text if not given.
            image, mask_image (PIL image, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                An image to change, and where to paint it anew; see [`ImagenCascadePipeline.__call__`].
            strength (`float`, *optional*, defaults to 0.7, and to 1 with `mask_image`):
                The share of the steps that run from `image`; 1 starts from noise alone.
            height, width (`int`, *optional*): Of the images, in pixels; the network's `sample_size` if None.
            num_inference_steps (`int`, *optional*): Steps; 18, or as `call_defaults` says.
            sigmas, timesteps (`list[float]`, *optional*):
                The scheduler's noise levels or conditioning values in place of a number of steps.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance; 1 turns it off. 4, or as `call_defaults` says.
            guidance_interval (`tuple[float, float]`, *optional*):
                Lowest and highest noise level (EDM's sigma) with guidance.
            guidance_rescale (`float`, defaults to 0):
                Share of the guided prediction that is brought back to the contrast without.
            num_resample_times (`int`, defaults to 4): With `mask_image`, how often each step is done.
            num_images_per_prompt (`int`, defaults to 1): Images of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise: one, from which each image gets its own, or one an image.
            latents (`torch.Tensor`, *optional*): Unit noise `(images, 3, height, width)`.
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
        if image is not None and mask_image is None and strength is None:
            strength = DEFAULT_STRENGTH
        return Runner(self, CallArguments.of(locals()), self.stages).run()
