import numpy as np
import pytest
import torch
from tiny_runs import encode, exported, make_unet, weights_of

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.commands.main import main
from diffusers_imagen.training import train
from diffusers_imagen.training.ema.averages import WeightAverages, std_to_gamma
from diffusers_imagen.training.ema.reconstruction import profile_product, solve_coefficients


def profile(steps: int, gamma: float) -> np.ndarray:
    """Weights of steps 1 to `steps`: of `tau^gamma`, integrated over each step and divided by the whole."""
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.diff(edges)


@pytest.fixture
def recorded(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The weights after every step of the next run."""
    weights = []
    step = WeightAverages.step

    def recording(averages, parameters):
        step(averages, parameters)
        weights.append([p.detach().clone() for p in parameters])

    monkeypatch.setattr(WeightAverages, "step", recording)
    return weights


def named(unet: torch.nn.Module, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip((name for name, _ in unet.named_parameters()), values))


def average(weights: list[list[torch.Tensor]], shares: np.ndarray) -> list[torch.Tensor]:
    return [sum(float(share) * value.double() for share, value in zip(shares, values)) for values in zip(*weights)]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
    """The Euclidean distance over all parameters, which `b` names."""
    return sum((a[name].double() - b[name].double()).square().sum() for name in b) ** 0.5


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2])
def test_a_width_is_that_of_its_profile(std):
    """The standard deviation of `(gamma + 1) tau^gamma` on [0, 1], from its sampled moments."""
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    weights = tau ** std_to_gamma(std)
    weights /= weights.sum()
    mean = (weights * tau).sum()
    assert ((weights * (tau - mean) ** 2).sum()) ** 0.5 == pytest.approx(std, rel=1e-4)


def test_inner_products_of_profiles_are_their_integrals():
    for (a, gamma_a), (b, gamma_b) in [((40.0, 6.94), (100.0, 16.97)), ((100.0, 3.0), (100.0, 16.97))]:
        tau = (np.arange(200_000) + 0.5) / 200_000 * min(a, b)
        f = (gamma_a + 1) * tau**gamma_a / a ** (gamma_a + 1)
        g = (gamma_b + 1) * tau**gamma_b / b ** (gamma_b + 1)
        expected = (f * g).mean() * min(a, b)
        assert profile_product(a, gamma_a, b, gamma_b) == pytest.approx(expected, rel=1e-4)


def test_a_width_that_was_tracked_is_its_last_snapshot():
    coefficients, error = solve_coefficients([8, 8, 16, 16], [0.05, 0.1, 0.05, 0.1], 16, 0.1)
    assert coefficients == pytest.approx([0, 0, 0, 1], abs=1e-6) and error < 1e-6


def test_coefficients_are_those_of_least_squares_over_all_steps():
    """Against profiles written out over steps, solved by numpy: snapshots every 32 of 512 steps."""
    steps = [step for step in range(32, 513, 32) for _ in range(2)]
    stds = [0.05, 0.1] * 16
    profiles = np.zeros((512, len(steps)))
    for i, (step, std) in enumerate(zip(steps, stds)):
        profiles[:step, i] = profile(step, std_to_gamma(std))
    for std in (0.04, 0.07, 0.15):
        goal = profile(512, std_to_gamma(std))
        best = profiles @ np.linalg.lstsq(profiles, goal, rcond=None)[0]
        coefficients, error = solve_coefficients(steps, stds, 512, std)
        assert np.linalg.norm(profiles @ coefficients - goal) < 1.2 * np.linalg.norm(best - goal) + 1e-4
        assert error == pytest.approx(np.linalg.norm(profiles @ coefficients - goal) / np.linalg.norm(goal), abs=0.01)


def test_a_finished_run_is_averaged_with_any_width(make_config, recorded, capsys):
    """Against the average over the recorded weights of all steps."""
    unet = make_unet()
    steps = 48
    config = make_config(
        ema_type="power", ema_snapshot_steps=4, max_train_steps=steps, checkpointing_steps=steps, learning_rate=1e-2
    )
    train(config, unet, encode)
    assert len(recorded) == steps
    tracked = named(unet, average(recorded, profile(steps, std_to_gamma(0.05))))
    for name, value in exported(config.output_dir).items():
        torch.testing.assert_close(value.double(), tracked[name], atol=1e-5, rtol=1e-4)

    assert main(["reconstruct-ema", config.output_dir, "--ema_std", "0.05", "0.15"]) == 0
    assert "ema-0.15: width 0.15, relative error" in capsys.readouterr().out
    for std, share in ((0.05, 0.0), (0.15, 0.02)):  # 0.05 was tracked: its only error is the rounding of snapshots
        actual = ImagenUNetModel.from_pretrained(f"{config.output_dir}/ema-{std:g}", subfolder="unet").state_dict()
        expected = named(unet, average(recorded, profile(steps, std_to_gamma(std))))
        rounding = distance({name: value.half() for name, value in expected.items()}, expected)
        far = distance(named(unet, recorded[-1]), expected)
        assert distance(actual, expected) < 1.1 * rounding + share * far
    assert main(["reconstruct-ema", config.output_dir, "--ema_std", "0.15"]) == 2
    assert "which exists already" in capsys.readouterr().err
    assert main(["reconstruct-ema", config.output_dir, "--ema_std", "0.3"]) == 2
    assert "`ema-std` is 0.3" in capsys.readouterr().err


def test_the_averaged_weights_are_exported(make_config, recorded):
    """With the warm-up of diffusers' EMAModel at power 3/4: decay 0 at the first step, then 1 - (1 + n)^-0.75."""
    unet = make_unet()
    config = make_config(ema_decay=0.5)
    train(config, unet, encode)
    mean = recorded[0]
    for n, current in enumerate(recorded):
        decay = min(0.5, 1 - (1 + n) ** -0.75)
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, current)]
    actual = exported(config.output_dir)
    for name, value in named(unet, mean).items():
        torch.testing.assert_close(actual[name], value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), recorded[-1]))  # exporting put them back


def test_a_constant_decay_is_constant_from_the_first_step(make_config, recorded):
    unet = make_unet()
    config = make_config(ema_decay=0.9, ema_type="constant")
    train(config, unet, encode)
    mean = recorded[0]
    for current in recorded[1:]:
        mean = [0.9 * a + 0.1 * b for a, b in zip(mean, current)]
    actual = exported(config.output_dir)
    for name, value in named(unet, mean).items():
        torch.testing.assert_close(actual[name], value, atol=1e-6, rtol=1e-5)


def test_without_averages_the_weights_themselves_are_exported(make_config):
    unet = make_unet()
    config = make_config(use_ema=False, max_train_steps=2)
    train(config, unet, encode)
    actual = exported(config.output_dir)
    assert all(torch.equal(actual[name], value) for name, value in weights_of(unet).items())
