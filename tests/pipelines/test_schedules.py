"""Schedulers of diffusers in the pipelines: driven rightly, or refused by name before any network runs."""

import diffusers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

from diffusers_imagen.pipelines.schedules import StageSettings, check_drives
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
    with pytest.raises(ValueError, match=f"`{next(iter(own))}` was given for the stage `base`, but its {name}"):
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
