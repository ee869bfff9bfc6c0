"""The mixture of Gaussians of the reference trajectories, as networks that denoise it perfectly."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_imagen.diffusion import continuous_ddpm, discrete_ddpm, edm


# Computed with NVlabs/edm's `edm_sampler` in float64: a Gaussian mixture in the plane, 64 unit-noise latents, and what the
# sampler makes of them.
REFERENCE = load_file(Path(__file__).parents[1] / "fixtures" / "edm" / "edm_sampler_gmm.safetensors")
LATENTS = REFERENCE["latents"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def denoise(x, sigma):
    """The mean of the mixture's clean points given a noisy one, in closed form."""
    means, weights, std = (REFERENCE[f"mixture_{name}"].to(x.dtype) for name in ("means", "weights", "std"))
    variance = std**2 + sigma**2
    offset = x[:, None] - means  # (B, components, 2)
    posterior = (weights.log() - offset.square().sum(-1) / (2 * variance)).softmax(-1)
    return (posterior[..., None] * (means + std**2 / variance * offset)).sum(1)


def edm_network(x_in, timestep):
    """The raw output F of an ideal EDM network: it sees the scaled sample and c_noise only."""
    sigma = edm.c_noise_to_sigma(timestep).to(x_in.dtype)
    c_skip, c_out, c_in = edm.scalings(sigma, 0.5)
    x = x_in / c_in
    return (denoise(x, sigma) - c_skip * x) / c_out


def variance_preserving_network(prediction_type):
    """An ideal network of continuous DDPM: it sees x_t and the log-SNR only."""

    def network(x_t, timestep):
        timestep = timestep.to(x_t.dtype)
        alpha, sigma = continuous_ddpm.alpha_sigma(timestep)
        x_0 = denoise(x_t / alpha, continuous_ddpm.log_snr_to_sigma(timestep))
        noise = (x_t - alpha * x_0) / sigma
        return {"epsilon": noise, "sample": x_0, "v_prediction": alpha * noise - sigma * x_0}[prediction_type]

    return network


def discrete_network(prediction_type, log_snrs):
    """An ideal network of DDPM with discrete betas, by the log-SNRs of its indices: it sees x_t and the index only."""
    network = variance_preserving_network(prediction_type)
    return lambda x_t, timestep: network(x_t, discrete_ddpm.index_to_log_snr(timestep.double(), log_snrs))


def sample(scheduler, steps, network=edm_network, dtype=torch.float64, latents=LATENTS, **kwargs):
    """The loop of any diffusers pipeline."""
    scheduler.set_timesteps(steps)
    x = latents.to(dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_output = network(scheduler.scale_model_input(x, t), t.to(dtype))
        x = scheduler.step(model_output, t, x, **kwargs).prev_sample
    assert x.dtype == dtype
    return x.double()


def distance(x):
    return (x - REFERENCE["reference_4000"]).abs().mean().item()
