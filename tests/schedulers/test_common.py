"""What all schedulers of the package have in common: precision, devices, thresholding, configurations, bad input."""

import inspect
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from ideal_networks import edm_network, sample

from diffusers_imagen.diffusion.preconditioning import PRECONDITIONINGS, NetworkPreconditioning
from diffusers_imagen.schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler


OF_EDM = [EDMHeunScheduler, EDMAdamsScheduler]
SCHEDULERS = [*OF_EDM, ContinuousDDPMScheduler]
for_each = pytest.mark.parametrize("scheduler_class", SCHEDULERS)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- a step


@for_each
def test_a_step_is_called_as_those_of_diffusers(scheduler_class):
    # pipelines give a generator to every scheduler that takes one
    draws = [] if scheduler_class is EDMAdamsScheduler else ["generator"]
    names = ["self", "model_output", "timestep", "sample", *draws, "return_dict"]
    assert list(inspect.signature(scheduler_class.step).parameters) == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "scheduler_class, config",
    [
        *((each, {"thresholding": True}) for each in SCHEDULERS),
        *((each, {"thresholding": True, "preconditioning": "discrete"}) for each in SCHEDULERS),
        (ContinuousDDPMScheduler, {}),
    ],
)
def test_half_precision(scheduler_class, config, dtype):
    # NeMo's sampler gives NaN from its first step on
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(10)
    x = images(2, 3, 8, 8).to(dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        x, denoised = scheduler.step(0.9 * x_in, t, x, return_dict=False)
        assert x_in.dtype == x.dtype == denoised.dtype == dtype
        assert x.isfinite().all() and denoised.abs().max() <= 1
    if scheduler.sigmas[-1] == 0:
        assert x.abs().max() <= 1


@pytest.mark.parametrize(
    "scheduler_class, config",
    [
        *((each, {"thresholding": True}) for each in SCHEDULERS),
        (EDMHeunScheduler, {}),
        (EDMHeunScheduler, {"thresholding": True, "s_churn": 5.0}),
        (ContinuousDDPMScheduler, {"preconditioning": "edm"}),
        *((each, {"preconditioning": "discrete"}) for each in SCHEDULERS),
    ],
)
def test_no_step_waits_for_a_device(scheduler_class, config):
    # reading a number from a meta tensor raises
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 3, 8, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    assert x.device.type == "meta"


@pytest.mark.parametrize("scheduler_class", OF_EDM)
def test_thresholding(scheduler_class):
    x, output = (80 * images(2, 2, 3, 8, 8)).unbind()

    def denoised(**config):
        scheduler = scheduler_class(**config)
        scheduler.set_timesteps(5)
        result = scheduler.step(output, scheduler.timesteps[0], x)
        # the first step is Euler's
        ratio = scheduler.sigmas[1] / scheduler.sigmas[0]
        expected = ratio * x + (1 - ratio) * result.pred_original_sample
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-4, atol=1e-4)
        return result.pred_original_sample

    plain = denoised()
    assert plain.abs().max() > 2
    torch.testing.assert_close(denoised(clip_sample=True), plain.clamp(-1, 1))
    torch.testing.assert_close(denoised(clip_sample=True, clip_sample_range=1.5), plain.clamp(-1.5, 1.5))
    for config in ({"sample_max_value": None}, {"sample_max_value": 1.2}, {"dynamic_thresholding_ratio": 0.9}):
        config = {"sample_max_value": None, **config, "thresholding": True}
        expected = DDPMScheduler(**config)._threshold_sample(plain)
        for clip_sample in (True, False):
            torch.testing.assert_close(denoised(**config, clip_sample=clip_sample), expected)


# ---- configuration


