"""Configurations of diffusers' discrete schedulers: kept, refused, and given back."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
    configuration_utils,
)

from diffusers_imagen.schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler


OURS = [EDMAdamsScheduler, EDMHeunScheduler, ContinuousDDPMScheduler]
DISCRETE = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler]
# as the repositories of DeepFloyd IF have them
IF_SETTINGS = {
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
for_each = pytest.mark.parametrize("ours", OURS)


@for_each
@pytest.mark.parametrize("other", DISCRETE)
@pytest.mark.parametrize("live", [True, False])
def test_what_a_network_is_goes_there_and_back(ours, other, live, tmp_path):
    values = {**IF_SETTINGS, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    source = other(**values)
    if not live:
        source.save_pretrained(tmp_path / "other")
    scheduler = ours.from_config(source.config) if live else ours.from_pretrained(tmp_path / "other")
    assert scheduler.config.preconditioning == "discrete"
    assert {key: scheduler.config[key] for key in values} == values
    assert scheduler.config.beta_start == 0.0001 and scheduler.config.beta_end == 0.02
    scheduler.save_pretrained(tmp_path / "ours")
    assert "Infinity" not in (tmp_path / "ours" / "scheduler_config.json").read_text()
    for each in (scheduler, ours.from_pretrained(tmp_path / "ours")):
        back = other.from_config(each.config)
        assert {key: back.config[key] for key in source.config if key[0] != "_"} == {
            key: value for key, value in source.config.items() if key[0] != "_"
        }
        torch.testing.assert_close(back.alphas_cumprod, source.alphas_cumprod, rtol=0, atol=0)
        assert ours.from_config(back.config).config.preconditioning == "discrete"


@for_each
@pytest.mark.parametrize("other", [DDPMScheduler, DDIMScheduler])
def test_diffusers_samples_the_same_from_the_way_back(ours, other):
    source = other(**IF_SETTINGS)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(scheduler):
        scheduler.set_timesteps(10)
        y, generator = x, torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            y = scheduler.step(torch.sin(3 * y), t, y, generator=generator).prev_sample
        return y

    assert torch.equal(run(other.from_config(ours.from_config(source.config).config)), run(source))


@for_each
def test_a_learned_variance_is_dropped(ours):
    scheduler = ours.from_config(DDPMScheduler(**IF_SETTINGS, variance_type="learned_range").config)
    # a pipeline of diffusers' would hand six channels to `step`
    assert "variance_type" not in scheduler.config
    assert DDPMScheduler.from_config(scheduler.config).config.variance_type == "fixed_small"


@for_each
def test_clipping_is_that_of_the_other_scheduler(ours):
    assert ours.from_config(DDPMScheduler(clip_sample_range=2.0).config).config.clip_sample_range == 2.0
    assert ours.from_config(DDPMScheduler().config).config.clip_sample
    assert not ours.from_config(DDIMScheduler(clip_sample=False).config).config.clip_sample
    assert not ours.from_config(DPMSolverMultistepScheduler().config).config.clip_sample  # which has no such word


@for_each
def test_an_old_file_means_the_defaults_of_its_class(ours, tmp_path):
    file = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "thresholding": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    config = ours.from_pretrained(tmp_path).config
    assert config.preconditioning == "discrete" and config.sample_max_value == 1.0 and config.beta_end == 0.02


@for_each
@pytest.mark.parametrize("other", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_reading_is_silent(ours, other, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(configuration_utils.logger, "warning", warnings.append)
    ours.from_config(other().config).save_pretrained(tmp_path)
    ours.from_pretrained(tmp_path)
    assert warnings == []


@for_each
@pytest.mark.parametrize("other", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_other_discrete_schedulers(ours, other):
    scheduler = ours.from_config(other(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config)
    assert scheduler.config.preconditioning == "discrete" and scheduler.config.beta_end == 0.012
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[0].item() == pytest.approx(14.6, rel=0.01)  # that of the last beta, below 80


@for_each
@pytest.mark.parametrize(
    "other, message",
    [
        (DDPMScheduler(rescale_betas_zero_snr=True), "`rescale_betas_zero_snr` is True, but should be False in a conf"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "`use_flow_sigmas` is True, but should be False"),
        (DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", algorithm_type="dpmsolver"), "`final_sigmas_type` is"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "`timestep_type` is 'continuous', but should be 'discrete'"),
        (DDPMScheduler(beta_schedule="laplace"), "`beta_schedule` is 'laplace', but should be one of 'linear', "),
        (DDPMScheduler(trained_betas=[0.1, 0.2]), "`trained_betas` is .0.1, 0.2., but should be a list of .*, 1000,"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_here_is_refused_by_name(ours, other, message):
    with pytest.raises(ValueError, match=message):
        ours.from_config(other.config)
