"""ImagenPipeline: a single base stage, as saved by training."""

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
            Tokenizer; its `model_max_length` is the number of tokens that the network was trained with.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Frozen text encoder.
        guidance_unet ([`ImagenUNetModel`] or [`EfficientUNetModel`], *optional*):
            A weaker network for autoguidance, see [`ImagenCascadePipeline`].
        safety_checker ([`IFSafetyChecker`], *optional*):
            DeepFloyd IF's safety checker: images that it flags are black, see [`ImagenPipelineOutput`].
        feature_extractor ([`CLIPImageProcessor`], *optional*): Image processor, required by the safety checker.
        watermarker ([`IFWatermarker`], *optional*): Adds IF's watermark to PIL images (`output_type="pil"`).
        call_defaults (`dict[str, float]`, *optional*):
            Defaults of a call's `num_inference_steps`, `guidance_scale` and `low_res_noise_level`.
        clean_caption (`bool`, defaults to `False`):
            Whether prompts are cleaned like DeepFloyd IF's captions before they are encoded.
        origin (`dict[str, str]`, *optional*):
            Origin of the weights, for the model card: `base_model`, a Hub id, and `license`.
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
        """The single stage, as a list."""
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
        Generate images from a prompt, or change images as described by it.

        Args:
            prompt (`str` or `list[str]`): The prompt or prompts.
            negative_prompt (`str` or `list[str]`, *optional*):
                Text to guide away from; by default the unconditional embedding, as in training.
            image, mask_image (PIL image, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Image to change, and mask of the part to repaint; see [`ImagenCascadePipeline.__call__`].
            strength (`float`, *optional*, defaults to 0.7, and to 1 with `mask_image`):
                Share of the steps that run, starting from `image`; 1 starts from pure noise.
            height, width (`int`, *optional*): Size of the images in pixels; the network's `sample_size` if None.
            num_inference_steps (`int`, *optional*): Number of steps; 18, or the value in `call_defaults`.
            sigmas, timesteps (`list[float]`, *optional*):
                Custom noise levels, or conditioning values, for the scheduler, instead of a number of steps.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance; 1 disables it. 4, or the value in `call_defaults`.
            guidance_interval (`tuple[float, float]`, *optional*):
                Lowest and highest noise level (EDM's sigma) at which guidance is applied.
            guidance_rescale (`float`, defaults to 0):
                How far the guided prediction is rescaled to the standard deviation of the unguided one, from 0 to 1.
            num_resample_times (`int`, defaults to 4): Number of times that each step runs with `mask_image`.
            num_images_per_prompt (`int`, defaults to 1): Number of images per prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise: one generator, from which one per image is derived, or one per image.
            latents (`torch.Tensor`, *optional*): Initial unit noise `(images, 3, height, width)`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, width)`, *optional*):
                Text embeddings to use instead of the texts, zero at padded positions.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`):
                Mask of the valid tokens of the embeddings.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagenPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after every network call.
            callback_on_step_end_tensor_inputs (`list[str]`):
                Names of the tensors passed to the callback, which may return changed ones; diffusers'
                `PipelineCallback` declares its own. `pred_original_sample`, the clean image predicted by the call, is
                read-only; it is None if the scheduler does not return it.
            cross_attention_kwargs (`dict`, *optional*):
                `{"scale": 0.5}` sets the weight of the LoRA adapters in this call.

        Examples:

        Returns:
            [`ImagenPipelineOutput`] or `tuple`: the images, and the same images by the stage's resolution.

        Raises:
            ValueError: If an argument is invalid; raised before any network runs.
            FloatingPointError: If a stage computes values that are not finite; names the stage and the likely cause.
        """
        if image is not None and mask_image is None and strength is None:
            strength = DEFAULT_STRENGTH
        return Runner(self, CallArguments.of(locals()), self.stages).run()
