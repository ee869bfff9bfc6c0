"""DeepFloyd IF's repositories on a Hub of the tests: what is downloaded, what is refused, and what is drawn."""

from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from deepfloyd_repository import stage_1, stage_2, write_repository
from hub_client import Client

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline


I, II = "DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0"


@pytest.fixture
def hub():
    with hub_server.Hub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def client(hub, tmp_path) -> Client:
    return Client(tmp_path)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """With files of all weights and of the variant fp16, as IF's have."""
    path = tmp_path_factory.mktemp("repositories")
    for name, pipe in (("I", stage_1()), ("II", stage_2())):
        for variant in (None, "fp16"):
            write_repository(pipe, path / f"{name}-{variant}", variant)
    return {name: path / name for name in ("I-None", "I-fp16", "II-None", "II-fp16")}


def files_below(*folders: Path) -> dict[str, bytes]:
    paths = ((path, folder) for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path, folder in paths}


@pytest.fixture
def filled(hub, repositories) -> hub_server.Hub:
    """A Hub with both repositories, gated; the newest commit of the first is another one, and broken."""
    first = files_below(repositories["I-None"], repositories["I-fp16"])
    hub.fill(I, first, dict.fromkeys(first, b"[]"))
    hub.fill(II, files_below(repositories["II-None"], repositories["II-fp16"]))
    hub.gated = {I, II}
    return hub


def loaded_files(hub: hub_server.Hub, repo: str) -> set[str]:
    """The files of weights that were asked for."""
    asked = (request.split("/resolve/") for request in hub.requests if f" {repo}/resolve/" in request)
    return {path.partition("/")[2] for _, path in asked if path.endswith(".safetensors")}


DRAW = f"""
import numpy, sys, torch
from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images

I, II = {I!r}, {II!r}
options = {{"cache_dir": "cache", "variant": "fp16"}}
first = ImagenPipeline.from_pretrained(I, revision="first", **options)
assert first.config.origin == {{"base_model": I, "license": "deepfloyd"}}, first.config.origin
pipe = ImagenCascadePipeline.from_stages(first, II, **options)
assert pipe.config.origin["sr256"] == {{"base_model": II, "license": "deepfloyd"}}
numpy.save(sys.argv[1] if len(sys.argv) > 1 else "images", draw(pipe))
again = ImagenCascadePipeline.from_stages(first, II, **options, local_files_only=True)
numpy.testing.assert_array_equal(draw(again), draw(pipe))
"""
OFFLINE = DRAW.replace('else "images"', 'else "offline"')


def test_a_cascade_of_repositories_downloads_what_it_needs(filled, client, repositories, tmp_path):
    """A variant, of a revision, with the login's token; and again without a Hub."""
    client.run(DRAW)
    client.run_offline(OFFLINE)
    pipe = ImagenCascadePipeline.from_stages(repositories["I-None"], repositories["II-None"])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images
    for name in ("images", "offline"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    weights = {path for path in files_below(repositories["I-fp16"]) if path.endswith(".safetensors")}
    assert loaded_files(filled, I) == weights
    assert loaded_files(filled, II) == {"unet/diffusion_pytorch_model.fp16.safetensors"}


REFUSE = f"""
import os
from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline
I, II = {I!r}, {II!r}

def refused(open_stages, *args, **kwargs):
    try:
        open_stages(*args, **kwargs)
    except ValueError as error:
        print(error)
    else:
        raise AssertionError

revision = {{"revision": "first"}}
parts = dict.fromkeys(("text_encoder", "safety_checker", "watermarker"))
pipe = ImagenPipeline.from_stage(I, **revision, **parts)
assert pipe.text_encoder is pipe.tokenizer is pipe.safety_checker is pipe.watermarker is None
refused(ImagenCascadePipeline.from_stages, II, cache_dir="other")
refused(ImagenCascadePipeline.from_stages, I, I, **revision, cache_dir="other")
for token in (False, "hf_another"):
    for open_stages in (ImagenCascadePipeline.from_stages, ImagenPipeline.from_stage, ImagenPipeline.from_pretrained):
        refused(open_stages, I, token=token, cache_dir="other")
"""


def test_what_cannot_be_used_is_refused_before_its_weights_are_downloaded(filled, client):
    lines = client.run(REFUSE).splitlines()
    assert lines[0].startswith(f"`base` is '{II}', a super-resolution stage, but should be a base stage")
    assert lines[1].startswith(f"`sr256` is '{I}', a base stage, but should be a super-resolution stage")
    assert len(lines) == 8
    for line in lines[2:]:
        assert f"accept its license on {filled.url}/{I}, and log in with `hf auth login` or pass `token`" in line
    assert {"(401)" in line for line in lines[2:5]} == {"(403)" in line for line in lines[5:]} == {True}
    assert loaded_files(filled, I) == {"unet/diffusion_pytorch_model.safetensors"}  # of the stage without other parts
    assert loaded_files(filled, II) == set()


LOAD_TWICE = """
from diffusers import DiffusionPipeline
from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline
DiffusionPipeline.from_pretrained("user/one")
ImagenPipeline.from_pretrained("user/two")
ImagenCascadePipeline.from_stages("user/three", text_encoder=None)
"""


def test_from_pretrained_of_our_repositories_asks_no_more_than_diffusers_does(
    hub, client, base_unet, cascade, tmp_path
):
    pipe = ImagenPipeline(base_unet, cascade.base_scheduler, cascade.tokenizer, cascade.text_encoder)
    pipe.save_pretrained(tmp_path / "stage")
    for repo in ("user/one", "user/two", "user/three"):
        hub.fill(repo, files_below(tmp_path / "stage"))
    client.run(LOAD_TWICE)
    one, two = (sum(repo in request for request in hub.requests) for repo in ("user/one", "user/two"))
    assert 0 < two <= one
    assert loaded_files(hub, "user/two") == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert loaded_files(hub, "user/three") == {"unet/diffusion_pytorch_model.safetensors"}
