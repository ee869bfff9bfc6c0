"""The model of a command: stages that are composed, their text encoder and samplers, and where they compute."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen import (
    EDMAdamsScheduler,
    EDMHeunScheduler,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
)
from diffusers_imagen.commands import model_arguments
from diffusers_imagen.pipelines.loading import folders, stage_loading
from diffusers_imagen.utils import shipped


@pytest.fixture
def stages(cascade, folder) -> dict[str, str]:
    """Single stages in folders: the base stage with a text encoder, the upscaler without, and the encoder alone."""
    text = {"tokenizer": cascade.tokenizer, "text_encoder": cascade.text_encoder}
    base = ImagenPipeline(cascade.base_unet, cascade.base_scheduler, **text)
    upscaler = ImagenSuperResolutionPipeline(cascade.sr256_unet, cascade.sr256_scheduler, scale_factor=2)
    base.save_pretrained("base")
    upscaler.save_pretrained("sr")
    for name, part in text.items():
        part.save_pretrained(f"text/{name}")
    cascade.save_pretrained("cascade")
    return {name: str(folder / name) for name in ("base", "sr", "text", "cascade")}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def expected(pipe, *prompt, seed=0, **arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(*prompt, generator=torch.Generator().manual_seed(seed), **arguments).images
    return np.asarray(images[0]).astype(int)


def test_stages_in_folders_make_one_cascade(run, stages, cascade):
    arguments = ("generate", "a red apple", "--model", stages["base"], "--steps", 2, "--output", "x.png")
    assert run(*arguments, "--sr256", stages["sr"])[0] == 0
    np.testing.assert_array_equal(pixels("x.png"), expected(cascade, "a red apple", num_inference_steps=2))
    assert run(*arguments)[0] == 0  # the base stage alone
    base = expected(cascade, "a red apple", num_inference_steps=2, output_resolution=16)
    np.testing.assert_array_equal(pixels("x.png"), base)


def test_a_text_encoder_takes_the_place_of_the_models(run, stages, cascade, text_encoder):
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            parameter.mul_(1.5)
    text_encoder.save_pretrained("text/text_encoder")
    drawn = expected(cascade, "a red apple", num_inference_steps=2)
    common = ("generate", "a red apple", "--steps", 2, "--output", "x.png", "--text-encoder", stages["text"])
    for model in (["--model", stages["base"], "--sr256", stages["sr"]], ["--model", stages["cascade"]]):
        assert run(*common, *model)[0] == 0
        np.testing.assert_array_equal(pixels("x.png"), drawn)
    assert run(*common[:-2], *model)[0] == 0
    assert np.abs(pixels("x.png") - drawn).max() > 1


def test_an_upscaler_alone_enlarges_a_picture(run, stages, cascade):
    pipe = ImagenSuperResolutionPipeline(
        cascade.sr256_unet, cascade.sr256_scheduler, cascade.tokenizer, cascade.text_encoder, scale_factor=2
    )
    common = ("upscale", "picture.png", "--prompt", "a red apple", "--steps", 1, "--output", "x.png")
    common += ("--sr256", stages["sr"], "--text-encoder", stages["text"])
    settings = {"image": Image.open("picture.png"), "num_inference_steps": 1}
    for own, size in (([], (32, 32)), (["--width", 64, "--noise-level", 0.3, "--tile-size", 32], (32, 64))):
        assert run(*common, *own)[0] == 0
        if own:
            settings["low_res_noise_level"] = 0.3
            pipe.enable_tiling(32, 8)
        drawn = expected(pipe, "a red apple", height=size[0], width=size[1], **settings)
        np.testing.assert_array_equal(pixels("x.png"), drawn)
    code, _, error = run(*common, "--resolution", 64)
    assert (
        code == 2
        and "`output_resolution` is 64, but should be 32, that of the only stage (--resolution)." in error[-1]
    )


SCHEDULERS = {"adams": (EDMAdamsScheduler, [31, 8]), "heun": (EDMHeunScheduler, [18, 8])}


@pytest.mark.parametrize("name, of_it", SCHEDULERS.items(), ids=SCHEDULERS)
def test_another_scheduler_has_the_configuration_and_fewer_steps(cascade, name, of_it):
    cascade.register_to_config(call_defaults={"base": {"num_inference_steps": 100, "guidance_scale": 7.0}})
    cascade.base_scheduler.register_to_config(sigma_max=60.0)
    model_arguments.use_scheduler(cascade, name)
    assert [type(stage.scheduler) for stage in cascade.stages] == [of_it[0]] * 2
    assert cascade.base_scheduler.config.sigma_max == 60.0
    assert [stage.defaults.num_inference_steps for stage in cascade.stages] == of_it[1]
    assert cascade.stages[0].defaults.guidance_scale == 7.0


def test_the_scheduler_of_a_command(run, stages, cascade):
    for stage in ("base", "sr256"):
        name = f"{stage}_scheduler"
        setattr(cascade, name, EDMAdamsScheduler.from_config(getattr(cascade, name).config))
    options = ("--model", stages["base"], "--sr256", stages["sr"], "--scheduler", "adams")
    assert run("generate", "a red apple", *options, "--output", "x.png")[0] == 0
    np.testing.assert_array_equal(pixels("x.png"), expected(cascade, "a red apple"))


def test_where_it_computes():
    class Pipe:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, *args, *kwargs.values()))

    calls: list = []
    for offload in (None, "model", "sequential"):
        args = argparse.Namespace(scheduler="model", device="cuda:1", offload=offload)
        model_arguments.place(Pipe(), args)
    names = ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"]
    assert calls == [(name, "cuda:1") for name in names]


BAD = {
    "an upscaler without a base": (
        ["generate", "a", "--sr256", "{sr}"],
        "`sr256` is '{sr}', but needs the base stage",
    ),
    "two upscalers alone": (
        ["upscale", "picture.png", "--sr256", "{sr}", "--sr1024", "{sr}"],
        "or only one such stage",
    ),
    "an upscaler as the base": (
        ["generate", "a", "--model", "{sr}"],
        "`model` is '{sr}', a super-resolution stage, but should be a base stage",
    ),
    "a base as upscaler": (
        ["generate", "a", "--model", "{base}", "--sr256", "{base}"],
        "`sr256` is '{base}', a base stage, but should be a super-resolution stage",
    ),
    "a base to upscale with": (
        ["upscale", "picture.png", "--sr256", "{base}"],
        "`sr256` is '{base}', a base stage",
    ),
    "a cascade as upscaler": (
        ["generate", "a", "--model", "{base}", "--sr256", "{cascade}"],
        "`sr256` is '{cascade}', which cannot be loaded: its model_index.json is of 'ImagenCascadePipeline'",
    ),
    "a stage beside a cascade": (
        ["generate", "a", "--model", "{cascade}", "--sr256", "{sr}"],
        "`sr256` is '{sr}', but `model` '{cascade}' is a whole cascade: pass its base stage",
    ),
    "no stage": (["generate", "a", "--model", "{text}"], "a folder with neither a model_index.json nor a network"),
    "no name": (
        ["upscale", "picture.png", "--sr256", "nowhere"],
        "`sr256` is 'nowhere', which is neither a folder nor",
    ),
    "a CPU to make room on": (
        ["generate", "a", "--device", "cpu", "--offload", "model"],
        "`offload` is 'model', but `device` is 'cpu'",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_what_does_not_go_together_is_refused_before_anything_loads(run, stages, monkeypatch, arguments, message):
    monkeypatch.setattr(folders, "load_pipeline_folder", None)
    monkeypatch.setattr(stage_loading, "load_described", None)
    message, *arguments = (text.format(**stages) for text in (message, *arguments))
    code, out, error = run(*arguments, "--output", "x.png")
    assert code == 2 and out == "" and len(error) == 1 and message in error[0], error


def test_a_folder_without_an_index_is_a_stage(run, stages, folder, cascade):
    """As training left it in early versions."""
    text = ("--text-encoder", stages["text"], "--steps", 2, "--output", "x.png")
    for name in ("base", "sr"):
        (folder / name / "model_index.json").unlink()
    assert run("generate", "a red apple", "--model", stages["base"], "--sr256", stages["sr"], *text)[0] == 0
    np.testing.assert_array_equal(pixels("x.png"), expected(cascade, "a red apple", num_inference_steps=2))
    (folder / "base" / "model_index.json").write_text(json.dumps([]))
    code, _, error = run("generate", "a red apple", "--model", stages["base"], *text)
    assert code == 2 and "holds a JSON list" in error[-1]


DRAWING = {
    "generate": ["a red apple"],
    "upscale": ["picture.png"],
    "inpaint": ["picture.png", "mask.png", "a red apple"],
    "demo": ["--port", 0],
    "evaluate": ["--captions", "prompts.txt", "--metrics", "nearest", "--reference", ".", "--output-dir", "out"],
}


@pytest.mark.parametrize("command", DRAWING)
def test_without_a_model_and_without_the_shipped_one_a_line_says_what_to_install(run, folder, monkeypatch, command):
    monkeypatch.setattr(shipped, "IN_A_CLONE", folder)
    monkeypatch.setattr(shipped, "entry_points", lambda **chosen: ())
    before = sorted(folder.iterdir())
    code, _, error = run(command, *DRAWING[command])
    assert code == 2 and len(error) == 1 and sorted(folder.iterdir()) == before
    assert "pip install 'diffusers-imagen[emoji-weights]'" in error[0] and "(--model)" in error[0]


def test_the_shipped_model_goes_by_its_name(run, stages, cascade, monkeypatch, folder):
    monkeypatch.setattr(shipped, "IN_A_CLONE", folder / "cascade")
    drawn = expected(cascade, "a red apple", num_inference_steps=2)
    for model in ([], ["--model", "imagen-emoji"], ["--model", stages["cascade"], "--text-encoder", "imagen-emoji"]):
        assert run("generate", "a red apple", "--steps", 2, "--output", "x.png", *model)[0] == 0
        np.testing.assert_array_equal(pixels("x.png"), drawn)
