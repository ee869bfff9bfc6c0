import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from text_sources import FunctionSource

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import Batch, make_train_batches
from diffusers_imagen.training.data.batches import MemoryBatches
from diffusers_imagen.training.data.pyramid import MARGIN
from diffusers_imagen.training.data.sources import draw_weights, open_rows


SIDE = 32
TRAIN = [0, 1, 2, 3, 4, 6]  # rows of the split, of which only the last is shaded


def make_config(folder: str, **kwargs) -> TrainingConfig:
    return TrainingConfig(train_data_dir=folder, preset="emoji_base_64", **{"resolution": SIDE, **kwargs})


def open_images(config: TrainingConfig, split: str = "train", encode=None) -> MemoryBatches:
    return make_train_batches(replace(config, train_split=split), encode)


def draw(config: TrainingConfig, count: int, encode=None) -> Batch:
    return next(make_train_batches(replace(config, train_batch_size=count), encode))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """`(B, 3, H, W)` in [-1, 1] to `(B, H, W, 3)`."""
    return (images.permute(0, 2, 3, 1) * 127.5 + 127.5).round().byte().numpy()


def over_white(path: Path) -> np.ndarray:
    image = np.asarray(Image.open(path)).astype(np.float64)
    alpha = image[..., 3:] / 255
    return image[..., :3] * alpha + 255 * (1 - alpha)


def test_images_are_composited_on_white(imagefolder):
    dataset = open_images(make_config(imagefolder)).images
    assert dataset.pixels.shape == (len(TRAIN), 3, SIDE, SIDE) and dataset.pixels.dtype == torch.uint8
    for pixels, row in zip(dataset.pixels, TRAIN):
        expected = over_white(Path(imagefolder) / "images" / f"{row}.png")
        actual = pixels.permute(1, 2, 0).numpy()
        assert np.array_equal(actual[1:], expected[1:])  # opaque or transparent: exact
        assert np.abs(actual[0] - expected[0]).max() <= 1  # half transparent: rounded
        assert (actual[1, 1] == 255).all()


def test_images_are_resized_with_antialiasing(imagefolder):
    dataset = open_images(make_config(imagefolder, resolution=8)).images
    for pixels, row in zip(dataset.pixels, TRAIN):
        image = torch.from_numpy(over_white(Path(imagefolder) / "images" / f"{row}.png")).permute(2, 0, 1)[None]
        expected = F.interpolate(image, (8, 8), mode="bicubic", antialias=True)[0].clamp(0, 255)
        assert (pixels - expected).abs().max() < 5  # PIL also clips between rows and columns


def test_batches_are_images_between_minus_one_and_one(imagefolder):
    batch = draw(make_config(imagefolder), 60)
    assert batch.images.shape == (60, 3, SIDE, SIDE) and batch.images.dtype == torch.float32
    assert batch.images.min() == -1 and batch.images.max() == 1
    assert batch.low_res is None and batch.text is None and batch.text_mask is None
    known = open_images(make_config(imagefolder)).images.pixels.permute(0, 2, 3, 1).numpy()
    drawn = [np.flatnonzero((known == image).all(axis=(1, 2, 3))).item() for image in to_uint8(batch.images)]
    for epoch in np.split(np.array(drawn), 10):  # every image once an epoch
        assert sorted(epoch) == list(range(len(TRAIN)))
    assert len({tuple(epoch) for epoch in np.split(np.array(drawn), 10)}) > 5  # in other orders


def test_the_seed_decides_the_batch(imagefolder, encode):
    config = make_config(imagefolder, low_resolution=8, crop_size=16, caption_column=["text", "tags"])
    first, same, other = (draw(replace(config, seed=seed), 8, encode) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    "split, styles, expected",
    [
        ("train", None, [0, 1, 2, 3, 4, 6]),
        ("validation", None, [5]),
        ("test", None, [7]),
        ("train", ["shaded"], [6]),
        ("train", ["flat", "shaded"], [0, 1, 2, 3, 4, 6]),
    ],
)
def test_rows_of_a_split_and_a_style(imagefolder, split, styles, expected):
    rows = open_rows(make_config(imagefolder, styles=styles), split)
    assert rows.data["file_name"][:] == [f"images/{i}.png" for i in expected]
    assert len(open_images(make_config(imagefolder, styles=styles), split).images) == len(expected)


