"""Samples of given prompts while a stage is trained."""

import os
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import SchedulerMixin
from diffusers.utils import make_image_grid
from PIL import Image

from ..diffusion.augmentation import augment_low_res
from ..diffusion.guidance import classifier_free_guidance
from ..models.unet_base import ConditionalUNet
from ..pipelines.pipeline_imagen_cascade import DEFAULT_GUIDANCE, DEFAULT_STEPS
from .config import TrainingConfig
from .data.images import BadImage, fit_image, read_image
from .data.pyramid import to_float
from .embedding_cache import EmbeddingCache


SAMPLES = "samples"
AUGMENTATION_SIGMA = 0.1  # the pipelines' `low_res_noise_level`
DDPM_STEPS = 100  # ancestral sampling needs more than the EDM samplers


class Prompts(NamedTuple):
    """What samples are drawn for."""

    text: Optional[torch.Tensor]  # (B, L, E)
    mask: Optional[torch.Tensor]  # (B, L)
    low_res: Optional[torch.Tensor]  # (B, 3, h, w) in [-1, 1]


def read_prompts(config: TrainingConfig, encode: Optional[Callable[[list[str]], tuple]]) -> Optional[Prompts]:
    """The validation prompts, encoded, and their images; None if there are none.

    Raises:
        ValueError: If a prompt is not in the embedding cache, or an image cannot be read.
    """
    captions = config.validation_prompts
    if not captions:
        return None
    text = mask = low_res = None
    if encode is not None:
        text, mask = encode(captions)
    elif config.embedding_cache is not None:
        cache = EmbeddingCache(config.embedding_cache)
        missing = [caption for caption in captions if caption not in cache]
        if missing:
            raise ValueError(
                f"`validation_prompts` has {missing[0]!r}, which is not in the embedding cache: give `text_encoder`, "
                "or prompts that are captions of the data."
            )
        text, mask = cache.states(captions)
    if config.low_resolution is not None:
        low_res = torch.stack([read_low_res(path, config) for path in config.validation_images])
    return Prompts(text, mask, low_res)


def read_low_res(path: str, config: TrainingConfig) -> torch.Tensor:
    """An image of the side that the stage enlarges, `(3, h, w)` in [-1, 1]."""
    try:
        image = read_image(path, "", config.background)
    except BadImage as error:
        raise ValueError(f"`validation_images` has {path!r}, which cannot be used: {error}") from error
    side = config.low_resolution
    return to_float(torch.from_numpy(fit_image(image, side, side).copy()).permute(2, 0, 1))


@torch.no_grad()
def draw_samples(unet: ConditionalUNet, scheduler: SchedulerMixin, prompts: Prompts, config: TrainingConfig):
    """Images `(B, 3, H, W)` in [-1, 1] with the pipelines' default steps and guidance, the same noise at every call."""
    device = next(unet.parameters()).device
    kind = "base" if prompts.low_res is None else "sr256"
    guidance = DEFAULT_GUIDANCE[kind] if prompts.text is not None else 1.0
    count = len(config.validation_prompts)
    generator = torch.Generator().manual_seed(config.seed)

    low_res, low_res_timestep = prompts.low_res, None
    if low_res is not None and unet.config.low_res_noise_conditioning:
        noise = torch.randn(low_res.shape, generator=generator)
        low_res, low_res_timestep = augment_low_res(low_res, AUGMENTATION_SIGMA, noise, config.sigma_data)
    if low_res is not None:
        low_res = F.interpolate(low_res, (config.resolution, config.resolution), mode="bicubic")

    branches = 2 if guidance != 1.0 else 1  # without the text and with it
    conditions = [prompts.text, prompts.mask, low_res, low_res_timestep]
    text, mask, low_res, low_res_timestep = (
        None if x is None else x.to(device).repeat(branches, *[1] * (x.ndim - 1)) for x in conditions
    )
    if text is not None and branches == 2:
        text[:count] = 0

    steps = DEFAULT_STEPS[kind] if config.preconditioning == "edm" else DDPM_STEPS
    scheduler.set_timesteps(steps, device=device)
    shape = (count, unet.config.in_channels, config.resolution, config.resolution)
    sample = torch.randn(shape, generator=generator).to(device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, timestep).repeat(branches, 1, 1, 1)
        output = unet(model_input, timestep, text, mask, low_res, low_res_timestep, return_dict=False)[0].float()
        if branches == 2:
            output = classifier_free_guidance(*reversed(output.chunk(2)), guidance)
        sample = scheduler.step(output, timestep, sample, generator=generator, return_dict=False)[0]
    return sample.clamp(-1, 1)


def write_samples(images: torch.Tensor, output_dir: str, step: int) -> Path:
    """The images side by side as a PNG, written beside its place and then moved there."""
    pixels = to_uint8(images)
    folder = Path(output_dir) / SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.png"
    partial = path.with_name(f".{path.name}.partial")
    make_image_grid([Image.fromarray(image) for image in pixels], rows=1, cols=len(pixels)).save(partial, "PNG")
    os.replace(partial, path)
    return path


def log_samples(accelerator: Accelerator, images: torch.Tensor, captions: list[str], step: int) -> None:
    """Hands the images to tensorboard or wandb."""
    pixels = to_uint8(images)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("samples", pixels, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            pairs = zip(pixels, captions)
            tracker.log({"samples": [wandb.Image(image, caption=caption) for image, caption in pairs]}, step=step)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1] `(B, 3, H, W)` as pixels `(B, H, W, 3)`."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
