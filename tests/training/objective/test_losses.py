import math
from typing import get_args, get_type_hints

import pytest
import torch

from diffusers_imagen.diffusion import edm
from diffusers_imagen.text.text_embeddings import drop_text
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import Batch
from diffusers_imagen.training.objective.losses import augment, denoising_loss, to_device
from diffusers_imagen.training.objective.objectives import make_objective
from diffusers_imagen.training.objective.step_draws import Draws, StepDraws
from diffusers_imagen.training.objective.weightings import WEIGHTINGS, UncertaintyWeighting


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


def loss_of(network, batch: Batch, config: TrainingConfig, seed: int = 0) -> torch.Tensor:
    """The loss with the draws of a first step."""
    objective = make_objective(config)
    draws = StepDraws(objective, seed, stratified=config.stratified_noise)
    draws.begin(0, 0, len(batch.images))
    return denoising_loss(network, batch, draws(0, batch), objective, config)


def draws_of(batch: Batch) -> Draws:
    draws = StepDraws(make_objective(make_config()), 0)
    draws.begin(0, 0, len(batch.images))
    return draws(0, batch)


def uniform(count: int) -> torch.Tensor:
    return torch.rand(count, generator=seeded(1))


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

    loss = loss_of(Recorder(ideal), images_of(x_0.tolist()), make_config())
    assert loss.shape == (4,)
    assert loss.max() < 1e-6
    # the same network is wrong about other images: the weighted distance of what it returns
    network = Recorder(ideal)
    loss = loss_of(network, images_of((x_0 + 0.5).tolist()), make_config())
    sigma, c_skip, c_out, c_in = scalings(network.timestep)
    # denoised - x_0 is -0.5, and lambda is 1 / c_out^2
    expected = (0.5**2 / c_out**2).flatten().float()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)


