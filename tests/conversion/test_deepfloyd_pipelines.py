"""A stage of DeepFloyd IF back in diffusers' format."""

import inspect

import pytest
import torch
from deepfloyd_repository import stage_1, stage_2
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline

from diffusers_imagen import EDMAdamsScheduler, ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.conversion import pipeline_to_deepfloyd, unet_from_deepfloyd
from diffusers_imagen.conversion.deepfloyd_pipelines import PARTS


def parts_of(theirs: DiffusionPipeline) -> dict:
    """Its components for a pipeline of this package."""
    shared = {name: getattr(theirs, name) for name in PARTS}
    return {**shared, "unet": unet_from_deepfloyd(theirs.unet), "scheduler": theirs.scheduler}


def draw(pipe: DiffusionPipeline, **inputs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red apple", num_inference_steps=2, **inputs, generator=generator, output_type="pt").images


CASES = {
    "stage I": (stage_1, ImagenPipeline, {}, IFPipeline, {"height": 16, "width": 16}),
    "stage II": (
        stage_2,
        ImagenSuperResolutionPipeline,
        {"scale_factor": 2},
        IFSuperResolutionPipeline,
        {"height": 32, "width": 32, "image": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)},
    ),
}


@pytest.mark.parametrize("make, ours, options, theirs, inputs", CASES.values(), ids=CASES)
def test_the_way_there_and_back_gives_the_same_pipeline(make, ours, options, theirs, inputs, tmp_path):
    before = make()
    pipeline_to_deepfloyd(ours(**parts_of(before), **options)).save_pretrained(tmp_path)
    after = theirs.from_pretrained(tmp_path)
    assert after.config.requires_safety_checker
    for name in ("unet", "text_encoder", "safety_checker"):
        weights = getattr(after, name).state_dict()
        expected = getattr(before, name).state_dict()
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
    images = draw(after, **inputs)
    assert torch.equal(images, draw(before, **inputs))
    assert images.std() > 0.05


def test_a_scheduler_of_this_package_becomes_that_of_the_repository_with_a_fixed_variance():
    theirs = stage_1()
    parts = {**parts_of(theirs), "scheduler": EDMAdamsScheduler.from_config(theirs.scheduler.config)}
    scheduler = pipeline_to_deepfloyd(ImagenPipeline(**parts)).scheduler
    assert type(scheduler) is DDPMScheduler
    expected = {name: theirs.scheduler.config[name] for name in inspect.signature(DDPMScheduler).parameters}
    assert theirs.scheduler.config.variance_type == "learned_range"  # which training does not train
    assert {name: scheduler.config[name] for name in expected} == {**expected, "variance_type": "fixed_small"}


def test_a_stage_of_a_cascade_is_named(cascade):
    base, upscaler = parts_of(stage_1()), parts_of(stage_2())
    pipe = ImagenCascadePipeline(
        base["unet"], base["scheduler"], sr256_unet=upscaler["unet"], sr256_scheduler=upscaler["scheduler"]
    )
    with pytest.raises(ValueError, match="`stage` is None, but should be one of base, sr256"):
        pipeline_to_deepfloyd(pipe)
    with pytest.raises(ValueError, match="`stage` is 'sr1024'"):
        pipeline_to_deepfloyd(pipe, "sr1024")
    assert isinstance(pipeline_to_deepfloyd(pipe, "sr256"), IFSuperResolutionPipeline)
    found = pipeline_to_deepfloyd(pipe, "base")
    assert isinstance(found, IFPipeline) and not found.config.requires_safety_checker
    with pytest.raises(ValueError, match="The network of the stage `base` is not one of DeepFloyd IF's: "):
        pipeline_to_deepfloyd(cascade, "base")
