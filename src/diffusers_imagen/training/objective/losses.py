"""The training loss: where an objective meets a network and a batch."""

import torch
import torch.nn.functional as F

from ...diffusion import edm
from ...diffusion.augmentation import augment_low_res
from ...diffusion.training_examples import uncertainty_weighted
from ...text.text_embeddings import drop_text
from ..config import MIN_AUGMENTATION_SIGMA, TrainingConfig
from ..data import Batch
from .formulations import Objective
from .step_draws import Draws


DISTANCES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def to_device(batch: Batch, device: torch.device, channels_last: bool = True) -> Batch:
    """Moves a batch, without a text mask that masks nothing: attention without one has flash kernels."""
    if batch.text_mask is not None and batch.text_mask.all():
        batch = batch._replace(text_mask=None)
    batch = Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return batch._replace(images=batch.images.contiguous(memory_format=layout))


def denoising_loss(
    unet: torch.nn.Module, batch: Batch, draws: Draws, objective: Objective, config: TrainingConfig
) -> torch.Tensor:
    """Weighted distance of prediction and target for each image, `(B,)`; the weight is outside the distance."""
    example = objective.example(batch.images, draws.noise, draws.level)
    low_res, low_res_noise_level = augment(batch.low_res, draws, config)
    output = unet(
        example.model_input,
        example.timestep,
        drop_text(batch.text, draws.text < config.text_drop_rate),
        batch.text_mask,
        low_res,
        low_res_noise_level,
        return_dict=False,
    )[0]
    distance = DISTANCES[config.loss](output.float(), example.target, reduction="none")
    return example.weight.flatten() * distance.mean(dim=(1, 2, 3))


def augment(
    low_res: torch.Tensor | None, draws: Draws, config: TrainingConfig
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The low-resolution image with noise of a random level, and that level's conditioning value, where there is one.

    The level is uniform between the lowest and the configured maximum: mostly clean images would not teach the
    network to mistrust what the stage below gets wrong.
    """
    if low_res is None or config.noise_conditioning_augmentation == 0:
        return low_res, None
    sigma = MIN_AUGMENTATION_SIGMA + draws.augmentation * (
        config.noise_conditioning_augmentation - MIN_AUGMENTATION_SIGMA
    )
    return augment_low_res(low_res, sigma, draws.low_res_noise, config.sigma_data)


class UncertaintyWeighting(torch.nn.Module):
    """Learns how hard each noise level is, and weighs it down by that (Karras et al. 2024, EDM2, 2312.02696).

    A linear layer on Fourier features of `c_noise(sigma)`, which starts as no weighting. It is part of the run, not of
    the stage.

    Args:
        seed (`int`): Of the features' frequencies.
        features (`int`): Their number.
    """

    def __init__(self, seed: int = 0, features: int = 128):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", torch.randn(features, generator=generator))
        self.register_buffer("phases", torch.rand(features, generator=generator))
        self.linear = torch.nn.utils.skip_init(torch.nn.Linear, features, 1, bias=False)  # draws nothing
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, loss: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Losses `(B,)` at levels `(B,)`, weighted."""
        angles = edm.c_noise(sigma)[:, None] * self.frequencies + self.phases
        features = (2 * torch.pi * angles).cos() * 2**0.5  # (B, features)
        return uncertainty_weighted(loss, self.linear(features).flatten().float())
