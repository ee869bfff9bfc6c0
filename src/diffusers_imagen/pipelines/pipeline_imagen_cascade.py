"""ImagenCascadePipeline: from a prompt to images through all stages. Next, read `runner.py`, which runs a call."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from diffusers.utils import replace_example_docstring
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.nemo_archive import Config, find_source
from ..conversion.nemo_stage import cascade_components, load_nemo_stage
from ..loaders import ImagenLoraLoaderMixin
from ..text.pretrained import load_text
from ..utils.arguments import is_integer, shown
from .call_arguments import CallArguments, PerStage
from .image_inputs import ImageInput
from .loading.stage_loading import load_stages
from .origin import check_origins
from .pipeline_mixin import ImagenPipelineMixin
from .pipeline_output import ImagenPipelineOutput
from .runner import Runner
from .stage_table import BASE, SAFETY_PARTS, STAGES, check_stage_names
from .stages import Stage, StageSource, UNet, check_factors, check_stages, refuse_untrained


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_imagen import ImagenCascadePipeline

        >>> pipe = ImagenCascadePipeline.from_pretrained("imagen-emoji")
        >>> out = pipe("a 3d render of a tiger face", generator=torch.Generator().manual_seed(0))
        >>> out.images[0].save("tiger.png")  # out.stage_images has the images of every stage
        ```
"""


GUIDE = f"{BASE.name}_guidance_unet"