def test_the_loss_of_predicting_zero_is_known():
    """`E|x_0 - c_skip (x_0 + sigma n)|^2 / c_out^2` for constant images and unit noise n."""
    x_0 = torch.tensor([0.3, -0.8, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    network = Recorder()
    loss = loss_of(network, images_of(x_0.flatten().tolist(), side=128), make_config())
    sigma, c_skip, c_out, _ = scalings(network.timestep)
    expected = (((1 - c_skip) * x_0) ** 2 + (c_skip * sigma) ** 2) / c_out**2
    torch.testing.assert_close(loss.double(), expected.flatten(), rtol=0.04, atol=0)


def test_input_and_target_have_unit_variance_at_every_noise_level():
    images = SIGMA_DATA * torch.randn(16, 3, 128, 128, generator=seeded(1))
    network = Recorder()
    loss = loss_of(network, Batch(images, None, None, None), make_config())
    assert network.timestep.max() - network.timestep.min() > 0.5
    torch.testing.assert_close(loss, torch.ones(16), rtol=0.04, atol=0)  # the mean square of the target
    torch.testing.assert_close(network.sample.std(dim=(1, 2, 3)), torch.ones(16), rtol=0.04, atol=0)


def test_noise_levels_are_drawn_from_the_configured_distribution():
    network = Recorder()
    config = make_config(p_mean=0.4, p_std=0.8)
    loss_of(network, images_of([0.0] * 20_000, side=1), config)
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
    first, same, other = (loss_of(network, batch, config, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.isclose(first, other).any()


def test_a_half_precision_output_is_compared_in_float32():
    network = Recorder(lambda x, c_noise: torch.zeros_like(x, dtype=torch.bfloat16))
    loss = loss_of(network, images_of([0.5]), make_config())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(Recorder(), images_of([0.5]), make_config()))


def test_the_gradient_reaches_the_network():
    scale = torch.nn.Parameter(torch.tensor(0.0))
    loss = loss_of(Recorder(lambda x, c_noise: x * scale), images_of([0.3, 0.9]), make_config()).mean()
    loss.backward()
    assert scale.grad.abs() > 1e-3


def test_dropped_captions_are_zero_and_the_others_untouched():
    text = torch.rand(10_000, 2, 3, generator=seeded()) + 1
    dropped = drop_text(text, uniform(10_000) < 0.1)
    is_zero = (dropped == 0).flatten(1).all(dim=1)
    assert is_zero.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[~is_zero], text[~is_zero])
    assert torch.equal(drop_text(text, uniform(10_000) < 0.0), text)
    assert drop_text(text, uniform(10_000) < 1.0).abs().max() == 0
    assert drop_text(None, uniform(10_000) < 0.1) is None


def test_the_mask_of_a_dropped_caption_stays():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    text = torch.rand(2, 3, 4, generator=seeded()) * mask[..., None]
    network = Recorder()
    batch = images_of([0.0, 0.5])._replace(text=text, text_mask=mask)
    loss_of(network, batch, make_config(text_drop_rate=1.0))
    assert network.text.abs().max() == 0 and torch.equal(network.text_mask, mask)
    loss_of(network, batch, make_config(text_drop_rate=0.0))
    assert torch.equal(network.text, text) and torch.equal(network.text_mask, mask)


def test_the_augmentation_is_of_the_level_that_it_names():
    low_res = torch.full((32, 3, 64, 64), 0.25)
    batch = Batch(torch.zeros(32, 3, 8, 8), low_res, None, None)
    augmented, c_noise = augment(low_res, draws_of(batch), make_config(noise_conditioning_augmentation=0.4))
    assert c_noise.shape == (32,)
    sigma, _, _, c_in = scalings(c_noise)
    noise = (augmented / c_in - low_res).flatten(1)
    torch.testing.assert_close(noise.std(dim=1), sigma.flatten(), rtol=0.04, atol=0)
    assert (noise.mean(dim=1).abs() < 5 * sigma.flatten() / math.sqrt(noise.shape[1])).all()


def test_augmentation_levels_are_uniform_up_to_the_maximum():
    batch = Batch(torch.zeros(20_000, 3, 1, 1), torch.zeros(20_000, 3, 1, 1), None, None)
    _, c_noise = augment(batch.low_res, draws_of(batch), make_config(noise_conditioning_augmentation=0.4))
    sigma = edm.c_noise_to_sigma(c_noise)
    assert 0.002 * 0.999 <= sigma.min() < 0.003 and 0.399 < sigma.max() <= 0.4 * 1.001
    quantiles = torch.quantile(sigma, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1015, 0.201, 0.3005]), rtol=0, atol=0.01)


def test_the_network_is_given_the_augmented_image_and_its_level():
    low_res = torch.full((2, 3, 4, 4), 0.25)
    network = Recorder()
    batch = images_of([0.0, 0.5])._replace(low_res=low_res)
    loss_of(network, batch, make_config(noise_conditioning_augmentation=0.0))
    assert torch.equal(network.low_res, low_res) and network.low_res_timestep is None
    loss_of(network, batch, make_config(noise_conditioning_augmentation=0.4))
    assert not torch.equal(network.low_res, low_res) and network.low_res_timestep.shape == (2,)
    loss_of(network, images_of([0.0, 0.5]), make_config())
    assert network.low_res is None and network.low_res_timestep is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_network_that_knows_the_image_has_no_variance_preserving_loss(prediction_type):
    """The true noise, image or velocity of Kingma et al. 2021 and Salimans and Ho 2022, from x_t and x_0 in float64."""
    x_0 = torch.tensor([0.3, -0.8, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]

    def ideal(x_t, log_snr):
        snr = log_snr.double().exp()[:, None, None, None]
        alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
        noise = (x_t.double() - alpha * x_0) / sigma
        targets = {"epsilon": noise, "sample": x_0 + 0 * noise, "v_prediction": alpha * noise - sigma * x_0}
        return (targets[prediction_type] + 0.5).float()

    config = make_config(
        preconditioning="variance_preserving",
        prediction_type=prediction_type,
        loss_weighting="min_snr",
        snr_gamma=5.0,
    )
    network = Recorder(ideal)
    loss = loss_of(network, images_of(x_0.flatten().tolist()), config)
    # the prediction is off by 0.5 everywhere; min-SNR weights it (Hang et al. 2023)
    snr = network.timestep.double().exp()
    scale = {"epsilon": snr, "sample": 1 + 0 * snr, "v_prediction": snr + 1}[prediction_type]
    expected = 0.25 * snr.clamp(max=5) / scale
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-6)


