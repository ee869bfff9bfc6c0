"""ImagenPipelineMixin, the base of all pipelines: loading, memory, progress bars, and encoding of prompts."""

import inspect
import io
import os
import threading
from typing import Any

import torch
from tqdm.auto import tqdm

from ..text.encoder import TextEncoder, keep_in_fp32
from ..text.identity import encoder_width
from ..text.source import TextSource
from ..utils.arguments import shown
from ..utils.modules import memory_of
from ..utils.shipped import find_source
from . import inputs
from .callbacks import PREDICTED
from .content_filter import check_filter
from .loading.deepfloyd_repository import find_pipeline, is_deepfloyd
from .loading.folder_checks import SETTINGS
from .loading.stage_loading import load_stages
from .model_card import ModelCardMixin
from .origin import DEEPFLOYD, check_origin, list_origins, warn_of_missing_filter
from .prompts import PROMPT_EMBEDS, Prompts
from .slicing import SliceSize, check_slice_size, shared_size
from .stage_table import BASE, NETWORKS, SAFETY_PARTS, TEXT_PARTS
from .stages import StageSource, check_components, check_stages, refuse_untrained
from .tiling import Tiling


class _TrialBar(tqdm):
    _lock = threading.RLock()  # a separate lock: tqdm does not release the shared one if a bar cannot be shown