def weights_of_rows(folder, **kwargs) -> list[float] | None:
    config = make_config(folder, **kwargs)
    weights = draw_weights(open_rows(config, "train").data, config)
    return None if weights is None else weights.tolist()


def share_of_shaded(folder, **kwargs) -> float:
    """How many of 2000 drawn images are the one of the style `shaded`."""
    config = make_config(folder, **kwargs)
    shaded = open_images(config).images.pixels[-1].float() / 127.5 - 1
    return (draw(config, 2000).images == shaded).flatten(1).all(dim=1).float().mean().item()


def test_combinations_of_values_are_drawn_equally_often(imagefolder):
    assert weights_of_rows(imagefolder, balance_by=["style"]) == pytest.approx([1 / 5] * 5 + [1])
    # rows 0 and 1, 2 and 3 share a concept; 4 and 6 have one each
    assert weights_of_rows(imagefolder, balance_by=["concept"]) == pytest.approx([1 / 2] * 4 + [1, 1])
    assert weights_of_rows(imagefolder, balance_by=["style", "concept"]) == pytest.approx([1 / 2] * 4 + [1, 1])
    assert weights_of_rows(imagefolder) is None
    assert share_of_shaded(imagefolder, balance_by=["style"]) == pytest.approx(1 / 2, abs=0.05)
    assert share_of_shaded(imagefolder) == pytest.approx(1 / 6, abs=1e-3)


def write_weights(folder, rows, weights) -> None:
    lines = (json.dumps({**row, "weight": weight}) + "\n" for row, weight in zip(rows, weights, strict=True))
    (Path(folder) / "metadata.jsonl").write_text("".join(lines))


def test_rows_are_drawn_in_proportion_to_their_weights(imagefolder, rows):
    write_weights(imagefolder, rows, [1, 1, 1, 1, 1, 1, 5, 1])  # rows 5 and 7 are in other splits
    assert weights_of_rows(imagefolder, weight_column="weight") == [1, 1, 1, 1, 1, 5]
    both = weights_of_rows(imagefolder, weight_column="weight", balance_by=["style"])
    assert both == pytest.approx([1 / 5] * 5 + [5])
    assert share_of_shaded(imagefolder, weight_column="weight") == pytest.approx(1 / 2, abs=0.05)


@pytest.mark.parametrize("bad", [0.0, -1.0, None, "often"])
def test_a_weight_that_is_no_number_above_0_is_named(imagefolder, rows, bad):
    write_weights(imagefolder, rows, ["1"] * 8 if bad == "often" else [1.0, 1.0, bad] + [1.0] * 5)
    row, shown = (0, "'1'") if bad == "often" else (2, repr(bad))
    with pytest.raises(ValueError, match=f"`weight_column` is 'weight', where row {row} has {shown}"):
        weights_of_rows(imagefolder, weight_column="weight")


def test_captions_are_those_of_their_images(imagefolder, encode, decode):
    dataset = open_images(make_config(imagefolder)).images
    batch = draw(make_config(imagefolder), 50, encode)
    assert batch.text.shape == (50, 16, 1) and batch.text.dtype == torch.float32
    assert batch.text_mask.dtype == torch.bool
    for image, caption in zip(batch.images, decode(batch.text, batch.text_mask)):
        row = TRAIN.index(int(caption.removeprefix("text ")))
        assert torch.equal(image, dataset.pixels[row].float() / 127.5 - 1)


@pytest.mark.parametrize(
    "probabilities, expected",
    [([1.0, 0.0], 1.0), ([0.0, 1.0], 0.0), ([0.25, 0.75], 0.25), ([3.0, 1.0], 0.75), (None, 0.5)],
)
def test_captions_are_drawn_by_their_probabilities(imagefolder, encode, decode, probabilities, expected):
    config = make_config(imagefolder, caption_column=["text", "tags"], caption_probabilities=probabilities)
    batch = draw(config, 1000, encode)
    captions = decode(batch.text, batch.text_mask)
    # a column of lists is joined
    assert set(captions) <= {f"text {i}" for i in TRAIN} | {f"tag {i}, b" for i in TRAIN}
    share = np.mean([caption.startswith("text") for caption in captions])
    assert share == pytest.approx(expected, abs=0.05 if 0 < expected < 1 else 0)
    tagged = [caption for caption in captions if caption.startswith("tag")]
    if expected < 1:
        assert set(tagged) == {f"tag {i}, b" for i in TRAIN}