@pytest.mark.parametrize(
    "scheduler_class, values",
    [
        (EDMHeunScheduler, {"sigma_max": 40.0, "s_churn": 3.0, "s_max": math.inf, "thresholding": True}),
        (EDMAdamsScheduler, {"sigma_max": 40.0, "sigma_data": 0.6, "thresholding": True}),
        (ContinuousDDPMScheduler, {"beta_schedule": "linear", "prediction_type": "v_prediction", "eta": 0.5}),
    ],
)
def test_configuration_round_trip(scheduler_class, values, tmp_path):
    scheduler = scheduler_class(**values)
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert json.loads(text)["_class_name"] == scheduler_class.__name__ and "Infinity" not in text
    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert {key: None if value == math.inf else value for key, value in values.items()}.items() <= kept.items()
    draws = "generator" in inspect.signature(scheduler.step).parameters
    for other in (scheduler_class.from_pretrained(tmp_path), scheduler_class.from_config(scheduler.config)):
        assert {key: other.config[key] for key in kept} == kept
        runs = [
            sample(each, 5, **({"generator": torch.Generator().manual_seed(0)} if draws else {}))
            for each in (scheduler, other)
        ]
        assert torch.equal(*runs) and torch.equal(scheduler.timesteps, other.timesteps)


@pytest.mark.parametrize("ours", OF_EDM)
@pytest.mark.parametrize("other", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_configurations_of_diffusers_edm_schedulers_keep_their_meaning(ours, other):
    values = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.6, "prediction_type": "v_prediction"}
    there = other.from_config(ours(**values).config)
    assert {key: there.config[key] for key in values} == values
    back = ours.from_config(other(rho=5.0, **values).config)
    assert {key: back.config[key] for key in values} == values and back.config.preconditioning == "edm"
    assert other.from_config(back.config).config.rho == 5.0
    with pytest.raises(ValueError, match="`final_sigmas_type` is 'sigma_min', but should be 'zero'"):
        ours.from_config(other(final_sigmas_type="sigma_min").config)
    with pytest.raises(ValueError, match="`sigma_schedule` is 'exponential', but should be 'karras'"):
        ours.from_config(other(sigma_schedule="exponential").config)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("ours", OF_EDM)
@pytest.mark.parametrize("other", [DDPMScheduler, DDIMScheduler])
def test_discrete_schedulers_refuse_edm_networks(ours, other, live, tmp_path):
    scheduler = ours()
    if not live:
        scheduler.save_pretrained(tmp_path)
        scheduler = ours.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="none: EDM noise levels is not implemented for .*" + other.__name__):
        other.from_config(scheduler.config)


@pytest.mark.parametrize("ours", OF_EDM)
def test_configurations_go_round_among_ours(ours):
    trained = ContinuousDDPMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
    there = ours.from_config(trained.config)
    back = ContinuousDDPMScheduler.from_config(there.config)
    assert all(back.config[key] == trained.config[key] for key in trained.config if not key.startswith("_"))
    assert ContinuousDDPMScheduler.from_config(ours().config).config.preconditioning == "edm"
    heun = EDMHeunScheduler(rho=5.0, s_churn=3.0)
    again = EDMHeunScheduler.from_config(ours.from_config(heun.config).config)
    assert again.config.rho == 5.0 and again.config.s_churn == 3.0


def test_every_preconditioning_is_a_choice_and_goes_there_and_back():
    assert list(PRECONDITIONINGS) == list(NetworkPreconditioning.__args__)
    sigma = torch.tensor([0.01, 1.0, 80.0], dtype=torch.float64)
    for name, kind in PRECONDITIONINGS.items():
        for prediction_type in kind.prediction_types:
            scheduler = EDMAdamsScheduler(preconditioning=name, prediction_type=prediction_type)
            there = scheduler.precondition_noise(sigma)
            torch.testing.assert_close(scheduler.timestep_to_sigma(there), sigma)


# ---- bad input


