import sys

import pytest
import torch
from diffusers import DDIMScheduler
from script_modules import script_module


@pytest.fixture(scope="module")
def solvers():
    """The script's part on DeepFloyd IF's kind, which imports its neighbour."""
    with script_module("deepfloyd_solvers") as module:
        yield module


def ideal(solvers, std=0.4):
    """The noise that a network of Gaussian images predicts."""
    log_snrs = solvers.LOG_SNRS

    def predict(x, index):
        index = index.double()
        below = index.floor().clamp(max=998).long()
        log_snr = torch.lerp(log_snrs[below], log_snrs[below + 1], index - below)
        alpha_squared, sigma_squared = log_snr.sigmoid(), (-log_snr).sigmoid()
        return sigma_squared.sqrt() * x / (alpha_squared * std**2 + sigma_squared)

    return predict


def test_solvers_go_from_the_same_noise_to_the_same_end(solvers):
    """Of images ~ Normal(0, 0.4^2) the end is known: the trajectory scales the noise."""
    config = solvers.Setting(1, 1.0, None).config
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    first, last = solvers.log_snr_to_sigma(solvers.LOG_SNRS[[solvers.START, 0]]).tolist()
    scale = ((0.4**2 + last**2) / (0.4**2 + first**2)) ** 0.5 * 0.4**2 / (0.4**2 + last**2)
    exact = noise * (1 + first**2) ** 0.5 * scale
    for name, make in solvers.SOLVERS.items():
        error = [
            ((solvers.sample(make(config, calls), ideal(solvers), noise) - exact).norm() / exact.norm()).item()
            for calls in (19, 100)
        ]
        if name == "diffusers DDPM":
            assert error[1] > 0.5  # it draws noise
        else:
            assert error[1] < 0.05 and error[1] < error[0] / 2, name


def test_steps_of_ddim_are_even_from_990_to_0(solvers):
    for calls in solvers.DEEPFLOYD_CALLS:
        indices = solvers.even_indices(calls)
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(calls - 1)
        assert (len(indices), indices[0], indices[-1]) == (calls, 990, 0)
        assert indices[0] - indices[1] == 1000 // scheduler.num_inference_steps


def test_networks_of_another_kind_are_refused_and_shapes_are_images(solvers):
    small = sys.modules["small_deepfloyd"]
    config = {**small.STAGE_2, "block_out_channels": (32, 32), "layers_per_block": (1, 1), "attention_resolutions": ()}
    with pytest.raises(ValueError, match="act_fn"):
        small.train({**config, "act_fn": "silu"}, 1, 2)
    images, text = small.draw_shapes(3, 16, torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1 and images.std() > 0.2
    assert text.shape == (3, small.TOKENS, small.TEXT_WIDTH)
