"""Loss on held-out rows."""

import torch
from accelerate import Accelerator

from ..config import TrainingConfig
from ..data import ValidationBatches
from ..data.slot_draws import VALIDATION_SEED
from ..monitor import NoiseLevelMeans
from ..objective.losses import Conditioning, denoising_loss, to_device
from ..objective.objectives import Objective
from ..objective.step_draws import StepDraws


class ValidationLoss:
    """Loss on held-out rows, with the same rows, noise levels and noise at every call.

    Args:
        config (`TrainingConfig`): Configuration of the run.
        objective (`Objective`): Objective of the loss.
        batches (`ValidationBatches`): The rows of this process.
        device (`torch.device`): Device on which noise is drawn.
        conditioning (`Conditioning`): Conditioning of the network.
    """

    def __init__(
        self,
        config: TrainingConfig,
        objective: Objective,
        batches: ValidationBatches,
        device: torch.device,
        conditioning: Conditioning,
    ):
        self.config, self.objective, self.batches, self.conditioning = config, objective, batches, conditioning
        # stratified noise levels: every call covers the whole distribution
        self.draws = StepDraws(objective, config.seed, VALIDATION_SEED, stratified=True, device=device)

    @torch.no_grad()
    def __call__(self, accelerator: Accelerator, unet: torch.nn.Module) -> dict[str, float]:
        """Return the mean loss, and the means by noise level, over all processes."""
        stream = self.batches.stream
        means, total = NoiseLevelMeans(accelerator.device), torch.zeros(2, device=accelerator.device)
        unet.eval()
        self.draws.begin(0, 0, len(self.batches) * stream.stride)
        for i, batch in enumerate(self.batches):
            batch = to_device(batch, accelerator.device, self.config.channels_last, self.conditioning)
            first = i * stream.stride + stream.process_index * self.config.train_batch_size
            draws = self.draws(first, batch)
            with accelerator.autocast():
                losses = denoising_loss(unet, batch, draws, self.objective, self.config, self.conditioning)
            means.add(losses, draws.sigma)
            total += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        unet.train()
        total, sums = accelerator.reduce((total, means.sums), "sum")
        mean = (total[0] / total[1]).item()
        parts = NoiseLevelMeans.means(sums.cpu())
        return {"validation_loss": mean, **{f"validation_loss/{name}": value for name, value in parts.items()}}
