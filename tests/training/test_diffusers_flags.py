"""Flags of diffusers' training scripts: epochs, revisions, filters of images, samples of a prompt, and those that are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_modules import script_module
from tiny_runs import encode, make_unet, metrics

from diffusers_imagen.training import DreamBoothTrainingConfig, Trainer, TrainingConfig, parse_args, train
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.data.pyramid import MARGIN, SUPPORT, crop_both, reduce, to_float
from diffusers_imagen.training.options import ELSEWHERE


ROOT = Path(__file__).parents[2]
FILTERS = list(SUPPORT)


def test_epochs_are_steps_that_see_all_images(make_config):
    """Six images, four a step: two steps an epoch."""
    config = make_config(
        max_train_steps=None,
        num_train_epochs=3,
        validation_epochs=2,
        validation_prompts=["text 1"],
        lr_warmup_steps=0,
    )
    train(config, make_unet(), encode)
    assert len(metrics(config.output_dir)) == 6 == config.max_train_steps
    samples = sorted(path.name for path in Path(config.output_dir, "samples").iterdir())
    assert samples == ["step-000004.png", "step-000006.png"]


@pytest.mark.parametrize(
    "config_class, flags, steps",
    [
        (TrainingConfig, "--preset emoji_base_64", 10_000),
        (DreamBoothTrainingConfig, "--pretrained_model_name_or_path a --instance_data_dir a --instance_prompt a", 400),
    ],
)
def test_steps_and_epochs_are_not_given_together(config_class, flags, steps):
    flags = f"{flags} --train_data_dir a".split()
    assert parse_args(flags, config_class=config_class).max_train_steps == steps
    config = parse_args([*flags, "--num_train_epochs", "3"], config_class=config_class)
    assert replace(config).num_train_epochs == 3
    config.set_epoch(7)
    assert replace(config).max_train_steps == 21
    with pytest.raises(ValueError, match=f"`num_train_epochs` is 3 and `max_train_steps` {steps}, but only one of"):
        parse_args([*flags, "--num_train_epochs", "3", "--max_train_steps", str(steps)], config_class=config_class)


def test_epochs_of_accumulated_batches(make_config):
    config = make_config(max_train_steps=None, num_train_epochs=5, train_batch_size=2, gradient_accumulation_steps=3)
    Trainer(config, make_unet(), encode).prepare()
    assert config.max_train_steps == 5 and config.num_train_epochs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 2}, "`num_train_epochs` is 2 and `max_train_steps` 4, but only one"),
        (  # the default, but given
            {"num_train_epochs": 2, "max_train_steps": 10_000},
            "`num_train_epochs` is 2 and `max_train_steps` 10000, but only one",
        ),
        ({"validation_epochs": 2, "validation_steps": 3}, "`validation_epochs` is 2 and `validation_steps` 3"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0, but should be at least 1"),
        ({"num_validation_images": 0}, "`num_validation_images` is 0, but should be at least 1"),
        ({"image_interpolation_mode": "sinc"}, "`image_interpolation_mode` is 'sinc'"),
        ({"revision": "main"}, "`revision` is 'main', but should not be given: nothing is loaded from the Hub"),
        ({"variant": "fp16"}, "`variant` is 'fp16', but no weights are loaded"),
        ({"license": "My License"}, "`license` is 'My License', but should be a name like"),
    ],
)
def test_settings_that_are_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_a_stream_has_no_epochs(make_config):
    config = make_config(max_train_steps=None, num_train_epochs=2, streaming=True)
    with pytest.raises(ValueError, match="the number of images in a stream is unknown: set `max_train_steps`"):
        Trainer(config, make_unet(), encode).prepare()


def test_several_samples_of_a_prompt_are_a_column(make_config):
    options = {"validation_prompts": ["text 1", "text 5"], "max_train_steps": 1, "use_ema": False}
    config = make_config(**options, num_validation_images=3)
    train(config, make_unet(), encode)
    grid = np.array(Image.open(Path(config.output_dir, "samples", "step-000001.png")))
    assert grid.shape == (48, 32, 3)
    tiles = [grid[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] for i in range(3) for j in range(2)]
    assert all((a != b).any() for i, a in enumerate(tiles) for b in tiles[:i])
    # the first of each prompt is beside the card
    for j in range(2):
        picture = np.array(Image.open(Path(config.output_dir, "card_images", f"{j}.png")))
        np.testing.assert_array_equal(picture, tiles[j])


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_reduction_is_that_of_pillow(interpolation):
    """Channel by channel in floating point, which Pillow rounds nowhere."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 24, 36), dtype=np.uint8))
    found = reduce(to_float(image), 4, interpolation)
    method = Image.Resampling[interpolation.upper()]
    expected = [np.array(Image.fromarray(channel.float().numpy()).resize((9, 6), method)) for channel in image[0]]
    expected = torch.from_numpy(np.stack(expected))[None] / 127.5 - 1
    torch.testing.assert_close(found, expected.clamp(-1, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_crop_is_reduced_as_in_the_whole_image(interpolation):
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 64, 64), dtype=np.uint8))
    whole = reduce(to_float(pixels)[None], 4, interpolation)[0]
    for top, left in ((0, 0), (5, 3), (8, 8)):
        _, low_res = crop_both(pixels, 4, top, left, 32, interpolation)
        inner = low_res[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        torch.testing.assert_close(inner, whole[:, top : top + 8, left : left + 8], rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_filter_reaches_images_and_their_reductions(make_config, in_memory):
    """Images of 32 px at 16, conditioned on 8."""
    found = {}
    for name in ("bicubic", "nearest", "lanczos"):
        config = make_config(
            resolution=16,
            low_resolution=8,
            image_interpolation_mode=name,
            in_memory=in_memory,
            seed=1,
            train_batch_size=6,
        )
        batches = make_train_batches(config, encode)
        batch = next(batches)
        batches.close()
        found[name] = batch
        expected = reduce(batch.images, 2, name)
        torch.testing.assert_close(batch.low_res, expected, rtol=0, atol=1e-6)
    for a, b in (("bicubic", "nearest"), ("bicubic", "lanczos")):
        assert not torch.equal(found[a].images, found[b].images)


@pytest.mark.parametrize("name", list(ELSEWHERE))
@pytest.mark.parametrize("config_class", [TrainingConfig, DreamBoothTrainingConfig])
def test_flags_of_diffusers_that_are_not_here_say_why(name, config_class):
    for flag in (f"--{name}", f"--{name}=1", f"--{name.replace('_', '-')}"):
        with pytest.raises(
            ValueError, match=f"^`{name}` is an option of diffusers' scripts, but not supported here: .*"
        ) as found:
            parse_args(["--preset", "emoji_base_64", flag], config_class=config_class)
        assert "\n" not in str(found.value)


def test_a_file_of_settings_is_told_the_same(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: emoji_base_64\nnoise_offset: 0.1\n")
    with pytest.raises(ValueError, match="`noise_offset` in '.*run.yaml' is an option of diffusers' scripts"):
        parse_args(["--config", str(path)])


def test_what_the_page_says_of_diffusers_flags_is_all_of_them():
    with script_module("write_training_flags") as writer:
        listed = writer.DIFFUSERS
    names = DreamBoothTrainingConfig.__dataclass_fields__
    assert [name for name in listed if name not in names] == []
    assert [name for name in ELSEWHERE if name in names] == []
