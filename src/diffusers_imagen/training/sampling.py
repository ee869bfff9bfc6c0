"""Samples of validation prompts during training."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from diffusers.utils import logging, make_image_grid
from PIL import Image

from ..models.interface import StageNetwork
from ..pipelines import ImagenPipeline, ImagenSuperResolutionPipeline
from ..text.source import TextSource
from ..utils.files import whole_file
from .config import TrainingConfig
from .data.pixels import BadImage, fit_image, read_image
from .data.pyramid import to_float


logger = logging.get_logger(__name__)

SAMPLES = "samples"
StagePipeline = ImagenPipeline | ImagenSuperResolutionPipeline


class Prompts(NamedTuple):
    """Inputs of samples."""

    text: dict[str, torch.Tensor] | None  # as arguments of a pipeline
    low_res: torch.Tensor | None  # (B, 3, h, w) in [-1, 1]


def read_prompts(config: TrainingConfig, source: TextSource | None) -> Prompts | None:
    """Return the validation prompts, encoded, and their images; None if there are none.

    Raises:
        ValueError: If a prompt is not in the embedding cache, and there is no encoder, or an image cannot be read.
    """
    captions = config.validation_prompts
    if not captions:
        return None
    text = low_res = None
    if source is not None:
        missing = [caption for caption in captions if caption not in source]
        if missing:
            raise ValueError(
                f"`validation_prompts` has {missing[0]!r}, which is not in the embedding cache: pass `text_encoder`, "
                "or use captions of the data as prompts."
            )
        text = prompt_arguments(source, captions)
    if config.low_resolution is not None:
        low_res = torch.stack([read_low_res(path, config) for path in config.validation_images or []])
    return Prompts(text, low_res)


def prompt_arguments(source: TextSource, texts: list[str]) -> dict[str, torch.Tensor]:
    """Return embeddings of texts as arguments of a pipeline without text encoder, with the empty text's if needed."""
    text = source.encode(texts)
    return text.for_pipeline(source.no_text(text) if source.keeps_padding else None)


def read_low_res(path: str, config: TrainingConfig) -> torch.Tensor:
    """Read an image in the low resolution of the stage, `(3, h, w)` in [-1, 1]."""
    try:
        image = read_image(path, "", config.background)
    except BadImage as error:
        raise ValueError(f"`validation_images` has {path!r}, which cannot be used: {error}") from error
    resolution = config.low_resolution or config.resolution
    fitted = fit_image(image, resolution, resolution, interpolation=config.image_interpolation_mode)
    return to_float(torch.from_numpy(fitted.copy()).permute(2, 0, 1))


def stage_pipeline(
    unet: StageNetwork, scheduler: SchedulerMixin, config: TrainingConfig, settings: dict[str, Any]
) -> StagePipeline:
    """Create a single-stage pipeline without a text encoder; `settings` are those of `PretrainedStage.settings`."""
    if unet.takes_low_res:
        return ImagenSuperResolutionPipeline(unet, scheduler, scale_factor=config.factor, **settings)
    return ImagenPipeline(unet, scheduler, **settings)


def draw_samples(pipe: StagePipeline, prompts: Prompts, config: TrainingConfig) -> torch.Tensor:
    """Generate images `(B, 3, H, W)` in [-1, 1] with the stage's pipeline, with the same noise at every call.

    There are `num_validation_images` consecutive images per prompt.
    """
    number = config.num_validation_images
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(config.seed)
    inputs: dict[str, Any] = {"generator": generator, "output_type": "latent"}
    images = None if prompts.low_res is None else (prompts.low_res + 1) / 2
    if prompts.text is not None:
        given = {} if images is None else {"image": images}
        return pipe(**prompts.text, **given, num_images_per_prompt=number, **inputs).images
    inputs["guidance_scale"] = 1.0
    if images is None:
        return pipe(num_images_per_prompt=number * len(config.validation_prompts or []), **inputs).images
    return torch.cat([pipe(image=image, num_images_per_prompt=number, **inputs).images for image in images])


def sample_name(step: int) -> str:
    """Return the file name of a step's samples."""
    return f"step-{step:06d}.png"


def sample_step(name: str) -> int | None:
    """Return the step of a file of samples; None for another file."""
    match = re.fullmatch(r"step-([0-9]+)\.png", name)
    return None if match is None or sample_name(int(match[1])) != name else int(match[1])


def show_samples(accelerator: Accelerator, images: torch.Tensor, config: TrainingConfig, step: int) -> None:
    """Write the images of a step, and log them to tensorboard or wandb, unless they are not finite."""
    if not images.isfinite().all():
        logger.warning(f"The samples of step {step} are not finite: they are not written.")
        return
    write_samples(images, config.output_dir, step, rows=config.num_validation_images)
    captions = [caption for caption in config.validation_prompts or [] for _ in range(config.num_validation_images)]
    log_samples(accelerator, images, captions, step)


def write_samples(images: torch.Tensor, output_dir: str, step: int, rows: int = 1) -> Path:
    """Write the images to a PNG file, with a column of `rows` images per prompt."""
    pixels = to_uint8(images)
    pixels = pixels.reshape(-1, rows, *pixels.shape[1:]).swapaxes(0, 1).reshape(pixels.shape)
    folder = Path(output_dir) / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / sample_name(step)
    with whole_file(path) as partial:
        make_image_grid([Image.fromarray(image) for image in pixels], rows, cols=len(pixels) // rows).save(
            partial, "PNG"
        )
    return path


def log_samples(accelerator: Accelerator, images: torch.Tensor, captions: list[str], step: int) -> None:
    """Log the images to tensorboard or wandb."""
    pixels = to_uint8(images)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("samples", pixels, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            pairs = zip(pixels, captions)
            tracker.log({"samples": [wandb.Image(image, caption=caption) for image, caption in pairs]}, step=step)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Convert images in [-1, 1] `(B, 3, H, W)` to pixels `(B, H, W, 3)`."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
