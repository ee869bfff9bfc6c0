"""Training losses. The formulas are those of `diffusers_imagen.diffusion`; here they meet a network and a batch."""

from typing import Optional

import torch

from ..diffusion import edm
from ..diffusion.augmentation import augment_low_res
from .config import MIN_AUGMENTATION_SIGMA, TrainingConfig
from .data import Batch


def edm_loss(
    unet: torch.nn.Module, batch: Batch, config: TrainingConfig, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """Weighted denoising loss of each image, `(B,)` (Karras et al. 2022, eq. 8, table 1).

    The weight cancels c_out, so that the loss compares the raw network output with a target of unit variance:
    `lambda(sigma) * |denoised - x_0|^2 = |F - (x_0 - c_skip * x) / c_out|^2`.
    """
    images = batch.images
    sigma = edm.draw_sigma(len(images), config.p_mean, config.p_std, generator, images.device)
    noise = draw_like(images, generator)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in edm.preconditioning(sigma, config.sigma_data))

    noisy = images + sigma[:, None, None, None] * noise
    low_res, low_res_noise_level = augment(batch, config, generator)
    output = unet(
        c_in * noisy,
        edm.c_noise(sigma),
        drop_text(batch.text, config.text_drop_rate, generator),
        batch.text_mask,
        low_res,
        low_res_noise_level,
        return_dict=False,
    )[0]
    target = (images - c_skip * noisy) / c_out
    return (output.float() - target).square().mean(dim=(1, 2, 3))


def augment(
    batch: Batch, config: TrainingConfig, generator: Optional[torch.Generator]
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The low-resolution image with noise of a random level, and that level's conditioning value, where there is one.

    The level is uniform between the lowest and the configured maximum: mostly clean images would not teach the
    network to mistrust what the stage below gets wrong.
    """
    if batch.low_res is None:
        return None, None
    if config.max_augmentation_sigma == 0:
        return batch.low_res, None
    uniform = torch.rand(len(batch.low_res), generator=generator, device=_source(batch.low_res, generator))
    sigma = torch.lerp(
        uniform.new_tensor(MIN_AUGMENTATION_SIGMA), uniform.new_tensor(config.max_augmentation_sigma), uniform
    )
    sigma = sigma.to(batch.low_res.device)
    return augment_low_res(batch.low_res, sigma, draw_like(batch.low_res, generator), config.sigma_data)


def drop_text(
    text: Optional[torch.Tensor], rate: float, generator: Optional[torch.Generator]
) -> Optional[torch.Tensor]:
    """Zeros the states of dropped captions; their masks stay, as the guidance of the pipelines expects."""
    if text is None:
        return None
    kept = torch.rand(len(text), generator=generator, device=_source(text, generator)).to(text.device) >= rate
    return text * kept[:, None, None]


def draw_like(tensor: torch.Tensor, generator: Optional[torch.Generator]) -> torch.Tensor:
    """Unit noise of that shape, drawn on the generator's device: the same noise on every machine."""
    return torch.randn(tensor.shape, generator=generator, device=_source(tensor, generator)).to(tensor.device)


def _source(tensor: torch.Tensor, generator: Optional[torch.Generator]) -> torch.device:
    return tensor.device if generator is None else generator.device
