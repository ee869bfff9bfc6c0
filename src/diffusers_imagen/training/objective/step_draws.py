"""What a step draws beside its data: noise levels, noise, dropped captions, augmentation.

Draws belong to slots, as those of the data do (`data/slot_draws.py`): they depend on the run's seed, the step and the
image's place in it, and not on how many processes or accumulated batches share the step.
"""

from typing import NamedTuple

import numpy as np
import torch

from ...diffusion.continuous_ddpm import log_snr_to_sigma
from ..data import Batch
from ..data.slot_draws import PHILOX_WORDS
from .objectives import Objective


STEP_SEED = 16  # words after the run's seed, unlike those of the data
NOISE_SEED = 17


class Draws(NamedTuple):
    """Those of a micro-batch."""

    log_snr: torch.Tensor  # (B,)
    text: torch.Tensor  # (B,) in [0, 1): a caption is dropped below the drop rate
    augmentation: torch.Tensor  # (B,) in [0, 1): share of the largest augmentation
    noise: torch.Tensor  # (B, C, H, W)
    low_res_noise: torch.Tensor | None = None  # (B, C, h, w)

    @property
    def sigma(self) -> torch.Tensor:
        """The noise levels relative to the image, `(B,)`."""
        return log_snr_to_sigma(self.log_snr)


class StepDraws:
    """Draws of the slots of a step.

    Args:
        objective (`Objective`): Whose noise levels are drawn.
        seed (`int`): The run's seed.
        words (`int`): Distinguish sequences of the same seed.
        stratified (`bool`): Whether the noise levels of a step are spread evenly over their distribution.
        device (`torch.device`): Where noise is drawn; the same on every machine with that kind of device.
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
        """Draws the numbers of all `slots` of a step, of all processes, which begin at `first_slot`."""
        # a spawn key, because trailing zeros of the entropy itself do not count
        entropy = np.random.SeedSequence(self.seed, spawn_key=(STEP_SEED, *self.words, step))
        generator = torch.Generator().manual_seed(entropy.generate_state(1, np.uint64).item())
        self.first_slot = first_slot
        self.log_snr = self.objective.draw_log_snr(slots, generator, self.stratified)
        self.uniform = torch.rand(2, slots, generator=generator)

    def __call__(self, first_slot: int, batch: Batch) -> Draws:
        """Draws of a micro-batch that begins at a slot, on the batch's device."""
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