class ImagenPipelineMixin(ModelCardMixin):
    """
    Mixin of all pipelines; list it before `DiffusionPipeline` among the base classes. The pipeline implements
    `stages`, and its `__call__` passes its arguments to a [`Runner`].
    """

    _execution_device: torch.device
    safety_checker: Any
    _callback_tensor_inputs = ["latents", PREDICTED, *PROMPT_EMBEDS]
    _exclude_from_cpu_offload = ["watermarker"]
    _lora_loadable_modules = list(NETWORKS)
    tiling: Tiling | None = None
    slice_size: SliceSize = None
    _num_timesteps = 0
    _guidance_scale = 1.0
    _interrupt = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """
        Make `DiffusionPipeline.from_pretrained` accept components as arguments, including None, like this class's own.

        Called on the base class, it would treat parameters with a default as settings, and still load the component.
        """
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            return
        first, *parameters = inspect.signature(cls.__init__).parameters.values()
        optional = getattr(cls, "_optional_components", [])
        named = [
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if parameter.name in optional else parameter.default,
            )
            for parameter in parameters
            if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        ]
        cls.__init__.__signature__ = inspect.Signature([first, *named])  # type: ignore[attr-defined]  # of a function

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """
        Load a pipeline like diffusers' `from_pretrained`; also opens a folder or repository of DeepFloyd IF, like
        `from_stage`, and `"imagen-emoji"`, the cascade that ships with this package.
        """
        place = find_source(pretrained_model_name_or_path)
        source, options = find_pipeline(place, kwargs)
        if source is not None:
            return cls.from_stage(source, **options)
        return super().from_pretrained(place, **options)  # type: ignore[misc]  # DiffusionPipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """
        Convert a pipeline like diffusers' `from_pipe`; also accepts a loaded pipeline of DeepFloyd IF, like
        `from_stage`. Settings such as `call_defaults` are kept, which `components` does not include.
        """
        if is_deepfloyd(type(pipeline).__name__):
            return cls.from_stage(pipeline, **kwargs)
        return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]  # DiffusionPipeline

    @classmethod
    def from_stage(cls, source: StageSource, **kwargs: Any) -> Any:
        r"""
        Load a single stage from any source.

        Args:
            source (`str`, [`DiffusionPipeline`] or `tuple`):
                The folder of a training run, a Hub id, a single-stage pipeline, a pair of a network and its scheduler,
                or a stage of DeepFloyd IF: its folder, Hub id or loaded pipeline of diffusers.
            kwargs:
                As in [`ImagenCascadePipeline.from_stages`]: `text_encoder`, `tokenizer`, `safety_checker`,
                `feature_extractor`, `watermarker`, `quantization_config`, `dtype`, `variant`, `token`, `revision` and
                similar options; and settings of the pipeline itself, such as `scale_factor`.

        Raises:
            ValueError: If the source is not a stage of the pipeline's kind, is untrained, or lacks weights.
        """
        names = inspect.signature(cls.__init__).parameters
        if "unet" not in names:
            raise ValueError(f"`source` is {shown(source)}, one stage; use {cls.__name__}.from_stages for a cascade.")
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in names and name in kwargs}
        upscales = "scale_factor" in names
        parts, shared = load_stages({"source": source}, {"source": upscales}, kwargs)
        own = {name: value for name, value in parts["source"].items() if name in names and value is not None}
        pipe = cls(**{**own, **dict.fromkeys(TEXT_PARTS + SAFETY_PARTS), **shared, **settings})
        check_stages(pipe.stages, pipe.text_width)
        refuse_untrained(pipe.stages)
        return pipe

    def register_modules(self, **components) -> None:
        """
        Register components like diffusers' method, which receives all of them; reject incomplete or missing ones.
        """
        check_components(components)
        check_filter({name: components.get(name, getattr(self, name, None)) for name in SAFETY_PARTS})
        super().register_modules(**components)  # type: ignore[misc]  # of DiffusionPipeline

    def register_settings(
        self, call_defaults: dict[str, Any] | None, clean_caption: bool, origin: dict[str, Any] | None
    ) -> None:
        """Add settings that are not components to the configuration, which is saved with the components.

        Raises:
            ValueError: If a value is invalid.
        """
        inputs.check_flag("clean_caption", clean_caption)
        self.check_call_defaults(call_defaults)
        self.check_origin(origin)
        settings = {"call_defaults": call_defaults, "clean_caption": clean_caption, "origin": origin}
        self.register_to_config(**settings)  # type: ignore[attr-defined]  # of ConfigMixin
        licenses = {part.get("license") for part in list_origins(origin)}
        if DEEPFLOYD in licenses and self.safety_checker is None:
            warn_of_missing_filter(type(self).__name__)

    def check_call_defaults(self, call_defaults: Any) -> None:
        """Raise ValueError unless these are arguments of a call by name; for a cascade, by stage."""
        BASE.defaults.updated("call_defaults", call_defaults)

    def check_origin(self, origin: Any) -> None:
        """Raise ValueError unless this is an origin of weights; for a cascade, by stage."""
        check_origin("origin", origin)

    @property
    def num_timesteps(self) -> int:
        """Number of network calls of the running or last call, over all stages."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running stage; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the call was interrupted; set `_interrupt` in a callback to stop after the current step."""
        return self._interrupt

    # ---- memory

    def enable_tiling(self, tile_size: int = 256, overlap: int = 64) -> None:
        """
        Run super-resolution networks on overlapping tiles, and blend their outputs at every step.

        A network then needs the memory for one tile, regardless of the size of the image.

        Args:
            tile_size (`int`, defaults to 256): Height and width of a tile, in pixels of the stage's image.
            overlap (`int`, defaults to 64): Pixels that adjacent tiles share.

        Raises:
            ValueError: If a network does not support such tiles, or the overlap is not below the tile size.
        """
        self.tiling = inputs.check_tiling(tile_size, overlap, [stage for stage in self.stages if not stage.is_base])

    def disable_tiling(self) -> None:
        """Run super-resolution networks on whole images again."""
        self.tiling = None

    def enable_slicing(self, slice_size: int | dict[str, int] = 1) -> None:
        """
        Run models on a limited number of images at a time, so that a batch of any size fits into memory.

        By default, a network call has as many images as have 2**20 pixels together: 256 of 64 px, 16 of 256 px, one of
        1024 px; with tiling, the pixels of tiles count. Images are equal for every slice size up to rounding; with
        slices of one, an image is the same to the last bit whether it is generated alone or in a batch.

        Args:
            slice_size (`int` or `dict[str, int]`, defaults to 1):
                Images per call, for all models or by stage name, such as `{"sr256": 4}`. Stages that a dict does not
                name, the text encoder and the safety checker keep the default. With guidance, a network call has twice
                as many samples.

        Raises:
            ValueError: If it is neither a number of images nor a dict of them by names of this pipeline's stages.
        """
        self.slice_size = check_slice_size(slice_size, inputs.MAX_IMAGES, [stage.name for stage in self.stages])

    def disable_slicing(self) -> None:
        """Run every model on the whole batch, regardless of its size."""
        self.slice_size = inputs.MAX_IMAGES

    def memory_report(self) -> str:
        """Return a table of the models: parameters, memory of the weights in MiB, dtype and device, and the total."""
        lines, total = [], 0.0
        for name, module in self.components.items():
            if not isinstance(module, torch.nn.Module):
                continue
            parameters = list(module.parameters())
            size = sum(map(memory_of, parameters)) / 2**20
            count = sum(parameter.numel() for parameter in parameters) / 1e6
            lines.append(f"{name:<20}{count:>10.1f} M{size:>12.1f} MiB  {module.dtype}  {module.device}")
            total += size
        return "\n".join([*lines, f"{'all weights':<20}{'':>12}{total:>12.1f} MiB"])

    def to(self, *args, **kwargs):
        """
        Move the pipeline like diffusers' `to`; layers of the text encoder that overflow in float16 stay in float32.
        """
        pipe = super().to(*args, **kwargs)  # type: ignore[misc]  # of DiffusionPipeline
        keep_in_fp32(pipe.text_encoder)
        return pipe

    def set_progress_bar_config(self, **kwargs) -> None:
        """
        Configure progress bars like diffusers' method, but raise ValueError for arguments that tqdm would reject.
        """
        own = {"total", "iterable"} & set(kwargs)
        if own:
            raise ValueError(
                f"{sorted(own)} should not be given: the pipeline sets these arguments of a progress bar."
            )
        try:
            with _TrialBar(**{"file": io.StringIO(), **kwargs, "disable": False, "total": 1}) as bar:
                bar.set_description("base 64 px")
                bar.update()
        except Exception as error:
            raise ValueError(f"{shown(kwargs)} are invalid arguments of a progress bar: {error}") from error
        super().set_progress_bar_config(**kwargs)  # type: ignore[misc]  # of DiffusionPipeline

    # ---- text

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        r"""
        Encode prompts, unless embeddings are given, and repeat the results for the images of each prompt.

        With `clean_caption` in the pipeline's configuration, prompts and negative prompts are cleaned first, like
        DeepFloyd IF's captions in training; without beautifulsoup4 and ftfy they are only converted to lower case and
        stripped.

        Without a negative prompt, the negative embeddings are those of dropped captions in training: zeros with the
        prompt's mask, or, for networks that attend to padding, the embeddings of the empty text. To free the text
        encoder before the networks run, call this method first, and pass the results to the pipeline (docs/memory.md).

        Returns:
            `prompt_embeds` `(images, tokens, width)`, `prompt_attention_mask` `(images, tokens)`,
            `negative_prompt_embeds`, `negative_prompt_attention_mask`.

        Raises:
            ValueError: If an argument is invalid, or the encoder's embeddings are not finite.
        """
        prompts = Prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        if any(value is not None for value in vars(prompts).values()):  # networks without text need none
            prompts.check(self.text_source)
        number = inputs.as_images_per_prompt(num_images_per_prompt, prompts.number)
        return prompts.encode(self.text_source, shared_size(self.slice_size), number, self._execution_device)

    @property
    def text_width(self) -> int | None:
        """Width of the text embeddings; None without a text encoder."""
        if self.text_encoder is None:
            return None
        return encoder_width(self.text_encoder.config) if self.text_source is None else self.text_source.width

    @property
    def text_source(self) -> TextSource | None:
        """Encoder of prompts, built from the components; None without a text encoder or its tokenizer.

        Pipelines with other encoders override this property, and list the encoders among their components.
        """
        if self.text_encoder is None or self.tokenizer is None:
            return None
        return TextEncoder(
            self.tokenizer,
            self.text_encoder,
            keeps_padding=self.keeps_padding,
            cleans_captions=self.config.clean_caption,
        )

    @property
    def keeps_padding(self) -> bool:
        """Whether embeddings at padded positions are kept, because at least one network attends to them."""
        return any(stage.unet.attends_padding for stage in self.stages)
