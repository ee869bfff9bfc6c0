import math

import pytest
import torch

from diffusers_imagen.diffusion import edm
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import Batch
from diffusers_imagen.training.losses import augment, draw_like, drop_text, edm_loss


SIGMA_DATA = 0.7


class Recorder(torch.nn.Module):
    """A network that remembers what it was given and returns what `function(input, c_noise)` does."""

    def __init__(self, function=lambda x, c_noise: torch.zeros_like(x)):
        super().__init__()
        self.function = function

    def forward(self, sample, timestep, text=None, text_mask=None, low_res=None, low_res_timestep=None, **kwargs):
        assert kwargs == {"return_dict": False}
        self.sample, self.timestep, self.text, self.text_mask = sample, timestep, text, text_mask
        self.low_res, self.low_res_timestep = low_res, low_res_timestep
        return (self.function(sample, timestep),)


def make_config(**kwargs) -> TrainingConfig:
    return TrainingConfig(preset="emoji_base_64", **{"sigma_data": SIGMA_DATA, **kwargs})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(values: list[float], side: int = 64) -> Batch:
    return Batch(torch.tensor(values)[:, None, None, None].expand(-1, 3, side, side), None, None, None)


def scalings(c_noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise level and scalings of Karras et al. 2022, table 1, in float64: `(B, 1, 1, 1)`."""
    sigma = (4 * c_noise.double()).exp()[:, None, None, None]
    total = sigma**2 + SIGMA_DATA**2
    return sigma, SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), 1 / total.sqrt()


def test_a_network_that_denoises_perfectly_has_no_loss():
    x_0 = torch.tensor([0.3, -0.8, 1.0, 0.0])

    def ideal(x, c_noise):
        sigma, c_skip, c_out, c_in = scalings(c_noise)
        return ((x_0[:, None, None, None] - c_skip * x / c_in) / c_out).float()

    loss = edm_loss(Recorder(ideal), images_of(x_0.tolist()), make_config(), seeded())
    assert loss.shape == (4,)
    assert loss.max() < 1e-6
    # the same network is wrong about other images: the weighted distance of what it returns
    network = Recorder(ideal)
    loss = edm_loss(network, images_of((x_0 + 0.5).tolist()), make_config(), seeded())
    sigma, c_skip, c_out, c_in = scalings(network.timestep)
    # denoised - x_0 is -0.5, and lambda is 1 / c_out^2
    expected = (0.5**2 / c_out**2).flatten().float()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)


def test_the_loss_of_predicting_zero_is_known():
    """`E|x_0 - c_skip (x_0 + sigma n)|^2 / c_out^2` for constant images and unit noise n."""
    x_0 = torch.tensor([0.3, -0.8, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    network = Recorder()
    loss = edm_loss(network, images_of(x_0.flatten().tolist(), side=128), make_config(), seeded())
    sigma, c_skip, c_out, _ = scalings(network.timestep)
    expected = (((1 - c_skip) * x_0) ** 2 + (c_skip * sigma) ** 2) / c_out**2
    torch.testing.assert_close(loss.double(), expected.flatten(), rtol=0.04, atol=0)


def test_input_and_target_have_unit_variance_at_every_noise_level():
    images = SIGMA_DATA * torch.randn(16, 3, 128, 128, generator=seeded(1))
    network = Recorder()
    loss = edm_loss(network, Batch(images, None, None, None), make_config(), seeded())
    assert network.timestep.max() - network.timestep.min() > 0.5
    torch.testing.assert_close(loss, torch.ones(16), rtol=0.04, atol=0)  # the mean square of the target
    torch.testing.assert_close(network.sample.std(dim=(1, 2, 3)), torch.ones(16), rtol=0.04, atol=0)


def test_noise_levels_are_drawn_from_the_configured_distribution():
    network = Recorder()
    config = make_config(p_mean=0.4, p_std=0.8)
    edm_loss(network, images_of([0.0] * 20_000, side=1), config, seeded())
    log_sigma = 4 * network.timestep
    assert log_sigma.mean().item() == pytest.approx(0.4, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(0.8, abs=0.03)


def test_the_seed_decides_the_loss():
    batch = Batch(
        torch.rand(4, 3, 8, 8, generator=seeded(1)),
        torch.rand(4, 3, 4, 4, generator=seeded(2)),
        torch.rand(4, 5, 2, generator=seeded(3)),
        torch.ones(4, 5, dtype=torch.bool),
    )
    config = make_config(text_drop_rate=0.5)
    # a loss that every draw enters
    network = Recorder()
    network.function = lambda x, c_noise: (
        x * (network.text.sum() + network.low_res.sum() + network.low_res_timestep[0])
    )
    first, same, other = (edm_loss(network, batch, config, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.isclose(first, other).any()


def test_a_half_precision_output_is_compared_in_float32():
    network = Recorder(lambda x, c_noise: torch.zeros_like(x, dtype=torch.bfloat16))
    loss = edm_loss(network, images_of([0.5]), make_config(), seeded())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, edm_loss(Recorder(), images_of([0.5]), make_config(), seeded()))


def test_the_gradient_reaches_the_network():
    scale = torch.nn.Parameter(torch.tensor(0.0))
    loss = edm_loss(Recorder(lambda x, c_noise: x * scale), images_of([0.3, 0.9]), make_config(), seeded()).mean()
    loss.backward()
    assert scale.grad.abs() > 1e-3


def test_dropped_captions_are_zero_and_the_others_untouched():
    text = torch.rand(10_000, 2, 3, generator=seeded()) + 1
    dropped = drop_text(text, 0.1, seeded(1))
    is_zero = (dropped == 0).flatten(1).all(dim=1)
    assert is_zero.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[~is_zero], text[~is_zero])
    assert torch.equal(drop_text(text, 0.0, seeded(1)), text)
    assert drop_text(text, 1.0, seeded(1)).abs().max() == 0
    assert drop_text(None, 0.1, seeded(1)) is None


def test_the_mask_of_a_dropped_caption_stays():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    text = torch.rand(2, 3, 4, generator=seeded()) * mask[..., None]
    network = Recorder()
    batch = images_of([0.0, 0.5])._replace(text=text, text_mask=mask)
    edm_loss(network, batch, make_config(text_drop_rate=1.0), seeded())
    assert network.text.abs().max() == 0 and torch.equal(network.text_mask, mask)
    edm_loss(network, batch, make_config(text_drop_rate=0.0), seeded())
    assert torch.equal(network.text, text) and torch.equal(network.text_mask, mask)


def test_the_augmentation_is_of_the_level_that_it_names():
    low_res = torch.full((32, 3, 64, 64), 0.25)
    batch = Batch(torch.zeros(32, 3, 8, 8), low_res, None, None)
    augmented, c_noise = augment(batch, make_config(max_augmentation_sigma=0.4), seeded())
    assert c_noise.shape == (32,)
    sigma, _, _, c_in = scalings(c_noise)
    noise = (augmented / c_in - low_res).flatten(1)
    torch.testing.assert_close(noise.std(dim=1), sigma.flatten(), rtol=0.04, atol=0)
    assert (noise.mean(dim=1).abs() < 5 * sigma.flatten() / math.sqrt(noise.shape[1])).all()


def test_augmentation_levels_are_uniform_up_to_the_maximum():
    batch = Batch(torch.zeros(20_000, 3, 1, 1), torch.zeros(20_000, 3, 1, 1), None, None)
    _, c_noise = augment(batch, make_config(max_augmentation_sigma=0.4), seeded())
    sigma = edm.c_noise_to_sigma(c_noise)
    assert 0.002 * 0.999 <= sigma.min() < 0.003 and 0.399 < sigma.max() <= 0.4 * 1.001
    quantiles = torch.quantile(sigma, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1015, 0.201, 0.3005]), rtol=0, atol=0.01)


def test_the_network_is_given_the_augmented_image_and_its_level():
    low_res = torch.full((2, 3, 4, 4), 0.25)
    network = Recorder()
    batch = images_of([0.0, 0.5])._replace(low_res=low_res)
    edm_loss(network, batch, make_config(max_augmentation_sigma=0.0), seeded())
    assert torch.equal(network.low_res, low_res) and network.low_res_timestep is None
    edm_loss(network, batch, make_config(max_augmentation_sigma=0.4), seeded())
    assert not torch.equal(network.low_res, low_res) and network.low_res_timestep.shape == (2,)
    edm_loss(network, images_of([0.0, 0.5]), make_config(), seeded())
    assert network.low_res is None and network.low_res_timestep is None


def test_noise_is_drawn_by_the_generator():
    like = torch.zeros(1000, 10)
    noise = draw_like(like, seeded())
    assert noise.shape == like.shape and torch.equal(noise, draw_like(like, seeded()))
    assert noise.std().item() == pytest.approx(1, abs=0.03)