OF_TWO = {"preconditioning": "discrete", "num_train_timesteps": 2}
BAD_CONFIGURATIONS = [
    ({"sigma_min": 2.0, "sigma_max": 2.0}, "`sigma_min` is 2.0, but"),
    ({"sigma_data": 0.0}, "`sigma_data` is 0.0, but"),
    ({"rho": -1.0}, "`rho` is -1.0, but"),
    ({"s_churn": -1.0}, "`s_churn` is -1.0, but"),
    ({"s_noise": -1.0}, "`s_noise` is -1.0, but"),
    ({"eta": 1.5}, r"`eta` is 1.5, but .* in \[0, 1\]"),
    ({"preconditioning": "edm", "prediction_type": "sample"}, "'sample', but .* 'epsilon', 'v_prediction' with"),
    ({"prediction_type": "noise"}, "`prediction_type` is 'noise', but .*epsilon"),
    ({"preconditioning": "flow"}, "`preconditioning` is 'flow', but .*variance_preserving"),
    ({"beta_schedule": "scaled_linear"}, "`beta_schedule` is 'scaled_linear', but .* with `preconditioning`"),
    ({"preconditioning": "discrete", "beta_schedule": "laplace"}, "is 'laplace', but .*'scaled_linear'.* 'discrete'"),
    ({"preconditioning": "discrete", "num_train_timesteps": 1}, "`num_train_timesteps` is 1, but .* at least 2"),
    ({"beta_start": 0.0}, "`beta_start` is 0.0, but"),
    ({"beta_end": 1.0}, "`beta_end` is 1.0, but"),
    (
        {**OF_TWO, "trained_betas": [0.1, 0.2, 0.3]},
        "`trained_betas` is .*, but .*`num_train_timesteps`, 2,",
    ),
    ({**OF_TWO, "trained_betas": [0.1, 1.0]}, r"`trained_betas` is .*, but .* in \[1e-10, 0.99999\]"),
    ({"beta_schedule": "cosine"}, "`beta_schedule` is 'cosine', but .*squaredcos_cap_v2"),
    ({"dynamic_thresholding_ratio": 2.0}, "`dynamic_thresholding_ratio` is 2.0, but"),
    ({"dynamic_thresholding_ratio": 0.0}, "`dynamic_thresholding_ratio` is 0.0, but"),
    ({"sample_max_value": 0.5}, "`sample_max_value` is 0.5, but"),
    ({"clip_sample": True, "clip_sample_range": 0.0}, "`clip_sample_range` is 0.0, but .* above 0"),
    ({"num_train_timesteps": 0}, "`num_train_timesteps` is 0, but"),
]


@pytest.mark.parametrize(
    "scheduler_class, config, message",
    [
        (each, config, message)
        for each in SCHEDULERS
        for config, message in BAD_CONFIGURATIONS
        if config.keys() <= inspect.signature(each).parameters.keys()
    ],
)
def test_bad_configuration(scheduler_class, config, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class(**config)


@for_each
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Exactly one of `num_inference_steps`, `sigmas`, `timesteps`"),
        (
            {"num_inference_steps": 3, "sigmas": [3.0, 2.0, 1.0]},
            "Exactly one of `num_inference_steps`, `sigmas`, `timesteps`",
        ),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, but .* at least 1"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5, but should be an integer"),
        ({"sigmas": [1.0, 2.0]}, r"`sigmas` is \[1.0, 2.0\], but .* decrease strictly"),
        ({"sigmas": [2.0, 2.0]}, "decrease strictly"),
        ({"sigmas": [2.0, -1.0]}, "above 0"),
        ({"sigmas": []}, "above 0"),
        ({"sigmas": [math.nan, 1.0]}, "finite"),
    ],
)
def test_bad_schedule(scheduler_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class().set_timesteps(**arguments)


@for_each
def test_bad_steps(scheduler_class):
    scheduler, x = scheduler_class(), torch.ones(1, 2)
    with pytest.raises(ValueError, match="`num_inference_steps` is None, but .*set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="`timestep` is 123.0, but .* values of `scheduler.timesteps`, .* to .*"):
        scheduler.step(x, 123.0, x)
    for index in (0, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"`timestep` is (0|tensor\(1\)), but .*not an index"):
            scheduler.step(x, index, x)
    with pytest.raises(ValueError, match=r"`model_output` is of shape \(1, 4\), but .*shape of `sample`"):
        scheduler.step(torch.ones(1, 4), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="`timestep` is of torch.bfloat16, but .*float32 or float64"):
        scheduler.add_noise(x, x, torch.tensor([math.pi], dtype=torch.bfloat16))
    sample(scheduler, 3, edm_network)
    with pytest.raises(ValueError, match="the run has ended"):
        scheduler.step(x, scheduler.timesteps[0], x)
