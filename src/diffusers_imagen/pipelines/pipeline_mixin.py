"""What the pipelines share besides the runner of a call: memory, progress bars, the text of a prompt."""

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
    _lock = threading.RLock()  # its own: tqdm keeps the one of all bars where a bar cannot be shown


class ImagenPipelineMixin(ModelCardMixin):
    """
    Put before `DiffusionPipeline` in a pipeline's bases. The pipeline names its `stages`, and its `__call__` hands its
    arguments to a [`Runner`], which does the rest.
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
        """Makes `DiffusionPipeline.from_pretrained` take components that are given, None too, as this class's does.

        Called on the base class, it takes what has a default for a setting, and loads the component all the same.
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
        As diffusers' `from_pretrained`; opens the folder or repository of a pipeline of DeepFloyd IF too, as `from_stage`
        does, and `"imagen-emoji"`, the cascade that ships with this package.
        """
        place = find_source(pretrained_model_name_or_path)
        source, options = find_pipeline(place, kwargs)
        if source is not None:
            return cls.from_stage(source, **options)
        return super().from_pretrained(place, **options)  # type: ignore[misc]  # DiffusionPipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers' `from_pipe`; makes a stage of a loaded pipeline of DeepFloyd IF too, as `from_stage` does."""
        if is_deepfloyd(type(pipeline).__name__):
            return cls.from_stage(pipeline, **kwargs)
        return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]  # DiffusionPipeline

    @classmethod
    def from_stage(cls, source: StageSource, **kwargs: Any) -> Any:
        r"""
        Opens one stage, from wherever it is.

        Args:
            source (`str`, [`DiffusionPipeline`] or `tuple`):
                The folder that training wrote, a Hub id, a single-stage pipeline, the pair of a network and its scheduler,
                or a stage of DeepFloyd IF: its folder, Hub id or loaded pipeline of diffusers.
            kwargs:
                As [`ImagenCascadePipeline.from_stages`] has them: `text_encoder`, `tokenizer`, `safety_checker`,
                `feature_extractor`, `watermarker`, `quantization_config`, `dtype`, `variant`, `token`, `revision` and the
                like; and settings of the pipeline itself, such as `scale_factor`.

        Raises:
            ValueError: If the source is no stage of the pipeline's kind, was never trained or lacks weights.
        """
        names = inspect.signature(cls.__init__).parameters
        if "unet" not in names:
            raise ValueError(f"`source` is {shown(source)}, one stage; {cls.__name__}.from_stages composes them.")
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in names and name in kwargs}
        upscales = "scale_factor" in names
        parts, shared = load_stages({"source": source}, {"source": upscales}, kwargs)
        own = {name: value for name, value in parts["source"].items() if name in names and value is not None}
        pipe = cls(**{**own, **dict.fromkeys(TEXT_PARTS + SAFETY_PARTS), **shared, **settings})
        check_stages(pipe.stages, pipe.text_width)
        refuse_untrained(pipe.stages)
        return pipe

    def register_modules(self, **components) -> None:
        """As diffusers' `register_modules`, which gets every component; refuses those that lack weights or others."""
        check_components(components)
        check_filter({name: components.get(name, getattr(self, name, None)) for name in SAFETY_PARTS})
        super().register_modules(**components)  # type: ignore[misc]  # of DiffusionPipeline

    def register_settings(
        self, call_defaults: dict[str, Any] | None, clean_caption: bool, origin: dict[str, Any] | None
    ) -> None:
        """Puts what is no component into the configuration, which is saved with the components.

        Raises:
            ValueError: If a value is none that it can be.
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
        """Raises ValueError unless these are settings of a call by name; a cascade has them by stage."""
        BASE.defaults.updated("call_defaults", call_defaults)

    def check_origin(self, origin: Any) -> None:
        """Raises ValueError unless this says where the weights are from; a cascade has it by stage."""
        check_origin("origin", origin)

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
            tile_size (`int`, defaults to 256): Height and width of a tile, in pixels of the stage's image.
            overlap (`int`, defaults to 64): Pixels that neighbours share.

        Raises:
            ValueError: If a network cannot take such tiles, or they do not advance.
        """
        self.tiling = inputs.check_tiling(tile_size, overlap, [stage for stage in self.stages if not stage.is_base])

    def disable_tiling(self) -> None:
        """Runs super-resolution networks on whole images again."""
        self.tiling = None

    def enable_slicing(self, slice_size: int | dict[str, int] = 1) -> None:
        """
        Runs models on so many images at a time, so that a batch of any size fits into memory.

        Without this call a network is run on as many images as have 2**20 pixels: 256 of 64 px, 16 of 256 px, one of
        1024 px; of tiles, as many as have that in a tile. Images are the same for every slice size, but for rounding;
        with slices of one, an image made alone and one made in a batch are the same to the last bit.

        Args:
            slice_size (`int` or `dict[str, int]`, defaults to 1):
                Images a call, of all models or by stage name, such as `{"sr256": 4}`; stages that a dict lacks, the text
                encoder and the safety checker are run as without this call. With guidance a call of a network has twice
                as many samples.

        Raises:
            ValueError: If it is neither a number of images nor a dict of them by stage name.
        """
        self.slice_size = check_slice_size(slice_size, inputs.MAX_IMAGES)

    def disable_slicing(self) -> None:
        """Runs every model on the whole batch, whatever its size."""
        self.slice_size = inputs.MAX_IMAGES

    def memory_report(self) -> str:
        """A line for each model: parameters, memory of its weights in MiB, dtype and device, and their sum."""
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
        """As diffusers' `to`; layers of the text encoder that float16 is too narrow for stay in float32."""
        pipe = super().to(*args, **kwargs)  # type: ignore[misc]  # of DiffusionPipeline
        keep_in_fp32(pipe.text_encoder)
        return pipe

    def set_progress_bar_config(self, **kwargs) -> None:
        """As diffusers' `set_progress_bar_config`, but refuses here what tqdm would refuse in the middle of a call."""
        own = {"total", "iterable"} & set(kwargs)
        if own:
            raise ValueError(f"A progress bar's {sorted(own)} are the pipeline's to say.")
        try:
            with _TrialBar(**{"file": io.StringIO(), **kwargs, "disable": False, "total": 1}) as bar:
                bar.set_description("base 64 px")
                bar.update()
        except Exception as error:
            raise ValueError(f"{shown(kwargs)} are no arguments of a progress bar: {error}") from error
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
        Encodes prompts, unless embeddings are given, and repeats everything for the images of each prompt.

        With `clean_caption` in the pipeline's configuration, prompts and negative prompts are cleaned first, as DeepFloyd
        IF's captions were in training; without beautifulsoup4 and ftfy they are put in lower case and stripped.

        Without a negative prompt the negative embeddings are what the networks saw of dropped captions in training: zeros
        under the prompt's mask, or for networks that attend to padding the embeddings of the empty text. To free the text
        encoder before the networks run, call this first, and then the pipeline with what it returns (docs/memory.md).

        Returns:
            `prompt_embeds` `(images, tokens, width)`, `prompt_attention_mask` `(images, tokens)`,
            `negative_prompt_embeds`, `negative_prompt_attention_mask`.

        Raises:
            ValueError: If an argument does not fit, or the encoder's embeddings are not finite.
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
        """Width of the text's embeddings; None without a text encoder."""
        if self.text_encoder is None:
            return None
        return encoder_width(self.text_encoder.config) if self.text_source is None else self.text_source.width

    @property
    def text_source(self) -> TextSource | None:
        """What encodes prompts, made of the components; None without a text encoder or its tokenizer.

        A pipeline with other encoders overrides this, and names them among its components.
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
        """Whether embeddings are kept as they are at padded positions, because some network attends to them."""
        return any(stage.unet.attends_padding for stage in self.stages)
