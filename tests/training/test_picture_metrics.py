"""Metrics of held-out pictures while a stage is trained: against its exported pipeline, and whoever draws and however often."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import save_clip, save_encoder
from tiny_runs import (
    TINY,
    encode,
    interrupt_at,
    losses,
    make_sr_unet,
    make_unet,
    run_in_processes,
    settings,
)

from diffusers_imagen import EDMHeunScheduler, ImagenPipeline, ImagenSuperResolutionPipeline, ImagenUNetModel
from diffusers_imagen.evaluation import Features, frechet_distance, kernel_distance, load_clip, load_features
from diffusers_imagen.evaluation.drawing import seed_of
from diffusers_imagen.evaluation.feature_networks import TransformersFeatures
from diffusers_imagen.evaluation.picture_sets import fitted
from diffusers_imagen.training import LoraTrainer, LoraTrainingConfig, TrainingConfig, train
from diffusers_imagen.training.data.pyramid import reduce, to_float


HELD_OUT = [1, 3, 4, 6, 7]


@pytest.fixture
def rows(rows) -> list[dict]:
    for i, row in enumerate(rows):
        row["split"] = "validation" if i in HELD_OUT else "train"
    return rows


@pytest.fixture
def encoder(tmp_path) -> str:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def measured(make_config, encoder):
    """A run of four steps that measures after two and four."""

    def measured(**kwargs) -> TrainingConfig:
        defaults = {"validation_metrics": ["fid", "kid"], "validation_features": encoder, "validation_batch_size": 2}
        options = {**defaults, "validation_split": "validation", "validation_num_inference_steps": 2, **kwargs}
        return make_config(**{name: value for name, value in options.items() if value != "none"})

    return measured


def records(output_dir: Path | str) -> list[dict]:
    """The lines of validation.jsonl."""
    return [json.loads(line) for line in (Path(output_dir) / "validation.jsonl").read_text().splitlines()]


def figures(output_dir: Path | str) -> list[dict[str, float]]:
    return [{label: figure["value"] for label, figure in line["figures"].items()} for line in records(output_dir)]


def pictures(output_dir: Path | str, resolution: int = 16) -> dict[str, np.ndarray]:
    """Those of the last validation."""
    (folder,) = (Path(output_dir) / "validation").glob("step-*")
    return {path.name: np.array(Image.open(path)) for path in sorted((folder / str(resolution)).iterdir())}


def real_pictures(folder: str, resolution: int) -> list[Image.Image]:
    """The held-out pictures on white."""
    found = [Image.open(Path(folder) / "images" / f"{i}.png") for i in HELD_OUT]
    white = [Image.alpha_composite(Image.new("RGBA", one.size, "white"), one).convert("RGB") for one in found]
    return [fitted(one, resolution) for one in white]


def test_the_exported_stage_draws_the_same_pictures_and_gets_the_same_figures(
    measured, encoder, imagefolder, tmp_path
):
    clip = save_clip(tmp_path / "clip")
    metrics = ["fid", "kid", "nearest", "clip"]
    config = measured(validation_metrics=metrics, validation_clip_model=clip, validation_guidance_scale=3.0, seed=5)
    result = train(config, make_unet(), encode)
    lines = records(config.output_dir)
    assert [(line["step"], line["pictures"]) for line in lines] == [(2, 5), (4, 5)]
    assert lines[0]["setting"] == {"scheduler": "model", "steps": [2], "guidance": [3.0]}
    assert lines[0]["evaluations"] == 3  # Heun

    pipe = ImagenPipeline.from_pretrained(config.output_dir)
    captions = [f"text {i}" for i in HELD_OUT]
    text = encode(captions).for_pipeline(None)
    noise = [torch.Generator().manual_seed(seed_of(5, number)) for number in range(5)]
    drawn = pipe(**text, generator=noise, num_inference_steps=2, guidance_scale=3.0).images
    for own, there in zip(drawn, pictures(config.output_dir).values(), strict=True):
        assert np.abs(np.array(own, dtype=int) - there).max() <= 1  # drawn two at once

    network, last = load_features(encoder), figures(config.output_dir)[-1]
    there = [Image.fromarray(pixels) for pixels in pictures(config.output_dir).values()]
    features, real = (network(some, [])["features"] for some in (there, real_pictures(imagefolder, 16)))
    assert last["FD-encoder"] == pytest.approx(frechet_distance(features, real).value, rel=1e-4, abs=1e-6)
    assert last["KD-encoder"] == pytest.approx(kernel_distance(features, real).value, rel=1e-4, abs=1e-6)
    cosines = load_clip(clip)(there, captions)["features"]
    assert last["CLIP score"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert -1 <= last["nearest, median cosine"] <= 1

    assert result["validation/FD-encoder"] == last["FD-encoder"]
    training = json.loads((Path(config.output_dir) / "training.json").read_text())
    assert training["validation/KD-encoder"] == last["KD-encoder"]


def test_a_super_resolution_stage_enlarges_reduced_held_out_pictures(measured, imagefolder):
    sizes = {"resolution": 32, "low_resolution": 8, "crop_size": 16, "max_train_steps": 1}
    config = measured(validation_metrics=["super-resolution", "kid"], **sizes)
    train(config, make_sr_unet(), encode)
    (found,) = figures(config.output_dir)

    def to_noise(one: np.ndarray, other: np.ndarray) -> float:
        return 10 * np.log10(1 / np.mean((one / 255.0 - other / 255.0) ** 2))

    there, real = pictures(config.output_dir, 32).values(), real_pictures(imagefolder, 32)
    noise = [to_noise(one, np.array(other)) for one, other in zip(there, real, strict=True)]
    assert found["PSNR (dB)"] == pytest.approx(np.mean(noise), abs=1e-3)
    small = []
    for one in real:
        pixels = reduce(to_float(torch.from_numpy(np.array(one)).permute(2, 0, 1))[None], 4)[0]
        small.append(Image.fromarray(pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()))
    bicubic = [np.array(one.resize((32, 32), Image.Resampling.BICUBIC)) for one in small]
    noise = [to_noise(one, np.array(other)) for one, other in zip(bicubic, real)]
    assert found["bicubic, PSNR (dB)"] == pytest.approx(np.mean(noise), abs=1e-2)
    assert {"SSIM", "consistency (dB)", "bicubic, consistency (dB)", "KD-encoder"} < found.keys()

    pipe = ImagenSuperResolutionPipeline.from_pretrained(config.output_dir)
    text = encode([f"text {HELD_OUT[2]}"]).for_pipeline(None)
    noise = torch.Generator().manual_seed(seed_of(0, 2))
    own = pipe(**text, image=small[2], generator=noise, num_inference_steps=2).images[0]
    assert np.abs(np.array(own, dtype=int) - list(there)[2]).max() <= 1


def test_metrics_change_nothing_of_the_run_and_real_features_are_made_once(measured, tmp_path, monkeypatch):
    plain = measured(output_dir=tmp_path / "plain", **dict.fromkeys(BESIDE, "none"))
    train(plain, make_unet(), encode)
    seen = []
    call = TransformersFeatures.__call__
    monkeypatch.setattr(TransformersFeatures, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    config = measured(validation_metrics=["fid", "nearest"])
    train(config, make_unet(), encode)
    assert losses(config.output_dir) == losses(plain.output_dir)
    once = [1, 5, 3]  # the width is found out; held-out pictures, training pictures
    assert seen == [*once, 5, 5]
    seen.clear()
    config = measured(validation_metrics=["fid", "nearest"], max_train_steps=5, resume_from_checkpoint="latest")
    train(config, make_unet(), encode)
    assert seen == [1, 5]
    assert [line["step"] for line in records(config.output_dir)] == [2, 4, 5]


BESIDE = ("validation_metrics", "validation_features", "validation_batch_size", "validation_num_inference_steps")


def test_a_killed_run_goes_on_with_the_pictures_that_it_has(measured, tmp_path, monkeypatch):
    whole = measured(output_dir=tmp_path / "whole")
    train(whole, make_unet(), encode)
    drawn = []
    call = ImagenPipeline.__call__

    def counted(self, **kwargs):
        drawn.append(len(kwargs["prompt_embeds"]))
        if len(drawn) == 5:
            raise OSError("gone")
        return call(self, **kwargs)

    monkeypatch.setattr(ImagenPipeline, "__call__", counted)
    with pytest.raises(OSError, match="gone"):
        train(measured(), make_unet(), encode)  # in the second of three batches after step 4
    assert [line["step"] for line in records(tmp_path / "stage")] == [2]
    resumed = measured(resume_from_checkpoint="latest")
    train(resumed, make_unet(), encode)
    assert drawn == [2, 2, 1, 2, 2, 2, 1]
    assert figures(resumed.output_dir) == figures(whole.output_dir)
    for name, pixels in pictures(whole.output_dir).items():
        assert np.array_equal(pictures(resumed.output_dir)[name], pixels)


def test_pictures_of_other_weights_are_drawn_anew(measured, tmp_path, monkeypatch):
    """Of a run that was killed after it measured, and comes to other weights, as with another learning rate."""
    interrupt = measured(checkpointing_steps=4, validation_steps=1)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        interrupt_at(patch, 2)
        train(interrupt, make_unet(), encode)
    changed = measured(checkpointing_steps=4, validation_steps=2, learning_rate=1e-1, resume_from_checkpoint="latest")
    train(changed, make_unet(), encode)
    alone = measured(checkpointing_steps=4, validation_steps=2, learning_rate=1e-1, output_dir=tmp_path / "alone")
    train(alone, make_unet(), encode)
    assert figures(changed.output_dir) == figures(alone.output_dir)


def test_two_processes_get_the_figures_of_one(measured, imagefolder, encoder, tmp_path):
    metrics = {
        "validation_metrics": ["fid", "kid"],
        "validation_features": encoder,
        "validation_num_inference_steps": 2,
    }
    options = {"max_train_steps": 2, "validation_split": "validation", **metrics}
    one = measured(**options, train_batch_size=8, validation_batch_size=3)
    train(one, make_unet(), encode)
    shared = settings(imagefolder, tmp_path / "two", **options, validation_batch_size=1)
    run_in_processes(shared, 2)
    (alone,), (together,) = figures(one.output_dir), figures(tmp_path / "two")
    assert together == pytest.approx(alone, rel=1e-3)
    for name, pixels in pictures(one.output_dir).items():
        other = pictures(tmp_path / "two")[name]
        assert np.abs(pixels.astype(int) - other).max() <= 1


def test_a_network_without_text_and_a_stream_are_measured(measured, monkeypatch):
    unet = ImagenUNetModel(sample_size=16, attention_resolutions=(8,), encoder_hid_dim=None, **TINY)
    config = measured(
        max_train_steps=1, streaming=True, shuffle_buffer_size=3, validation_num_images=4, validation_num_reference=3
    )
    train(config, unet)
    (line,) = records(config.output_dir)
    assert line["setting"]["guidance"] == [1.0] and line["pictures"] == 4  # the first rows
    assert len({pixels.tobytes() for pixels in pictures(config.output_dir).values()}) == 4


def test_an_adapter_is_measured_as_it_is_loaded(measured, tmp_path):
    ImagenPipeline(make_unet(), EDMHeunScheduler()).save_pretrained(tmp_path / "base")
    alike = {
        "preset": None,
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "validation_metrics": ["nearest"],
    }
    config = measured(**alike, max_train_steps=2, learning_rate=0.1)
    adapted = LoraTrainingConfig(**vars(config), rank=2)
    unet = make_unet()
    LoraTrainer(adapted, unet, encode).train()
    (found,) = figures(config.output_dir)
    assert found.keys() == {"nearest, median cosine", "share above 0.98"}
    pipe = ImagenPipeline.from_pretrained(tmp_path / "base")
    options = {"num_inference_steps": 2, **encode([f"text {HELD_OUT[0]}"]).for_pipeline(None)}
    plain = np.array(pipe(**options, generator=torch.Generator().manual_seed(seed_of(0, 0))).images[0], dtype=int)
    pipe.load_lora_weights(config.output_dir)
    own = np.array(pipe(**options, generator=torch.Generator().manual_seed(seed_of(0, 0))).images[0], dtype=int)
    first = pictures(config.output_dir)["00000000.png"]
    assert np.abs(own - first).max() <= 1 < np.abs(plain - first).max()


def test_pictures_that_are_not_finite_do_not_end_the_run(measured, monkeypatch, caplog):
    def overflows(self, **kwargs):
        raise FloatingPointError("The stage `base` makes values that are not finite")

    monkeypatch.setattr(ImagenPipeline, "__call__", overflows)
    config = measured(max_train_steps=1)
    result = train(config, make_unet(), encode)
    assert "No `validation_metrics` of step-000001: The stage `base` makes values" in caplog.text
    assert "validation/FD-encoder" not in result and "validation_loss" in result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"validation_metrics": ["fid", "lpips"]},
            "`validation_metrics` is 'lpips', but should be one of 'fid', 'kid'",
        ),
        ({"validation_metrics": []}, "`validation_metrics` is .., but should be some of fid"),
        ({"validation_split": None}, "`validation_metrics` has 'fid', but there are no held-out images"),
        ({"validation_metrics": "none"}, "`validation_features` is .*, but is only used with `validation_metrics`"),
        ({"validation_metrics": ["clip"]}, "`validation_features` is .*, but `validation_metrics` has no 'fid'"),
        (
            {"validation_metrics": ["super-resolution"], "validation_features": "none"},
            "this is not a super-resolution stage",
        ),
        ({"validation_metrics": ["is"]}, "`validation_metrics` has 'is', which uses Inception's classes"),
        (
            {"validation_metrics": ["precision-recall"], "validation_num_images": 3},
            "`validation_num_images` is 3, .* 4",
        ),
        ({"validation_num_images": 1}, "`validation_num_images` is 1, but should be at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(measured, options, message):
    with pytest.raises(ValueError, match=message):
        measured(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_features": "resnet"}, "`validation_features` is 'resnet', but should be one of 'inception'"),
        ({"validation_features": "."}, "`validation_features` is '.', which cannot be loaded"),
        ({"validation_features": "efficientnet-lite0"}, "`validation_features` is 'efficientnet-lite0', which needs"),
        (
            {"validation_metrics": ["clip"], "validation_features": "none", "validation_clip_model": "no/clip"},
            "`validation_clip_model` is 'no/clip', which cannot be loaded",
        ),
        ({"validation_split": "holdout"}, "No row has split 'holdout'"),
        ({"validation_num_images": 6}, "`validation_num_images` is 6, but should be at most 5"),
        ({"validation_num_reference": 6}, "`validation_num_reference` is 6, but should be at most 5"),
        (
            {"max_train_samples": 1, "validation_split": "train"},
            "`validation_split` has 1 images, but should have at least 2 for `validation_m",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training_data_is_read(measured, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers_imagen.training.loop.make_train_batches", lambda *a: pytest.fail("it reads"))
    monkeypatch.setattr(Features, "make", lambda *a: pytest.fail("it makes features"))
    config = measured(**options)
    with pytest.raises(ValueError, match=message):
        train(config, make_unet(), encode)
    assert not (Path(config.output_dir) / "validation").exists()


def test_what_needs_text_is_refused_for_a_network_without(measured, tmp_path):
    unet = ImagenUNetModel(sample_size=16, attention_resolutions=(8,), encoder_hid_dim=None, **TINY)
    clip = {"validation_metrics": ["clip"], "validation_features": "none"}
    for options, message in (
        (clip, "`validation_metrics` has 'clip', which needs captions, but this network is not conditioned on text"),
        (
            {"validation_guidance_scale": 2.0},
            "`validation_guidance_scale` is 2.0, but this network is not conditioned on text",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(measured(**options), unet)
