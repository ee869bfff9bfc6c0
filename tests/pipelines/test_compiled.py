"""Compiled networks in pipelines are called, checked, saved and composed as the networks that they are."""

from copy import deepcopy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler, ImagenCascadePipeline
from diffusers_imagen.utils.modules import is_compiled


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


def test_parts_that_are_compiled_are_found(base_unet, sr_unet):
    assert not is_compiled(base_unet) and is_compiled(compiled(base_unet))
    base_unet.compile_repeated_blocks(backend="eager")
    assert is_compiled(base_unet) and not is_compiled(sr_unet)
    sr_unet.compile(backend="eager")
    assert is_compiled(sr_unet)


# CUDA graphs, of `torch.compile(mode="reduce-overhead")`: the next call of any network overwrites the output of the last


class Overwriting:
    """Has every call of some modules overwrite what calls before it returned."""

    def __init__(self, *modules: torch.nn.Module):
        self.outputs: list[torch.Tensor] = []
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.overwrite())
            module.register_forward_hook(lambda module, args, output: self.outputs.append(output[0]))

    def overwrite(self) -> None:
        for output in self.outputs:
            output.fill_(1e3)
        self.outputs.clear()


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMAdamsScheduler(),
        EDMHeunScheduler(),
        DPMSolverMultistepScheduler(prediction_type="sample"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_no_output_of_a_network_is_read_after_its_next_call(cascade, run, scheduler):
    cascade.base_guidance_unet = deepcopy(cascade.base_unet)
    cascade.base_scheduler = cascade.sr256_scheduler = scheduler
    cascade.enable_slicing(1)
    cascade.enable_tiling(20, 8)
    kept: list[torch.Tensor] = []

    def keep(pipe, step, timestep, tensors):
        kept.append(tensors["pred_original_sample"])

    def draw() -> list[torch.Tensor]:
        kept.clear()
        options = {"num_inference_steps": [3, 2], "guidance_scale": [2.0, 3.0], "guidance_interval": (0.01, 2.0)}
        options |= {"callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"]}
        out = run(cascade, ["a red apple", "a tiger"], callback_on_step_end=keep, **options)
        return [*out.stage_images.values(), *(tensor for tensor in kept if tensor is not None)]

    expected = [tensor.clone() for tensor in draw()]
    Overwriting(cascade.base_unet, cascade.base_guidance_unet, cascade.sr256_unet)
    for own, other in zip(draw(), expected, strict=True):
        assert torch.equal(own, other)


def test_no_output_of_a_text_encoder_is_read_after_its_next_call(cascade):
    source = cascade.text_source
    source.keeps_padding = True
    prompts = ["a red apple", "a tiger"]
    expected = source.encode_prompts(prompts, 1).embeds
    Overwriting(cascade.text_encoder)
    assert torch.equal(source.encode_prompts(prompts, 1).embeds, expected)
