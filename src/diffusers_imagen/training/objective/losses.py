"""Training loss of an objective, for a network and a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...diffusion.augmentation import (
    AUGMENTATION_LEVELS,
    augment_low_res,
    augment_upsampled,
    augmentation_sigma,
    upsample_before_noise,
    upsample_low_res,
)
from ...diffusion.residual import SampleSpace
from ...models.interface import LowResAugmentation, LowResUpsampling, StageNetwork
from ...text.text_embeddings import drop_text
from ...utils.bounds import MIN_AUGMENTATION_SIGMA
from ..config import TrainingConfig
from ..data import Batch
from ..data.pyramid import MARGIN
from .objectives import Objective
from .step_draws import Draws


DISTANCES: dict[str, Callable[..., torch.Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


@dataclass(frozen=True)
class Conditioning:
    """Properties of a network's conditioning on text and low-resolution images that the loss depends on.

    Attributes:
        low_res_augmentation (`str`): As `StageNetwork.low_res_augmentation`.
        low_res_upsampling (`str`): As `StageNetwork.low_res_upsampling`.
        residual_scale (`float`, *optional*): As `StageNetwork.residual_scale`.
        low_res_margin (`int`): Width in pixels of the margin of low-resolution images around their crops.
        no_text (`torch.Tensor`, *optional*): `(1, L, E)`, replacement of dropped captions; zeros if None.
    """

    low_res_augmentation: LowResAugmentation = "edm"
    low_res_upsampling: LowResUpsampling = "bicubic"
    residual_scale: float | None = None
    low_res_margin: int = 0
    no_text: torch.Tensor | None = None

    @classmethod
    def of(cls, unet: StageNetwork, crops: bool = False, no_text: torch.Tensor | None = None) -> "Conditioning":
        """Return the properties of a network, which is trained on crops or on whole images."""
        of_unet = unet.low_res_augmentation, unet.low_res_upsampling, unet.residual_scale
        return cls(*of_unet, MARGIN if crops else 0, no_text)

    def upsample(self, low_res: torch.Tensor, size: tuple[int, int], before_noise: bool = False) -> torch.Tensor:
        """
        Upsample low-resolution images `(B, 3, h, w)` like a pipeline to the size of their images, without the margin.
        """
        margin = self.low_res_margin
        factor = size[0] // (low_res.shape[-2] - 2 * margin)
        wider = size[0] + 2 * margin * factor, size[1] + 2 * margin * factor
        if before_noise:
            low_res = upsample_before_noise(low_res, wider)
        else:
            low_res = upsample_low_res(low_res, wider, self.low_res_upsampling == "bicubic_antialias")
        top = left = margin * factor
        return low_res[..., top : top + size[0], left : left + size[1]]

    def space(self, batch: Batch) -> SampleSpace:
        """Return the space in which the images of a batch are diffused."""
        if self.residual_scale is None or batch.low_res is None:
            return SampleSpace()
        if self.low_res_augmentation == "discrete":  # upsampled by `to_device`
            return SampleSpace(batch.low_res, self.residual_scale)
        height, width = batch.images.shape[-2:]
        return SampleSpace(self.upsample(batch.low_res, (height, width)), self.residual_scale)


def to_device(
    batch: Batch, device: torch.device, channels_last: bool = True, conditioning: Conditioning = Conditioning()
) -> Batch:
    """
    Move a batch to a device; a text mask without padding is dropped, because flash attention does not support masks.

    Low-resolution images that get noise after upsampling are upsampled here, so that a step draws noise of this size.
    """
    if batch.text_mask is not None and batch.text_mask.all():
        batch = batch._replace(text_mask=None)
    batch = Batch._make(None if x is None else x.to(device, non_blocking=True) for x in batch)
    if batch.low_res is not None and conditioning.low_res_augmentation == "discrete":
        height, width = batch.images.shape[-2:]
        batch = batch._replace(low_res=conditioning.upsample(batch.low_res, (height, width), before_noise=True))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return batch._replace(images=batch.images.contiguous(memory_format=layout))


def denoising_loss(
    unet: torch.nn.Module,
    batch: Batch,
    draws: Draws,
    objective: Objective,
    config: TrainingConfig,
    conditioning: Conditioning = Conditioning(),
) -> torch.Tensor:
    """
    Return the weighted distance of prediction and target for each image, `(B,)`; the weight is outside the distance.

    If a network predicts a variance after the target, the variance is ignored.
    """
    example = objective.example(conditioning.space(batch).encode(batch.images), draws.noise, draws.log_snr)
    low_res, low_res_timestep = augment(batch.low_res, draws, config, conditioning.low_res_augmentation)
    # "discrete" ones were upsampled by `to_device`
    if low_res is not None and conditioning.low_res_margin and conditioning.low_res_augmentation == "edm":
        height, width = batch.images.shape[-2:]
        low_res = conditioning.upsample(low_res, (height, width))
    output = unet(
        example.model_input,
        example.timestep,
        drop_text(batch.text, draws.text < config.text_drop_rate, conditioning.no_text),
        batch.text_mask,
        low_res,
        low_res_timestep,
        return_dict=False,
    )[0]
    prediction = output[:, : example.target.shape[1]].float()
    distance = DISTANCES[config.loss](prediction, example.target, reduction="none")
    weight = objective.weighting.weight(draws.log_snr) * example.weight.flatten()
    return weight * distance.mean(dim=(1, 2, 3))


def augment(
    low_res: torch.Tensor | None, draws: Draws, config: TrainingConfig, kind: LowResAugmentation = "edm"
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Return the low-resolution image `(B, 3, h, w)` with noise, and the `low_res_timestep` `(B,)` of its noise level, if
    any.

    The noise level is uniform between the lowest and the configured maximum, because a network trained on mostly clean
    images would not correct errors of the previous stage. For "discrete" it is one of all 1000, uniformly, and the
    image was upsampled before.
    """
    if low_res is None or draws.low_res_noise is None or config.noise_conditioning_augmentation == 0:
        return low_res, None
    if kind == "discrete":
        index = (draws.augmentation * AUGMENTATION_LEVELS).floor()
        return augment_upsampled(low_res, augmentation_sigma(index), draws.low_res_noise)
    above = config.noise_conditioning_augmentation - MIN_AUGMENTATION_SIGMA
    low_res_noise_level = MIN_AUGMENTATION_SIGMA + draws.augmentation * above  # (B,)
    return augment_low_res(low_res, low_res_noise_level, draws.low_res_noise, config.sigma_data)
