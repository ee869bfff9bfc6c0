"""Compiled networks in pipelines are called, checked, saved and composed as the networks that they are."""

from copy import deepcopy

import pytest
import torch

from diffusers_imagen import ImagenCascadePipeline


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")


@pytest.fixture(autouse=True)
def wrapped_only():
    """What is compiled is wrapped as ever, and runs without the tens of seconds of a compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def compiled_cascade(cascade) -> ImagenCascadePipeline:
    for name in ("base_unet", "sr256_unet", "text_encoder"):
        setattr(cascade, name, compiled(getattr(cascade, name)))
    return cascade


def test_a_cascade_of_compiled_networks_draws_the_same(cascade, run):
    cascade.base_guidance_unet = deepcopy(cascade.base_unet)
    expected = run(cascade, guidance_scale=3.0).images
    for name in ("base_unet", "base_guidance_unet", "sr256_unet", "text_encoder"):
        setattr(cascade, name, compiled(getattr(cascade, name)))
    assert torch.equal(run(cascade, guidance_scale=3.0).images, expected)
    assert "base_unet" in cascade.memory_report()


def test_compiled_networks_are_saved_as_they_were(compiled_cascade, tmp_path):
    weights = {name: weight.clone() for name, weight in compiled_cascade.base_unet._orig_mod.state_dict().items()}
    compiled_cascade.save_pretrained(tmp_path)
    loaded = ImagenCascadePipeline.from_pretrained(tmp_path)
    assert loaded.base_unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.base_unet.state_dict().items())


def test_stages_are_composed_of_compiled_networks(compiled_cascade, run):
    pipe = ImagenCascadePipeline.from_stages(
        (compiled_cascade.base_unet, compiled_cascade.base_scheduler),
        (compiled_cascade.sr256_unet, compiled_cascade.sr256_scheduler),
        text_encoder=compiled_cascade.text_encoder,
        tokenizer=compiled_cascade.tokenizer,
    )
    assert pipe.base_unet is compiled_cascade.base_unet and len(pipe.stages) == 2


def test_weights_of_compiled_networks_are_named_as_they_were(base_pipeline, run):
    with torch.no_grad():
        base_pipeline.unet.conv_out.bias.fill_(torch.nan)
    base_pipeline.unet = compiled(base_pipeline.unet)
    with pytest.raises(FloatingPointError, match="the weight `conv_out.bias` of its network"):
        run(base_pipeline, num_inference_steps=1, guidance_scale=1.0)
