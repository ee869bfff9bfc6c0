"""The settings in PNG files: a picture can be drawn again from them, and they tell nothing of the machine."""

import json
import os
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen import ImagenCascadePipeline
from diffusers_imagen.commands.picture_settings import describe_call, png_info, source_name


def settings_of(path) -> dict:
    return json.loads(Image.open(path).text["diffusers-imagen"])


def test_a_picture_is_drawn_again_from_its_settings(model, folder, run):
    command = ("generate", "a red äpple \u2603", "--model", model, "--steps", 3, 1, "--guidance-scale", 2.5, 1)
    common = ("--negative-prompt", "a face", "--guidance-interval", 0.1, 5, "--seed", 7)
    assert run(*command, *common, "--num-images", 2)[0] == 0
    settings = settings_of("output-1.png")
    assert settings == {
        "version": version("diffusers-imagen"),
        "task": "generate",
        "model": {"model": "model"},
        "prompt": "a red äpple \u2603",
        "negative_prompt": "a face",
        "seed": 7,
        "image": 1,
        "num_inference_steps": {"base": 3, "sr256": 1},
        "guidance_scale": {"base": 2.5, "sr256": 1.0},
        "guidance_interval": [0.1, 5.0],
        "scheduler": {"base": "EDMHeunScheduler", "sr256": "EDMHeunScheduler"},
    }
    pipe = ImagenCascadePipeline.from_pretrained(model)
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_interval")
    again = pipe(
        **{name: settings[name] for name in names},
        num_images_per_prompt=settings["image"] + 1,
        generator=torch.Generator().manual_seed(settings["seed"]),
    )
    np.testing.assert_array_equal(np.asarray(again.images[-1]), np.asarray(Image.open("output-1.png")))


def test_an_interval_without_an_end_is_kept(model, folder, run):
    interval = ("--guidance-interval", 0.5, "inf")
    assert run("generate", "a face", "--model", model, "--steps", 3, 1, *interval)[0] == 0
    settings = settings_of("output.png")
    assert settings["guidance_interval"] == [0.5, sys.float_info.max]
    again = ImagenCascadePipeline.from_pretrained(model)(
        "a face",
        num_inference_steps=[3, 1],
        guidance_interval=tuple(settings["guidance_interval"]),
        generator=torch.Generator().manual_seed(0),
    )
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(Image.open("output.png")))


def test_pictures_of_a_file_of_prompts_have_their_own_seeds(model, folder, run):
    arguments = ("--prompts-file", "prompts.txt", "--model", model, "--steps", 2, "--resolution", 16)
    assert run("generate", *arguments, "--output-dir", "out")[0] == 0
    pipe = ImagenCascadePipeline.from_pretrained(model)
    prompts = []
    for path in sorted((folder / "out").glob("*.png")):
        settings = settings_of(path)
        prompts.append(settings["prompt"])
        assert (settings["image"], settings["output_resolution"]) == (0, 16)
        assert settings["num_inference_steps"] == {"base": 2}
        generator = torch.Generator().manual_seed(settings["seed"])
        again = pipe(settings["prompt"], num_inference_steps=2, output_resolution=16, generator=generator).images[0]
        np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(path)))
    assert prompts == ["a red apple", "a blue face"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("upscale", "picture.png", "--steps", 1, "--tile-size", 32), {"task": "upscale", "tile_size": 32}),
        (("inpaint", "picture.png", "mask.png", "a face", "--steps", 1), {"task": "inpaint", "num_resample_times": 4}),
        (
            ("generate", "a face", "--image", "picture.png", "--strength", 0.5, "--steps", 2),
            {"task": "image-to-image", "strength": 0.5},
        ),
        (("generate", "a face", "--steps", 1, "--num-images", 4, "--grid"), {"task": "generate", "images": 4}),
    ],
)
def test_every_command_writes_them_and_nothing_of_the_machine(model, folder, run, command, expected):
    assert run(*command, "--model", model, "--output", folder / "out.png")[0] == 0
    settings = settings_of("out.png")
    assert {name: settings[name] for name in expected} == expected
    assert list(Image.open("out.png").text) == ["diffusers-imagen"]
    data = (folder / "out.png").read_bytes()
    for private in (str(folder), os.path.expanduser("~"), "picture.png", "mask.png"):
        assert private.encode() not in data
    assert run(*command, "--model", model, "--output", folder / "out.jpg")[0] == 0
    assert b"diffusers-imagen" not in (folder / "out.jpg").read_bytes()


def test_a_folder_is_called_by_its_name(tmp_path, monkeypatch, cascade):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    names = [source_name(source) for source in ("mine", "./mine/", str(tmp_path / "mine"), "DeepFloyd/IF-I-M-v1.0")]
    assert names == ["mine", "mine", "mine", "DeepFloyd/IF-I-M-v1.0"]
    settings = describe_call("upscale", cascade, [32], {"model": str(tmp_path / "mine")}, {"image": object()})
    assert settings["model"] == {"model": "mine"} and settings["num_inference_steps"] == {"sr256": 8}
    assert "image" not in settings
    with pytest.raises(ValueError):
        png_info({"seed": float("nan")})  # no JSON