def test_variance_preserving_times_are_uniform():
    network = Recorder()
    loss_of(network, images_of([0.0] * 20_000, side=1), make_config(preconditioning="variance_preserving"))
    # the cosine schedule's log-SNR back to its time: alpha = cos(pi/2 (t + s) / (1 + s))
    alpha = network.timestep.double().sigmoid().sqrt()
    t = alpha.acos() * 2 / math.pi * 1.008 - 0.008
    quantiles = torch.quantile(t, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize(("loss", "expected"), [("l2", 0.09), ("l1", 0.3), ("huber", 0.045)])
def test_the_weight_is_outside_the_distance(loss, expected):
    """Off by 0.3 everywhere: 0.3^2, 0.3 and 0.3^2 / 2 (Huber, delta 1), times the weight and not a root of it."""
    config = make_config(preconditioning="variance_preserving", loss_weighting="min_snr", snr_gamma=0.5, loss=loss)
    x_0 = 0.2

    def off(x_t, log_snr):
        snr = log_snr.double().exp()[:, None, None, None]
        return ((x_t - (snr / (1 + snr)).sqrt() * x_0) / (1 / (1 + snr)).sqrt() + 0.3).float()

    network = Recorder(off)
    actual = loss_of(network, images_of([x_0] * 8), config)
    snr = network.timestep.double().exp()
    weight = snr.clamp(max=0.5) / snr
    assert weight.min() < 0.5 and weight.max() == 1
    torch.testing.assert_close(actual.double(), expected * weight, rtol=1e-3, atol=1e-5)


def test_stratified_levels_fall_one_in_each_part():
    network = Recorder()
    config = make_config(stratified_noise=True, p_mean=0.4, p_std=0.8)
    loss_of(network, images_of([0.0] * 64, side=1), config)
    normal = torch.distributions.Normal(0.4, 0.8)
    parts = (64 * normal.cdf(4 * network.timestep)).long()
    assert sorted(parts.tolist()) == list(range(64)) != parts.tolist()


def test_draws_do_not_depend_on_how_a_step_is_shared():
    whole = Batch(torch.zeros(16, 3, 4, 4), torch.zeros(16, 3, 2, 2), None, None)
    draws = StepDraws(make_objective(make_config()), 7, stratified=True)
    draws.begin(3, 160, 16)
    together = draws(160, whole)
    for first in (160, 168):  # two processes of 8, or two accumulated batches
        other = StepDraws(make_objective(make_config()), 7, stratified=True)
        other.begin(3, 160, 16)
        half = other(first, Batch(*(None if x is None else x[:8] for x in whole)))
        for a, b in zip(half, together):
            assert torch.equal(a, b[first - 160 : first - 152])
    noise = together.noise.flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 16
    assert not torch.equal(together.low_res_noise.flatten(1)[:, :8], noise[:, :8])
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_every_step_and_seed_has_draws_of_its_own():
    seen = set()
    for seed, words, step in [(0, (), 0), (0, (), 1), (0, (), 2**32), (1, (), 0), (0, (1,), 0), (1, (1,), 0)]:
        draws = StepDraws(make_objective(make_config()), seed, *words)
        draws.begin(step, 4 * step, 4)
        part = draws(4 * step, Batch(torch.zeros(4, 3, 2, 2), None, None, None))
        seen.add((*part.log_snr.tolist(), *part.text.tolist(), *part.augmentation.tolist()))
        seen.add(tuple(part.noise.flatten().tolist()))
    assert len(seen) == 12


def test_a_mask_that_masks_nothing_is_dropped():
    mask = torch.ones(2, 3, dtype=torch.bool)
    batch = Batch(torch.zeros(2, 3, 4, 4), None, torch.zeros(2, 3, 5), mask)
    assert to_device(batch, torch.device("cpu")).text_mask is None
    mask[1, 2] = False
    assert torch.equal(to_device(batch, torch.device("cpu")).text_mask, mask)
    assert to_device(batch, torch.device("cpu")).images.is_contiguous(memory_format=torch.channels_last)


def test_learned_weights_find_the_size_of_the_loss():
    """`loss / exp(u) + u` is least at `u = ln(loss)`; before training u is 0."""
    weighting = UncertaintyWeighting()
    log_snr = -2 * torch.tensor([0.01, 0.1, 1.0, 10.0]).log()
    loss = torch.tensor([4.0, 0.5, 0.1, 2.0])
    assert torch.equal(weighting(loss, log_snr), loss)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        weighting(loss, log_snr).sum().backward()
        optimizer.step()
    torch.testing.assert_close(weighting(loss, log_snr).detach(), 1 + loss.log(), rtol=0, atol=0.05)


def test_every_weighting_is_a_choice_of_the_configuration():
    choices = get_args(get_type_hints(TrainingConfig)["loss_weighting"])
    assert set(choices) == set(WEIGHTINGS)
    for name in choices:
        config = make_config(preconditioning=WEIGHTINGS[name].preconditionings[-1], loss_weighting=name)
        objective = make_objective(config)
        losses, log_snr = torch.rand(5, generator=seeded()), torch.linspace(-8, 8, 5)
        assert objective.weighting.weight(log_snr).shape == objective.minimized(losses, log_snr).shape == (5,)
        assert len(objective.trained_modules) == (name == "uncertainty")


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighting_names_the_settings_that_it_reads(name):
    """Those that other things read too aside: what only it reads has to be refused with another weighting."""
    read = set()

    class Reading:
        def __getattr__(self, field: str):
            read.add(field)
            return getattr(config, field)

    config = make_config(preconditioning=WEIGHTINGS[name].preconditionings[0], loss_weighting=name)
    WEIGHTINGS[name].from_config(Reading())
    shared = {"seed", "sigma_data", "preconditioning", "p_mean", "p_std", "prediction_type", "beta_schedule"}
    assert read - shared == set(WEIGHTINGS[name].settings)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighting_is_for_the_preconditionings_that_it_names(name):
    for preconditioning in get_args(get_type_hints(TrainingConfig)["preconditioning"]):
        if preconditioning in WEIGHTINGS[name].preconditionings:
            make_config(preconditioning=preconditioning, loss_weighting=name)
        else:
            with pytest.raises(ValueError, match=f"`loss_weighting` is '{name}', but should be another with"):
                make_config(preconditioning=preconditioning, loss_weighting=name)


@pytest.mark.parametrize("preconditioning", ["edm", "variance_preserving"])
def test_noise_levels_are_log_snr_whatever_the_preconditioning(preconditioning):
    """What the network gets is the scaled image and noise of that log-SNR."""
    objective = make_objective(make_config(preconditioning=preconditioning))
    log_snr = objective.draw_log_snr(1000, seeded())
    image, noise = torch.ones(1000, 1), torch.zeros(1000, 1)
    signal = objective.example(image, noise, log_snr).model_input
    spread = objective.example(noise, image, log_snr).model_input
    torch.testing.assert_close((signal / spread).square().log().flatten(), log_snr, rtol=1e-4, atol=1e-3)
