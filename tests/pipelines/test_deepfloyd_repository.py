"""Stages of DeepFloyd IF from folders and loaded pipelines of diffusers, beside diffusers' own two calls."""

import shutil
from pathlib import Path

import pytest
import torch
from deepfloyd_repository import stage_1, stage_2, write_repository
from diffusers import (
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from diffusers.pipelines.deepfloyd_if import pipeline_if_superresolution
from diffusers.utils.torch_utils import randn_tensor

from diffusers_imagen import ImagenCascadePipeline
from diffusers_imagen.pipelines.inputs import per_image_generators


STEPS, PROMPT = 5, "a red apple"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Repositories of both stages as folders, which tests must not change."""
    path = tmp_path_factory.mktemp("repositories")
    return {
        "I": write_repository(stage_1(), path / "IF-I"),
        "II": write_repository(stage_2(), path / "IF-II"),
        "I fp16": write_repository(stage_1(), path / "IF-I-fp16", variant="fp16"),
    }


@pytest.fixture
def copied(folders, tmp_path):
    """Copies a repository, for a test that changes its files; without weights."""

    def copied(name: str) -> Path:
        folder = tmp_path / folders[name].name
        shutil.copytree(folders[name], folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return folder

    return copied


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0)]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs) -> torch.Tensor:
    return quiet(pipe)(PROMPT, generator=seeded(), output_type="pt", num_inference_steps=STEPS, **kwargs).images


def draw_as_diffusers(first: IFPipeline, second: IFSuperResolutionPipeline, monkeypatch) -> torch.Tensor:
    """Both calls of diffusers' pipelines, with the noise that our cascade draws, in [0, 1]."""
    generators = per_image_generators(seeded(), 1)
    settings = {"num_inference_steps": STEPS, "generator": generators, "output_type": "pt"}
    text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), first.encode_prompt(PROMPT)))
    small = quiet(first)(**text, **settings, height=16, width=16).images
    drawn = []

    def ordered(shape, **kwargs):
        """As `randn_tensor`; the noise of the low-resolution image, asked for last, is drawn before the sample's."""
        if not drawn:
            drawn.extend([randn_tensor(shape, **kwargs), randn_tensor(shape, **kwargs)])
        return drawn.pop()

    monkeypatch.setattr(pipeline_if_superresolution, "randn_tensor", ordered)
    images = quiet(second)(**text, **settings, image=small, height=32, width=32).images
    assert not drawn
    return (images / 2 + 0.5).clamp(0, 1)


def test_a_cascade_draws_what_diffusers_two_calls_draw(folders, monkeypatch):
    first, second = (DiffusionPipeline.from_pretrained(folders[name]) for name in ("I", "II"))
    expected = draw_as_diffusers(first, second, monkeypatch)
    pipe = ImagenCascadePipeline.from_stages(folders["I"], folders["II"], watermarker=None)
    images = draw(pipe)
    print("max abs", (images - expected).abs().max())
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
