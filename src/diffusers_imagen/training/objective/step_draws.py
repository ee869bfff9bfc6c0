"""Random numbers of a step besides its data: noise levels, noise, dropped captions, augmentation.

They are determined by slots, like those of the data (`data/slot_draws.py`):
    by the run's seed, the step and the image's position in it, independent of the number of processes or accumulated
    batches.
"""

from typing import NamedTuple

import numpy as np
import torch

from ...diffusion.continuous_ddpm import log_snr_to_sigma
from ..data import Batch
from ..data.slot_draws import PHILOX_WORDS
from .objectives import Objective


STEP_SEED = 16  # words after the run's seed, different from those of the data
NOISE_SEED = 17


class Draws(NamedTuple):
    """Random numbers of a micro-batch."""

    log_snr: torch.Tensor  # (B,)
    text: torch.Tensor  # (B,) in [0, 1): captions below the drop rate are dropped
    augmentation: torch.Tensor  # (B,) in [0, 1): share of the highest augmentation
    noise: torch.Tensor  # (B, C, H, W)
    low_res_noise: torch.Tensor | None = None  # (B, C, h, w)

    @property
    def sigma(self) -> torch.Tensor:
        """Noise levels relative to the image, `(B,)`."""
        return log_snr_to_sigma(self.log_snr)


class StepDraws:
    """Draws random numbers for the slots of a step.

    Args:
        objective (`Objective`): Objective whose noise levels are drawn.
        seed (`int`): The run's seed.
        words (`int`): Words that distinguish sequences of the same seed.
        stratified (`bool`): Whether the noise levels of a step are drawn by stratified sampling.
        device (`torch.device`): Device on which noise is drawn; results are the same for all devices of its type.
    """

    def __init__(
        self,
        objective: Objective,
        seed: int,
        *words: int,
        stratified: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.objective, self.stratified = objective, stratified
        self.seed, self.words = seed, words
        self.noise_key = np.random.SeedSequence(seed, spawn_key=(NOISE_SEED, *words)).generate_state(2, np.uint64)
        self.generator = torch.Generator(device)

    def begin(self, step: int, first_slot: int, slots: int) -> None:
        """Draw the numbers for all `slots` of a step, of all processes, starting at `first_slot`."""
        # a spawn key, because trailing zeros of the entropy itself are ignored
        entropy = np.random.SeedSequence(self.seed, spawn_key=(STEP_SEED, *self.words, step))
        generator = torch.Generator().manual_seed(entropy.generate_state(1, np.uint64).item())
        self.first_slot = first_slot
        self.log_snr = self.objective.draw_log_snr(slots, generator, self.stratified)
        self.uniform = torch.rand(2, slots, generator=generator)

    def __call__(self, first_slot: int, batch: Batch) -> Draws:
        """Return the numbers of a micro-batch that starts at a slot, on the batch's device."""
        device, count = batch.images.device, len(batch.images)
        mine = slice(first_slot - self.first_slot, first_slot - self.first_slot + count)
        numbers = torch.cat([self.log_snr[None, mine], self.uniform[:, mine]]).to(device, non_blocking=True)
        seeds = np.random.Philox(key=self.noise_key, counter=first_slot).random_raw(PHILOX_WORDS * count)
        images = [batch.images] if batch.low_res is None else [batch.images, batch.low_res]
        noise = [torch.empty(x.shape, device=self.generator.device) for x in images]
        for i, seed in enumerate(seeds[::PHILOX_WORDS]):
            self.generator.manual_seed(int(seed))
            for part in noise:
                part[i].normal_(generator=self.generator)
        return Draws(*numbers.unbind(), *(part.to(device) for part in noise))
