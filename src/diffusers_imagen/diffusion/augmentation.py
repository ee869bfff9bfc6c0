"""Upsampling and noise conditioning augmentation of low-resolution images, in the EDM and the discrete form.

Ho et al. 2021 (arXiv 2106.15282), section 4.2, and Saharia et al. 2022 (Imagen, arXiv 2205.11487), section 2.4.
"""

import torch
import torch.nn.functional as F

from . import continuous_ddpm, discrete_ddpm, edm


# of the form of discrete DDPM
AUGMENTATION_BETAS: discrete_ddpm.BetaSchedule = "squaredcos_cap_v2"
AUGMENTATION_LEVELS = discrete_ddpm.DECLARED_LEVELS


def upsample_low_res(low_res: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Upsample the low-resolution image to the size of the sample by bicubic interpolation; values may overshoot.

    Args:
        low_res: `(B, C, h, w)`, any floating dtype.
        size: height and width of the result, in pixels.
        antialias: whether to use the kernel of `torch.nn.functional.interpolate` with `antialias=True`. Its
            coefficient is -0.5, as in Pillow, instead of -0.75, even when upsampling.

    Returns:
        `(B, C, *size)`, in `low_res`'s dtype.
    """
    if not antialias:
        return F.interpolate(low_res, size, mode="bicubic")
    precise = low_res.to(torch.promote_types(low_res.dtype, torch.float32))  # no half precision on a CPU
    return F.interpolate(precise, size, mode="bicubic", antialias=True).to(low_res.dtype)


def upsample_before_noise(low_res: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Upsample the low-resolution image `(B, C, h, w)` for `augment_upsampled`: bilinear, with corners aligned."""
    return F.interpolate(low_res, size, mode="bilinear", align_corners=True)


def augment_low_res(
    low_res: torch.Tensor, sigma: float | torch.Tensor, noise: torch.Tensor, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add noise of standard deviation `sigma` to the low-resolution image, and return it with its conditioning value.

    The noise is added at the image's own resolution, before any upsampling, and the sum is scaled by `c_in(sigma)`
    like every input of an EDM network. The noise is an argument so that both branches of guidance use the same image.

    Args:
        low_res: `(B, C, h, w)`, values in [-1, 1], any floating dtype.
        sigma: the noise level, above 0: one for all, or `(B,)`.
        noise: unit noise of `low_res`'s shape.
        sigma_data: the standard deviation of the images that `c_in` assumes.

    Returns:
        The augmented image in `low_res`'s shape and dtype, and `c_noise(sigma)`, `(B,)` in float32 (in float64 for a
        `sigma` in float64).

    Raises:
        ValueError: if `noise` has another shape, a `sigma` given as a number is not above 0, or one given as a tensor
            has neither one value nor one per sample.
    """
    if noise.shape != low_res.shape:
        raise ValueError(
            f"`noise` is of shape {tuple(noise.shape)}, but should be of that of `low_res`, {tuple(low_res.shape)}."
        )
    if not isinstance(sigma, torch.Tensor):
        edm.check_positive(sigma=sigma)
        sigma = torch.tensor(sigma, dtype=torch.float32)
    sigma = edm.per_sample(sigma, low_res)  # (B or 1, 1, 1, 1)
    sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
    augmented = (low_res + sigma * noise) * edm.scalings(sigma, sigma_data).c_in
    return augmented.to(low_res.dtype), edm.c_noise(sigma.flatten()).expand(low_res.shape[0])


def augmentation_sigma(index: torch.Tensor) -> torch.Tensor:
    """Return the EDM noise level of indices 0 to 999 of `augment_upsampled`, in their shape, in float64."""
    return continuous_ddpm.log_snr_to_sigma(discrete_ddpm.index_to_log_snr(index.double(), augmentation_log_snrs()))


def augmentation_log_snrs() -> torch.Tensor:
    """Return the log-SNR of each of the noise levels of `augment_upsampled`, `(1000,)` in float64, decreasing."""
    return discrete_ddpm.declared_log_snrs(AUGMENTATION_BETAS)


def augment_upsampled(
    upsampled: torch.Tensor, sigma: float | torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add noise to the upsampled image in the form of discrete DDPM, as in DeepFloyd IF; compare `augment_low_res`.

    The image is diffused to one of DDPM's 1000 noise levels with cosine betas (variance-preserving).

    Args:
        upsampled: `(B, C, H, W)`, values in [-1, 1], any floating dtype, at the size of the result.
        sigma: the EDM noise level, above 0: one for all, or `(B,)`.
        noise: unit noise of `upsampled`'s shape.

    Returns:
        The augmented image in `upsampled`'s shape and dtype, and the index of the noise level, `(B,)` in float32, from
        0 to 999 and fractional between two noise levels.

    Raises:
        ValueError: if a `sigma` given as a number is not above 0.
    """
    if not isinstance(sigma, torch.Tensor):
        edm.check_positive(sigma=sigma)
        sigma = torch.tensor(sigma, dtype=torch.float64)
    log_snr = continuous_ddpm.sigma_to_log_snr(sigma.to(torch.float64))
    index = discrete_ddpm.log_snr_to_index(log_snr, augmentation_log_snrs())
    augmented = continuous_ddpm.q_sample(upsampled, noise, log_snr.to(upsampled.device))
    return augmented, index.flatten().to(upsampled.device, torch.float32).expand(len(upsampled))
