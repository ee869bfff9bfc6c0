"""Noise conditioning augmentation of a super-resolution model's input, in the EDM form.

Ho et al. 2021 (arXiv 2106.15282), section 4.2, and Saharia et al. 2022 (Imagen, arXiv 2205.11487), section 2.4.
"""

import torch

from . import edm


MIN_AUGMENTATION_SIGMA = 0.002  # NeMo's at inference; the conditioning value of 0 would be infinite


def augment_low_res(
    low_res: torch.Tensor, sigma: float | torch.Tensor, noise: torch.Tensor, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-resolution image with noise of standard deviation `sigma`, and the value that tells the network how much.

    The noise goes into the image at its own resolution, before any upsampling, and the sum is scaled by `c_in(sigma)`
    as every input of an EDM network is. The noise is an argument so that both branches of guidance see one image.

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
            is neither one value nor one a sample.
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