def test_captions_are_encoded_once_and_in_parts(imagefolder, encode):
    lines = (Path(imagefolder) / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    many = [{**rows[0], "text": f"text {i % 300}"} for i in range(600)]
    (Path(imagefolder) / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    parts = []

    def counting(captions):
        parts.append(captions)
        return encode(captions)

    texts = open_images(make_config(imagefolder), encode=FunctionSource(counting, 1)).text
    assert parts.pop(0) == ["text 0"]  # for the size of its embeddings
    assert sorted(caption for part in parts for caption in part) == sorted({f"text {i}" for i in range(300)})
    assert max(map(len, parts)) < 300
    text, mask = texts.encode(["text 299", "text 0"])
    expected, expected_mask = encode(["text 299", "text 0"])
    assert torch.equal(text, expected) and torch.equal(mask, expected_mask)


def write_ramp(folder: str) -> np.ndarray:
    """All images become one whose red and green are their column and row, with a texture in blue."""
    y, x = np.mgrid[:SIDE, :SIDE]
    texture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE))
    ramp = np.stack([8 * x, 8 * y, texture], axis=-1).astype(np.uint8)
    for path in (Path(folder) / "images").iterdir():
        Image.fromarray(ramp).save(path)
    return ramp


@pytest.mark.parametrize("low_resolution, crop", [(8, 16), (16, 8), (8, 4), (16, 32)])
def test_crops_of_image_and_reduction_are_of_the_same_place(imagefolder, low_resolution, crop):
    ramp = write_ramp(imagefolder)
    config = make_config(imagefolder, low_resolution=low_resolution, crop_size=crop)
    batch = draw(config, 400)
    factor = SIDE // low_resolution
    small = crop // factor
    wide = small + 2 * MARGIN
    assert batch.images.shape == (400, 3, crop, crop) and batch.low_res.shape == (400, 3, wide, wide)

    # PIL's own reduction of the whole image; it rounds to whole values
    reduction = np.asarray(Image.fromarray(ramp).resize((low_resolution, low_resolution), Image.Resampling.BICUBIC))
    corners = set()
    for image, low_res in zip(to_uint8(batch.images), batch.low_res):
        left, top = image[0, 0, :2] // 8
        assert np.array_equal(image, ramp[top : top + crop, left : left + crop])
        assert left % factor == 0 and top % factor == 0
        i, j = top // factor, left // factor
        expected = reduction[i : i + small, j : j + small].astype(np.float32)
        actual = low_res[:, MARGIN:-MARGIN, MARGIN:-MARGIN].permute(1, 2, 0).numpy() * 127.5 + 127.5
        assert np.abs(actual - expected).max() < 1.5
        corners.add((int(i), int(j)))
    places = low_resolution - small + 1
    if places**2 <= 100:
        assert corners == {(i, j) for i in range(places) for j in range(places)}
    assert {i for i, _ in corners} == {j for _, j in corners} == set(range(places))


def test_without_crops_the_reduction_is_of_the_whole_image(imagefolder):
    ramp = write_ramp(imagefolder)
    batch = draw(make_config(imagefolder, low_resolution=8), 3)
    assert np.array_equal(to_uint8(batch.images)[2], ramp)
    expected = np.asarray(Image.fromarray(ramp).resize((8, 8), Image.Resampling.BICUBIC)).astype(np.float32)
    actual = batch.low_res[2].permute(1, 2, 0).numpy() * 127.5 + 127.5
    assert batch.low_res.shape == (3, 3, 8, 8) and np.abs(actual - expected).max() < 1.5
    assert batch.low_res.abs().max() <= 1


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"`train_data_dir` is '{tmp_path}', which cannot be opened: .*"):
        open_rows(make_config(str(tmp_path)), "train")


@pytest.mark.parametrize(
    "columns", [{"caption_column": ["text", "prompt"]}, {"balance_by": ["prompt"]}, {"weight_column": "prompt"}]
)
def test_a_missing_column_is_named(imagefolder, columns):
    with pytest.raises(ValueError, match=r"lacks the columns \['prompt'\]; it has .*'concept'"):
        open_rows(make_config(imagefolder, **columns), "train")


def test_a_missing_style_column_is_named(imagefolder, rows):
    for row in rows:
        del row["style"]
    (Path(imagefolder) / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="'style'"):
        open_rows(make_config(imagefolder, styles=["flat"]), "train")