class ImagenCascadePipeline(ImagenPipelineMixin, DiffusionPipeline, ImagenLoraLoaderMixin):
    r"""
    Pipeline for text-to-image generation with a base stage and super-resolution stages (Imagen, arXiv 2205.11487).

    All components of super-resolution stages are optional, and so are tokenizer and text encoder if embeddings are
    passed. Each stage's scheduler configures how predicted images are thresholded.

    Args:
        base_unet ([`ImagenUNetModel`] or [`EfficientUNetModel`]): Network of the base stage.
        base_scheduler ([`SchedulerMixin`]): Scheduler of the base stage.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; its `model_max_length` is the number of tokens that the stages were trained with.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Frozen text encoder.
        sr256_unet, sr1024_unet ([`EfficientUNetModel`] or [`ImagenUNetModel`], *optional*):
            Networks of the super-resolution stages.
        sr256_scheduler, sr1024_scheduler ([`SchedulerMixin`], *optional*): Their schedulers.
        base_guidance_unet ([`ImagenUNetModel`] or [`EfficientUNetModel`], *optional*):
            A weaker network, less trained or smaller, whose prediction replaces the base stage's prediction without
            text in guidance: autoguidance (arXiv 2406.02507).
        safety_checker ([`IFSafetyChecker`], *optional*):
            DeepFloyd IF's safety checker: images that it flags are black, see [`ImagenPipelineOutput`].
        feature_extractor ([`CLIPImageProcessor`], *optional*): Image processor, required by the safety checker.
        watermarker ([`IFWatermarker`], *optional*): Adds IF's watermark to PIL images (`output_type="pil"`).
        call_defaults (`dict[str, dict[str, float]]`, *optional*):
            By stage name, the defaults of a call's `num_inference_steps`, `guidance_scale` and `low_res_noise_level`.
        clean_caption (`bool`, defaults to `False`):
            Whether prompts are cleaned like DeepFloyd IF's captions before they are encoded.
        origin (`dict[str, dict[str, str]]`, *optional*):
            By stage name, the origin of the weights, for the model card: `base_model`, a Hub id, and `license`.
    """

    model_cpu_offload_seq = "->".join(["text_encoder", GUIDE, *(kind.unet for kind in STAGES), "safety_checker"])
    _optional_components = [
        *("tokenizer", "text_encoder", GUIDE, *SAFETY_PARTS),
        *(part for kind in STAGES[1:] for part in (kind.unet, kind.scheduler)),
    ]

    def __init__(
        self,
        base_unet: UNet,
        base_scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        sr256_unet: UNet | None = None,
        sr256_scheduler: SchedulerMixin | None = None,
        sr1024_unet: UNet | None = None,
        sr1024_scheduler: SchedulerMixin | None = None,
        base_guidance_unet: UNet | None = None,
        safety_checker: IFSafetyChecker | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        watermarker: IFWatermarker | None = None,
        call_defaults: dict | None = None,
        clean_caption: bool = False,
        origin: dict | None = None,
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
            base_guidance_unet=base_guidance_unet,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_settings(call_defaults, clean_caption, origin)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_stages(
        cls,
        base: StageSource,
        *upscalers: StageSource | None,
        **kwargs: Any,
    ) -> "ImagenCascadePipeline":
        r"""
        Compose a cascade from separately trained stages.

        Args:
            base (`str`, [`DiffusionPipeline`] or `tuple`):
                The base stage: the folder of a training run, a Hub id, an [`ImagenPipeline`], a pair of a network and
                its scheduler, or a stage of DeepFloyd IF: its folder, Hub id or loaded `IFPipeline`.
            upscalers (as `base`, *optional*):
                The super-resolution stages, in order; or by name: `sr256`, `sr1024`.
            text_encoder ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`, *optional*):
                The text encoder, or a folder or Hub id with `text_encoder/` and `tokenizer/`. By default that of
                `base`; None omits the text encoder and the tokenizer.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The text encoder's tokenizer.
            safety_checker, feature_extractor, watermarker (*optional*):
                Components that process the final images. By default those of the first stage that has them; None omits
                a component. Omitted components are not downloaded.
            quantization_config (`PipelineQuantizationConfig`, or one of transformers, *optional*):
                Quantization of the text encoder; other components are not quantized.
            kwargs: For `from_pretrained` of the loaded components: `dtype`, `variant` and similar options for
                networks, and `token`, `revision`, `cache_dir`, `local_files_only` and `force_download` for every file.

        Raises:
            ValueError: If a source is not a stage, is untrained, or does not fit the other stages.
        """
        if len(upscalers) >= len(STAGES):
            raise ValueError(f"`upscalers` has {len(upscalers)} stages, but should have at most {len(STAGES) - 1}.")
        sources = dict(zip(STAGES, (base, *upscalers)))
        named = {kind: kwargs.pop(kind.name) for kind in STAGES[1:] if kind.name in kwargs}
        for kind in named.keys() & sources.keys():
            raise ValueError(f"`{kind.name}` is given by name, but `upscalers` has it too.")
        sources |= named
        sources = {kind: source for kind, source in sources.items() if kind is BASE or source is not None}
        parts, components = load_stages(
            {kind.name: source for kind, source in sources.items()},
            {kind.name: kind.takes_low_res for kind in sources},
            kwargs,
        )
        for kind in sources:
            components |= {kind.unet: parts[kind.name]["unet"], kind.scheduler: parts[kind.name]["scheduler"]}
        for setting in ("call_defaults", "origin"):
            values = {name: of_stage[setting] for name, of_stage in parts.items() if of_stage.get(setting) is not None}
            components[setting] = values or None
        components[GUIDE] = parts[BASE.name].get("guidance_unet")
        # the text encoder is that of the base stage, and so is the cleaning of its captions
        components["clean_caption"] = bool(parts[BASE.name].get("clean_caption"))
        factors = {kind: parts[kind.name].get("scale_factor") for kind in sources}
        pipe = cls(**components)
        check_stages(pipe.stages, pipe.text_width)
        check_factors(pipe.stages, factors)
        refuse_untrained(pipe.stages)
        return pipe

    @classmethod
    def from_nemo(
        cls,
        base: str | os.PathLike,
        sr256: str | os.PathLike | None = None,
        sr1024: str | os.PathLike | None = None,
        text_encoder: str | os.PathLike | None = None,
        configs: Mapping[str, Config] | None = None,
        ema: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "ImagenCascadePipeline":
        r"""
        Load a cascade from NVIDIA NeMo's checkpoints. `diffusers-imagen convert-nemo` writes a converted cascade to a
        folder.

        Args:
            base, sr256, sr1024 (`str` or `os.PathLike`):
                The stages: `.nemo` archives, folders with the unpacked archives, or `.ckpt` files of Lightning.
            text_encoder (`str` or `os.PathLike`, *optional*):
                Folder or Hub id of the text encoder of training, T5-11B for NeMo's own models; prompts are cut and
                padded to the base stage's `token_length`. Without it, calls require embeddings.
            configs (`dict[str, str or dict]`, *optional*):
                By stage name, NeMo's configuration for a checkpoint without one.
            ema (`bool`, defaults to `False`):
                Whether to load the averaged weights, from `NAME-EMA.ckpt` beside `NAME.ckpt`.
            dtype (`torch.dtype`, *optional*): Dtype of the weights; that of each checkpoint if None.

        Raises:
            ValueError: If a source is not such a checkpoint, is damaged, or the stages do not fit together.
        """
        sources = {kind: source for kind, source in zip(STAGES, (base, sr256, sr1024)) if source is not None}
        check_stage_names("configs", configs)
        configs = configs or {}
        for kind, source in sources.items():  # all of them before the first is loaded
            find_source(source, ema, kind.name)
        stages = {
            kind: load_nemo_stage(source, configs.get(kind.name), ema, dtype, kind.name).parts
            for kind, source in sources.items()
        }
        text = {}
        if text_encoder is not None:
            text = load_text(str(text_encoder), stages[BASE].token_length)
        pipe = cls(**text, **cascade_components({kind.name: parts for kind, parts in stages.items()}))
        check_stages(pipe.stages, pipe.text_width)
        check_factors(pipe.stages, {kind: parts.scale_factor for kind, parts in stages.items()})
        return pipe

    def check_call_defaults(self, call_defaults: Any) -> None:
        check_stage_names("call_defaults", call_defaults)
        for name, given in (call_defaults or {}).items():
            BASE.defaults.updated(f"call_defaults of {name}", given)

    def check_origin(self, origin: Any) -> None:
        check_origins("origin", origin)

    @property
    def stages(self) -> list[Stage]:
        """The pipeline's stages, in the order in which they run."""
        parts = ((kind, getattr(self, kind.unet), getattr(self, kind.scheduler)) for kind in STAGES)
        guides, given = {BASE: self.base_guidance_unet}, self.config.call_defaults or {}
        return [
            Stage(
                kind, unet, scheduler, guides.get(kind), kind.defaults.updated("call_defaults", given.get(kind.name))
            )
            for kind, unet, scheduler in parts
            if unet is not None
        ]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        output_resolution: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: PerStage[int] | None = None,
        sigmas: list[float] | dict[str, list[float]] | None = None,
        timesteps: list[float] | dict[str, list[float]] | None = None,
        guidance_scale: PerStage[float] | None = None,
        guidance_interval: PerStage[tuple[float, float]] | None = None,
        guidance_rescale: PerStage[float] = 0.0,
        low_res_noise_level: PerStage[float] | None = None,
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
        Generate images from a prompt, or change or upscale images as described by it.

        Arguments with a value per stage accept one value for all stages, a list with one value per stage that runs, or
        a dict by stage name: `base`, `sr256`, `sr1024`. Stages that a dict does not name have their default.

        Args:
            prompt (`str` or `list[str]`): The prompt or prompts.
            negative_prompt (`str` or `list[str]`, *optional*):
                Text to guide away from; by default the unconditional embedding, as in training.
            image (PIL image, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                One image for all prompts or one per prompt, or any number if no stage that runs is conditioned on
                text; of any size. PIL or uint8, or floating point in [0, 1], or in [-1, 1] if any value is negative;
                channels last in arrays and first in tensors. Without the two arguments below, it replaces the base
                stage's image, and super-resolution starts from it; with `strength` the base stage changes it; with
                `mask_image` a part of it is repainted. It is stretched to the size of the stage: pass `height` and
                `width` with its aspect ratio.
            mask_image (as `image`, *optional*):
                Mask of the same size as the image, white (1, or 255 in uint8) where the image is repainted. Every
                stage keeps the image's other pixels, at the stage's resolution.
            strength (`float`, *optional*):
                How much the base stage changes `image`: the share of its steps that run, above 0. 1 starts from pure
                noise, and is the default with `mask_image`.
            output_resolution (`int`, *optional*):
                Resolution of the last stage to run; that of the cascade's last stage if None.
            height, width (`int`, *optional*):
                Size of the last image in pixels; earlier stages are scaled in proportion. `output_resolution` if None.
            num_inference_steps (`int`, `list[int]` or `dict[str, int]`, *optional*):
                Number of steps. By default the value in `call_defaults`, or else 18 for the base stage and 8 for
                super-resolution.
            sigmas, timesteps (`list[float]` or `dict[str, list[float]]`, *optional*):
                Custom noise levels, or conditioning values, for the scheduler, instead of a number of steps; a dict by
                stage name if several stages run.
            guidance_scale (`float`, `list[float]` or `dict[str, float]`, *optional*):
                Weight of classifier-free guidance; 1 disables it. By default the value in `call_defaults`, or else 4
                for the base stage and 1 for super-resolution.
            guidance_interval (`tuple[float, float]`, `list` or `dict` of them, *optional*):
                Lowest and highest noise level (EDM's sigma) at which guidance is applied; outside, the network runs
                only with the prompt (arXiv 2404.07724).
            guidance_rescale (`float`, `list[float]` or `dict[str, float]`, defaults to 0):
                How far the guided prediction is rescaled to the standard deviation of the unguided one, from 0 to 1
                (arXiv 2305.08891).
            low_res_noise_level (`float`, `list[float]` or `dict[str, float]`, *optional*):
                Sigma of the noise added to the low-resolution image; a list has one value per super-resolution stage.
                Not used by stages without noise conditioning. By default the value in `call_defaults`, or else 0.1.
            num_resample_times (`int`, defaults to 4):
                Number of times that the base stage runs each step with `mask_image`, to harmonize new and known pixels
                (RePaint, arXiv 2201.09865).
            num_images_per_prompt (`int`, defaults to 1): Number of images per prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all noise: one generator, from which one per image is derived, or one per image. An image
                depends on the seed and its position, and not on the size of the batch.
            latents (`torch.Tensor`, *optional*):
                Initial unit noise `(images, 3, height, width)` of the first stage that runs.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(prompts, tokens, width)`, *optional*):
                Text embeddings to use instead of the texts, zero at padded positions.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(prompts, tokens)`):
                Mask of the valid tokens of the embeddings.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagenPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after every network call, counted over all stages.
            callback_on_step_end_tensor_inputs (`list[str]`):
                Names of the tensors passed to the callback, which may return changed ones; diffusers'
                `PipelineCallback` declares its own. `pred_original_sample`, the clean image predicted by the call, is
                read-only; it is None if the scheduler does not return it.
            cross_attention_kwargs (`dict`, *optional*):
                `{"scale": 0.5}` sets the weight of the LoRA adapters in this call.

        Examples:

        Returns:
            [`ImagenPipelineOutput`] or `tuple`: the images of the last stage, and those of every stage by resolution.

        Raises:
            ValueError: If an argument is invalid; raised before any network runs.
            FloatingPointError: If a stage computes values that are not finite; names the stage and the likely cause.
        """
        arguments = CallArguments.of(locals())
        upscales = image is not None and mask_image is None and strength is None
        stages = self.stages_up_to(output_resolution, skip_base=upscales)
        return Runner(self, arguments, stages, self.stages[0].resolution if upscales else None).run()

    def stages_up_to(self, output_resolution: int | None, skip_base: bool = False) -> list[Stage]:
        """Return the stages up to a resolution, starting from noise or from a given low-resolution image.

        Raises:
            ValueError: If no stage has this resolution.
        """
        stages = self.stages[1:] if skip_base else self.stages
        resolutions = [stage.resolution for stage in stages]
        if not stages:
            raise ValueError(
                "`image` is given without `strength` and `mask_image`, which starts super-resolution, but this "
                "cascade has no super-resolution stage: pass `strength` or `mask_image` too, or load a stage."
            )
        if output_resolution is None:
            return stages
        if not is_integer(output_resolution) or output_resolution not in resolutions:
            raise ValueError(
                f"`output_resolution` is {shown(output_resolution)}, but should be that of a stage, one of "
                f"{resolutions}."
            )
        return stages[: resolutions.index(output_resolution) + 1]
