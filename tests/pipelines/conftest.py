"""Single-stage pipelines of the small cascade's parts, and what tests ask of all pipelines."""

import pytest
import torch

from diffusers_imagen import EDMHeunScheduler, ImagenPipeline, ImagenSuperResolutionPipeline


@pytest.fixture
def base_pipeline(base_unet, tokenizer, text_encoder) -> ImagenPipeline:
    pipe = ImagenPipeline(base_unet, EDMHeunScheduler(clip_sample=True), tokenizer, text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sr_pipeline(sr_unet, tokenizer, text_encoder) -> ImagenSuperResolutionPipeline:
    pipe = ImagenSuperResolutionPipeline(
        sr_unet, EDMHeunScheduler(clip_sample=True), tokenizer, text_encoder, scale_factor=2
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture() -> torch.Tensor:
    """Smooth and different everywhere: `(1, 3, 32, 32)` in [0, 1]."""
    x = torch.linspace(0, 1, 32)
    return torch.stack([x[None].expand(32, 32), x[:, None].expand(32, 32), x[None] * x[:, None]])[None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def run():
    """Calls a pipeline with few steps and a seeded generator; images come back in [-1, 1]."""

    def run(pipe, prompt="a red apple", **kwargs):
        arguments = {"num_inference_steps": 2, "generator": seeded(), "output_type": "latent", **kwargs}
        return pipe(prompt, **arguments)

    return run


@pytest.fixture
def count_calls():
    """Records the batch sizes of a network's calls from then on."""

    def count_calls(module: torch.nn.Module) -> list[int]:
        calls = []
        module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        return calls

    return count_calls