def test_no_rows_are_refused(imagefolder):
    with pytest.raises(ValueError, match="No row has split 'trian'"):
        open_rows(make_config(imagefolder), "trian")
    with pytest.raises(ValueError, match=r"No row has split 'train' and a style among \['sketch'\]"):
        open_rows(make_config(imagefolder, styles=["sketch"]), "train")


BAD_SETTINGS = {
    "resolution": ({"resolution": 0}, "`resolution` is 0"),
    "two data sets": (
        {"dataset_name": "a", "train_data_dir": "b"},
        "`train_data_dir` and `dataset_name` are both given",
    ),
    "no caption column": ({"caption_column": []}, "`caption_column` is empty"),
    "background": ({"background": "wihte"}, "`background` is 'wihte', but should be a color"),
    "buckets": ({"aspect_ratio_buckets": "64x32"}, "`aspect_ratio_buckets` is '64x32', but should be 'auto'"),
    "bucket off the grid": (
        {"aspect_ratio_buckets": "36,32", "low_resolution": 4},
        "`aspect_ratio_buckets` has 36x32, but height and width should be multiples of 8",
    ),
    "bucket below the crop": (
        {"aspect_ratio_buckets": "64,16", "low_resolution": 8, "crop_size": 32},
        "`aspect_ratio_buckets` has 64x16, but height and width should be multiples of 4, at least 32",
    ),
    "blur of nothing": ({"degradation_blur_sigma": [0, 1]}, "`degradation_blur_sigma` is .* only super-resolution"),
    "quality": (
        {"degradation_jpeg_quality": [0, 90], "low_resolution": 8},
        r"`degradation_jpeg_quality` is \[0, 90\], but should be .* from 1 to 100",
    ),
    "balanced stream": (
        {"streaming": True, "balance_by": ["a"]},
        "`balance_by` is .*, but is not supported with `streaming`",
    ),
    "weighted stream": (
        {"streaming": True, "weight_column": "a"},
        "`weight_column` is 'a', but is not supported with `streaming`",
    ),
    "buckets in memory": ({"in_memory": True, "aspect_ratio_buckets": "auto"}, "only squares are kept in memory"),
    "random places in memory": ({"in_memory": True, "center_crop": False}, "only center crops are kept in memory"),
    "no chance": ({"caption_probabilities": [0.0]}, r"`caption_probabilities` is \[0.0\], but should be positive"),
    "batch": ({"train_batch_size": -1}, "`train_batch_size` is -1"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0"),
    "steps": ({"max_train_steps": 0}, "`max_train_steps` is 0"),
    "checkpoints": ({"checkpointing_steps": 0}, "`checkpointing_steps` is 0"),
    "no checkpoints": ({"checkpoints_total_limit": 0}, "`checkpoints_total_limit` is 0"),
    "too little augmentation": (
        {"noise_conditioning_augmentation": 0.001},
        "`noise_conditioning_augmentation` is 0.001",
    ),
    "nothing to grow": ({"grow": True}, "`grow` is True"),
    "nothing to change": ({"layers_per_block": [1, 2]}, r"`layers_per_block` is \[1, 2\], but there is no"),
    "two networks": ({"pretrained_model_name_or_path": "a"}, "Exactly one of"),
    "no network": ({"preset": None}, "Exactly one of"),
    "drop rate": ({"text_drop_rate": 1.5}, "`text_drop_rate` is 1.5"),
    "crops of nothing": ({"crop_size": 8}, "`crop_size` is 8, but only"),
    "low resolution": ({"low_resolution": 12}, "`low_resolution` is 12, but should divide 32"),
    "no low resolution": ({"low_resolution": 0}, "`low_resolution` is 0"),
    "crop off the grid": ({"low_resolution": 8, "crop_size": 6}, "`crop_size` is 6, .* multiple of 4 up to 32"),
    "crop too large": ({"low_resolution": 8, "crop_size": 36}, "`crop_size` is 36, .* up to 32"),
    "no crop": ({"low_resolution": 8, "crop_size": 0}, "`crop_size` is 0, .* up to 32"),
    "probabilities": ({"caption_probabilities": [0.5, 0.5]}, "has 2 entries, but `caption_column` has 1"),
}


@pytest.mark.parametrize("settings, message", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"preset": "emoji_base_64", "resolution": SIDE, **settings})
