"""Schedulers of diffusers in the pipelines: driven rightly, or refused by name before any network runs."""

import diffusers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler
from diffusers_imagen.diffusion.discrete_ddpm import cosine_betas
from diffusers_imagen.pipelines.schedules import StageSettings, check_drives, has_levels
from diffusers_imagen.pipelines.stage_table import BASE
from diffusers_imagen.pipelines.stages import Stage


REFUSED = [
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",  # its sigmas are places on a ramp
    "DDIMScheduler",
]


@pytest.mark.parametrize("own", [{"sigmas": [80.0, 10.0, 1.0]}, {"timesteps": [0.9, 0.5, 0.1]}])
@pytest.mark.parametrize("name", REFUSED)
def test_levels_that_a_scheduler_does_not_take_are_refused_by_name(base_pipeline, run, count_calls, name, own):
    base_pipeline.scheduler = getattr(diffusers, name)()
    calls = count_calls(base_pipeline.unet)
    with pytest.raises(ValueError, match=f"`{next(iter(own))}` is given for the stage `base`, but its {name}"):
        run(base_pipeline, **own)
    assert calls == []
    run(base_pipeline)  # a number of steps is taken
    assert calls


def test_levels_of_the_caller_are_the_schedulers(base_pipeline, run):
    base_pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    run(base_pipeline, sigmas=[10.0, 5.0, 1.0, 0.0])  # which diffusers ends with 0
    assert base_pipeline.scheduler.sigmas.tolist() == pytest.approx([10.0, 5.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "own", [{}, {"sigmas": [10.0, 5.0, 1.0]}, {"timesteps": [49, 25, 1]}, {"timesteps": [0.9, 0.1]}]
)
def test_every_scheduler_of_diffusers_drives_a_stage_or_is_refused(base_unet, own):
    settings = StageSettings(3, own.get("sigmas"), own.get("timesteps"), 1.0, None, 0.0, 0.0)
    names = {kind.name for kind in KarrasDiffusionSchedulers} | {"FlowMatchEulerDiscreteScheduler", "RePaintScheduler"}
    driven = []
    state = torch.get_rng_state()
    for name in sorted(names):
        try:
            scheduler = getattr(diffusers, name)(num_train_timesteps=50)  # for speed
        except ImportError:  # of a library that need not be there
            continue
        try:
            check_drives(scheduler, Stage(BASE, base_unet, scheduler), settings)
            driven.append(name)
        except ValueError as error:
            assert "`base`" in str(error)
    assert torch.equal(torch.get_rng_state(), state)
    if not own:
        assert {"DDPMScheduler", "EDMEulerScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"} <= set(
            driven
        )
        assert "FlowMatchEulerDiscreteScheduler" not in driven


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])  # which have no `set_begin_index`
def test_resampling_needs_no_begin_index(base_pipeline, run, picture, name):
    base_pipeline.scheduler = getattr(diffusers, name)()
    small = picture[..., ::2, ::2]
    out = run(base_pipeline, image=small, mask_image=torch.ones(1, 1, 16, 16), num_resample_times=2)
    assert out.images.isfinite().all()


COSINE = "squaredcos_cap_v2"
OTHER_LEVELS = {
    "other betas": (diffusers.DDPMScheduler(), "DDPMScheduler with `beta_schedule` 'linear'"),
    "fewer": (diffusers.DDIMScheduler(100, beta_schedule=COSINE), "DDIMScheduler with `beta_schedule`"),
    "an SNR of zero": (diffusers.DDIMScheduler(beta_schedule=COSINE, rescale_betas_zero_snr=True), "DDIMScheduler with"),
    "none, ours": (EDMAdamsScheduler(), "EDMAdamsScheduler with `preconditioning` 'edm'"),
    "none, of diffusers": (diffusers.EDMEulerScheduler(), "EDMEulerScheduler with no `beta_schedule`"),
}  # fmt: skip


@pytest.mark.parametrize("scheduler, named", OTHER_LEVELS.values(), ids=OTHER_LEVELS)
def test_other_noise_levels_than_the_networks_own_are_refused(base_pipeline, run, count_calls, scheduler, named):
    base_pipeline.unet.register_to_config(trained_beta_schedule=COSINE)
    base_pipeline.scheduler = scheduler
    calls = count_calls(base_pipeline.unet)
    with pytest.raises(ValueError) as error:
        run(base_pipeline)
    assert f"is {named}" in str(error.value) and "create one by" in str(error.value) and "\n" not in str(error.value)
    assert calls == []


@pytest.mark.parametrize(
    "scheduler_class",
    [EDMAdamsScheduler, EDMHeunScheduler, diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler],
)
def test_the_way_that_is_named_leads_to_a_scheduler_of_these_levels(base_pipeline, run, scheduler_class):
    base_pipeline.unet.register_to_config(trained_beta_schedule=COSINE)
    loaded = diffusers.DDPMScheduler(beta_schedule=COSINE)
    base_pipeline.scheduler = scheduler_class.from_config(loaded.config)
    assert run(base_pipeline).images.isfinite().all()


def test_betas_are_compared_by_what_they_are():
    betas = cosine_betas(1000).float()
    for trained in (betas.tolist(), betas.numpy()):
        assert has_levels(diffusers.DDPMScheduler(trained_betas=trained).config, COSINE)
    assert not has_levels(diffusers.DDPMScheduler(trained_betas=(betas * 0.9).tolist()).config, COSINE)
    assert has_levels(diffusers.DDPMScheduler().config, "linear")
