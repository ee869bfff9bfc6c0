"""Small networks of DeepFloyd IF's architecture, trained on synthetic shapes, for `compare_solvers.py`.

Stage I generates 16 x 16 pixels from a caption; stage II upsamples them to 32 x 32. A caption has one token each for
shape, color and background, and padding; tokens are random vectors instead of T5's embeddings.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.conversion.deepfloyd import config_to_deepfloyd
from diffusers_imagen.diffusion.augmentation import augment_upsampled
from diffusers_imagen.diffusion.continuous_ddpm import log_snr_to_sigma, q_sample
from diffusers_imagen.diffusion.discrete_ddpm import trained_log_snrs


RESOLUTION, UPSCALED = 16, 32
TOKENS, TEXT_WIDTH = 7, 24
DROPPED = 0.1  # fraction of captions dropped in training
LOG_SNRS = trained_log_snrs(1000, "squaredcos_cap_v2", 0.0, 0.0)  # of IF's betas
# in [-1, 1]
COLOURS = torch.tensor([(1, -1, -1), (-1, 0.6, -1), (-0.8, -0.6, 1), (1, 0.9, -1), (0.9, -1, 0.9), (-1, 0.8, 0.9)])
BACKGROUNDS = torch.tensor([-0.9, 0.0, 0.9])
SHAPES = 3  # disc, square, diamond

# The options of all IF networks, as set by `conversion.deepfloyd`.
KIND = {
    "out_channels": 6,
    "encoder_hid_dim": TEXT_WIDTH,
    "cross_attention_dim": 64,
    "attention_head_dim": 16,
    "text_pooling": "class_token",
    "text_pooling_num_heads": 4,
    "resample_type": "resnet_nearest",
    "act_fn": "gelu",
    "attends_padding": True,
    "sinusoidal_dim": 32,
}
STAGE_1 = {
    **KIND,
    "sample_size": RESOLUTION,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": (1, 1, 1),
    "attention_resolutions": (8, 4),
    "shared_attention_norm": True,
}
STAGE_2 = {
    **KIND,
    "sample_size": UPSCALED,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": (1, 1, 2),
    "attention_resolutions": (8,),
    "attention_type": "cross",
    "resnet_out_scale_factor": 1 / 0.7071,
    "low_res_conditioning": True,
    "low_res_noise_conditioning": True,
    "low_res_augmentation": "discrete",
}


class Conditioning(NamedTuple):
    """Conditioning of a network besides the noise level."""

    encoder_hidden_states: torch.Tensor  # (B, TOKENS, TEXT_WIDTH)
    low_res_sample: torch.Tensor | None = None  # (B, 3, UPSCALED, UPSCALED), upsampled and noisy
    low_res_timestep: torch.Tensor | None = None  # (B,), the index of its noise level


def embed_captions(shapes: torch.Tensor, colours: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """Return the embeddings `(B, TOKENS, TEXT_WIDTH)` of captions, given as three index tensors `(B,)`."""
    text = no_text(len(shapes))
    for place, words in enumerate((shapes, colours, backgrounds)):
        text[:, place] = _vocabulary()[1 + 10 * place + words]
    return text


def no_text(count: int) -> torch.Tensor:
    """Return the embeddings of captions that consist of padding."""
    return _vocabulary()[0].expand(count, TOKENS, TEXT_WIDTH).clone()


def _vocabulary() -> torch.Tensor:
    return torch.randn(40, TEXT_WIDTH, generator=torch.Generator().manual_seed(7))


def draw_shapes(count: int, resolution: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images `(B, 3, resolution, resolution)` in [-1, 1], each with a shape, and their captions' embeddings."""
    shapes, colours, backgrounds = (
        torch.randint(n, (count,), generator=generator) for n in (SHAPES, len(COLOURS), len(BACKGROUNDS))
    )
    pixels = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    centre = torch.rand(2, count, 1, 1, generator=generator) - 0.5
    radius = 0.3 + 0.25 * torch.rand(count, 1, 1, generator=generator)
    dx, dy = (pixels[None, None, :] - centre[0]).abs(), (pixels[None, :, None] - centre[1]).abs()
    sizes = torch.stack([(dx**2 + dy**2).sqrt(), torch.maximum(dx, dy), (dx + dy) / 1.3])  # (SHAPES, B, H, W)
    inside = ((radius - sizes[shapes, torch.arange(count)]) * resolution / 2 + 0.5).clamp(0, 1)[:, None]
    background = BACKGROUNDS[backgrounds].reshape(-1, 1, 1, 1)
    images = background + inside * (COLOURS[colours][:, :, None, None] - background)
    return images, embed_captions(shapes, colours, backgrounds)


def enlarge(
    images: torch.Tensor, index: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low-resolution input of stage II: images downsampled, upsampled, with noise of `index` `(B,)`."""
    low_res = F.interpolate(images, (RESOLUTION, RESOLUTION), mode="area")
    upsampled = F.interpolate(low_res, images.shape[-2:], mode="bilinear", align_corners=True)
    noise = torch.randn(images.shape, generator=generator)
    return augment_upsampled(upsampled, log_snr_to_sigma(LOG_SNRS[index]), noise)


def train(config: dict, steps: int, batch_size: int, seed: int = 0) -> ImagenUNetModel:
    """Train a network to predict DDPM's noise; its prediction of the variance is not trained."""
    config_to_deepfloyd(
        {**ImagenUNetModel(**config).config}
    )  # raises an error unless the network has IF's architecture
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    unet = ImagenUNetModel(**config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"Training at {unet.resolution} pixels", leave=False, disable=None):
        images, text = draw_shapes(batch_size, unet.resolution, generator)
        dropped = torch.rand(batch_size, 1, 1, generator=generator) < DROPPED
        conditioning = Conditioning(torch.where(dropped, no_text(batch_size), text))
        if unet.takes_low_res:
            index = torch.randint(1000, (batch_size,), generator=generator)
            conditioning = conditioning._replace(
                **dict(zip(("low_res_sample", "low_res_timestep"), enlarge(images, index, generator)))
            )
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        x_t = q_sample(images, noise, LOG_SNRS[timesteps])
        output = unet(x_t.contiguous(memory_format=torch.channels_last), timesteps, **conditioning._asdict()).sample
        loss = (output[:, :3] - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return unet.eval().requires_grad_(False)


def conditioning_of(
    unet: ImagenUNetModel, count: int, low_res_index: int, seed: int
) -> tuple[Conditioning, Conditioning]:
    """Return the conditioning of `count` unseen combinations of captions and images, with text and without."""
    generator = torch.Generator().manual_seed(seed)
    images, text = draw_shapes(count, unet.resolution, generator)
    conditional = Conditioning(text)
    if unet.takes_low_res:
        conditional = Conditioning(text, *enlarge(images, torch.full((count,), low_res_index), generator))
    return conditional, conditional._replace(encoder_hidden_states=no_text(count))
