"""Images in the cells of a data set, in files of every quality."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from diffusers_imagen.diffusion.augmentation import upsample_low_res
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.data.captions import speaks_of_sides
from diffusers_imagen.training.data.data_config import make_buckets
from diffusers_imagen.training.data.pixels import BadImage, fit_image, read_fitting, read_image
from diffusers_imagen.training.data.pyramid import MARGIN, crop, crop_both, crop_wider, degrade, reduce, to_float
from diffusers_imagen.training.data.samples import SampleMaker
from diffusers_imagen.training.data.slot_draws import DRAWS_PER_SLOT, JPEG, SlotDraws
from diffusers_imagen.training.objective.losses import Conditioning


def test_images_are_cropped_before_they_are_resized():
    x = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (16, 64, 3))
    image = Image.fromarray(np.ascontiguousarray(x))
    for left, start in ((0.0, 0), (0.5, 24), (1.0, 48)):
        assert np.array_equal(fit_image(image, 16, 16, left=left), x[:, start : start + 16])
    assert fit_image(image, 8, 32).shape == (8, 32, 3)


@pytest.mark.parametrize("value", ["missing.png", {"bytes": b"no image", "path": None}, None, 3, {"path": None}])
def test_what_is_no_image_is_told_apart(value):
    with pytest.raises(BadImage):
        read_image(value)


def test_a_cell_is_bytes_or_a_path(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    cells = ["a.png", "./x/../a.png", str(tmp_path / "a.png"), data, {"bytes": data, "path": "b.png"}]
    for cell in [*cells, {"bytes": None, "path": str(tmp_path / "a.png")}, Image.open(tmp_path / "a.png")]:
        assert read_image(cell, str(tmp_path)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "cell",
    ["http://127.0.0.1:9/a.png", "file:///{outside}", "zip://a::http://127.0.0.1:9/", "hf://datasets/me/set/a.png"]
    + ["s3://bucket/a.png", "../outside.png", "{outside}", "a/../../outside.png", ""]
    + [{"bytes": None, "path": "http://127.0.0.1:9/a.png"}, {"path": "hf://datasets/other/set@main/a.png"}]
    + [{"path": "zip://a.png::http://127.0.0.1:9/a.zip"}, {"path": "hf://datasets/me/set-2@main/a.png"}]
    + [{"path": "file:///{outside}"}],
)
def test_a_row_names_no_file_but_those_of_its_data_set(tmp_path, monkeypatch, cell):
    """No other machine is asked, and nothing outside of the folder is read."""
    monkeypatch.setattr("fsspec.open", lambda *args, **kwargs: pytest.fail("a file system was opened"))
    outside = tmp_path / "outside.png"
    Image.new("RGB", (2, 2)).save(outside)
    (tmp_path / "d").mkdir()
    fill = lambda text: text.replace("{outside}", str(outside))  # noqa: E731
    cell = fill(cell) if isinstance(cell, str) else {name: value and fill(value) for name, value in cell.items()}
    for folder in (str(tmp_path / "d"), "me/set"):
        if "me/set/" in str(cell) and folder == "me/set":
            continue
        with pytest.raises(BadImage):
            read_image(cell, folder)


def test_files_of_a_streamed_repository_are_read(tmp_path, monkeypatch):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    opened = []
    monkeypatch.setattr("fsspec.open", lambda path, mode: opened.append(path) or open(tmp_path / "a.png", mode))
    paths = ["hf://datasets/me/set@main/a.png", "zip://x/a.png::hf://datasets/me/set@main/a.zip"]
    for path in [*paths, f"zip://a.png::{tmp_path}/a.zip"]:
        assert read_image({"bytes": None, "path": path}, "me/set").getpixel((0, 0)) == (255, 0, 0)
    assert len(opened) == 3


def test_a_crop_of_the_reduction_is_that_of_the_whole_image():
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for factor in (2, 4):
        whole = reduce(to_float(pixels)[None], factor)[0]
        for top, left, size in ((0, 0, 16), (3, 5, 24), ((64 - 16) // factor, (96 - 16) // factor, 16), (0, 0, 64)):
            image, low_res = crop_both(pixels, factor, top, left, size)
            assert torch.equal(image, crop(pixels, top * factor, left * factor, size))
            padded = F.pad(whole[None], (MARGIN,) * 4, mode="replicate")[0]
            expected = crop(padded, top, left, size // factor + 2 * MARGIN)
            torch.testing.assert_close(low_res, expected, atol=2e-6, rtol=0)
            assert torch.equal(crop_wider(whole, top, left, size // factor), expected)
            # for a network that enlarges the crop as a pipeline enlarges the whole image
            conditioning = Conditioning(low_res_margin=MARGIN)
            enlarged = crop(upsample_low_res(whole[None], (64, 96))[0], factor * top, factor * left, size)
            own = conditioning.upsample(low_res[None], (size, size))[0]
            torch.testing.assert_close(own, enlarged, atol=5e-6, rtol=0)


def sr_config(**kwargs) -> TrainingConfig:
    return TrainingConfig(train_data_dir="a", preset="emoji_base_64", resolution=64, low_resolution=32, **kwargs)


def test_degradations_are_a_gaussian_and_a_jpeg_of_the_drawn_strength():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 32, 32, generator=generator) * 2 - 1
    draws = np.full(DRAWS_PER_SLOT, 0.5)
    assert degrade(image, sr_config(), draws) is image

    point = torch.full((3, 33, 33), -1.0)
    point[:, 16, 16] = 1.0
    blurred = (degrade(point, sr_config(degradation_blur_sigma=[1.0, 3.0]), draws)[0].double() + 1) / 2
    x = torch.arange(33) - 16.0
    variance = (blurred * x.square()[:, None]).sum() / blurred.sum()
    assert variance.item() == pytest.approx(2.0**2, rel=0.25)  # PIL's blur rounds to bytes

    errors = []
    for uniform in (0.0, 0.5, 1.0):
        draws[JPEG] = uniform
        worse = degrade(image, sr_config(degradation_jpeg_quality=[10, 95]), draws)
        assert worse.shape == image.shape and worse.abs().max() <= 1
        errors.append(F.mse_loss(worse, image).item())
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(
    "caption, expected",
    [("a cat on the left", True), ("Right-handed", True), ("turn clockwise", True), ("a bright day", False)]
    + [("leftover", True), (None, False), ("uplifting", False)],
)
def test_captions_with_sides_are_known(caption, expected):
    assert speaks_of_sides(caption) is expected


def write_images(folder: Path, images: dict[str, np.ndarray], captions: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / name)
    lines = [json.dumps({"file_name": name, "text": text, "split": "train"}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def config_of(folder: Path, **kwargs) -> TrainingConfig:
    return TrainingConfig(
        **{"train_data_dir": str(folder), "preset": "emoji_base_64", "resolution": 16, "train_batch_size": 64} | kwargs
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_captions_without_sides_are_mirrored(tmp_path, encode, decode, in_memory):
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, :8] = 255
    write_images(tmp_path / "d", {"a.png": half, "b.png": half}, {"a.png": "on the left", "b.png": "anywhere"})
    config = config_of(tmp_path / "d", random_flip=True, in_memory=in_memory)
    batch = next(make_train_batches(config, encode))
    mirrored = batch.images[:, 0, 0, 0] == -1
    captions = decode(batch.text, batch.text_mask)
    share = {name: np.mean([m.item() for m, c in zip(mirrored, captions) if c == name]) for name in set(captions)}
    assert share["on the left"] == 0 and 0.2 < share["anywhere"] < 0.8
    assert not (next(make_train_batches(replace(config, random_flip=False), encode)).images[:, 0, 0, 0] == -1).any()


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Four good images of their own grey, a truncated one, one that is text, and one that is too small."""
    rng = np.random.default_rng(0)
    images = {f"{i}.png": np.full((16, 16, 3), 50 * i, np.uint8) for i in range(4)}
    images |= {
        "cut.png": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "small.png": np.zeros((9, 20, 3), np.uint8),
    }
    folder = tmp_path / "d"
    write_images(folder, images, {name: name[:4] for name in [*images, "text.png"]})
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    (folder / "text.png").write_text("not an image")
    return folder


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 0), (False, 2)])
def test_damaged_and_small_images_are_named_and_replaced(damaged, in_memory, workers, caplog, monkeypatch, encode):
    monkeypatch.setattr(logging.getLogger("diffusers_imagen"), "propagate", True)
    config = config_of(damaged, min_resolution=10, in_memory=in_memory, dataloader_num_workers=workers)
    stream = make_train_batches(config, encode)
    with caplog.at_level(logging.WARNING):
        batch = next(stream)
    assert {Path(name).name for name in stream.skipped} == {"cut.png", "text.png", "small.png"}
    reasons = " ".join(stream.skipped.values())
    assert "truncated" in reasons and "cannot identify" in reasons and "20x9 is below `min_resolution` 10" in reasons
    greys = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round()
    assert set(greys.tolist()) == {0, 50, 100, 150}
    # whoever draws them, the same rows come in their place
    pair = [make_train_batches(replace(config, train_batch_size=32), encode, i, 2) for i in range(2)]
    assert torch.equal(torch.cat([next(half).images for half in pair]), batch.images)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_set_without_a_single_good_image_is_refused(tmp_path, in_memory):
    write_images(tmp_path / "d", {}, {"a.png": "a", "b.png": "b"})
    with pytest.raises(ValueError, match=r"cannot be used|can be used; a.png: FileNotFoundError"):
        next(make_train_batches(config_of(tmp_path / "d", in_memory=in_memory)))


def test_automatic_buckets_have_about_one_area_and_even_sides():
    shapes = make_buckets(256, 16)
    # 5:4 and 4:3 meet on this grid
    assert (256, 256) in shapes and len(shapes) == len(set(shapes)) == 9
    for height, width in shapes:
        assert height % 16 == width % 16 == 0
        assert height * width == pytest.approx(256**2, rel=0.1)
    assert {(w, h) for h, w in shapes} == set(shapes)


def test_a_batch_has_the_shape_of_its_images(tmp_path):
    wide, tall = np.full((16, 64, 3), 100, np.uint8), np.full((60, 16, 3), 200, np.uint8)
    write_images(tmp_path / "d", {"a.png": wide, "b.png": tall}, {"a.png": "a", "b.png": "b", "gone.png": "c"})
    config = config_of(tmp_path / "d", aspect_ratio_buckets="8,32;32,8;16,16", low_resolution=4, train_batch_size=2)
    stream = make_train_batches(config)
    assert list(stream.skipped) == ["gone.png"] and "FileNotFoundError" in stream.skipped["gone.png"]
    seen = set()
    for _ in range(20):
        batch = next(stream)
        grey = ((batch.images + 1) * 127.5).round().unique().tolist()
        seen.add((tuple(batch.images.shape[2:]), tuple(batch.low_res.shape[2:]), *grey))
    assert seen == {((8, 32), (2, 8), 100), ((32, 8), (8, 2), 200)}


def jpeg(width: int, height: int, **options) -> bytes:
    """Smooth colours under fine lines, as a JPEG file."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 31) * 60 + np.sin(y / 17) * 50, np.cos((x + y) / 23) * 90, np.sin(x * y / 9000) * 70]
    pixels = np.stack([128 + wave + 20 * ((x // 3 + y // 5) % 2) for wave in waves], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


@pytest.mark.parametrize("width, height, side, decoded", [(800, 640, 64, (200, 160)), (1024, 512, 32, (128, 64))])
def test_large_jpeg_files_are_decoded_at_a_part_of_their_size(width, height, side, decoded):
    for options in ({}, {"progressive": True}):
        file = jpeg(width, height, **options)
        image = read_fitting(file, (side, side))
        assert image.size == decoded
        error = fit_image(image, side, side).astype(float) - fit_image(read_image(file), side, side)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 44 and np.abs(error).max() <= 14


def test_a_file_without_pixels_to_spare_is_decoded_as_it_is():
    file = jpeg(120, 100)
    assert np.array_equal(read_fitting(file, (64, 64)), read_image(file))
    large = np.asarray(Image.open(io.BytesIO(jpeg(512, 512))))
    png = io.BytesIO()
    Image.fromarray(large).save(png, "PNG")
    assert np.array_equal(read_fitting(png.getvalue(), (16, 16)), large)


def test_the_smallest_side_is_that_of_the_file():
    file = jpeg(512, 400)
    assert read_fitting(file, (32, 32), min_resolution=400).size == (128, 100)
    with pytest.raises(BadImage, match="512x400 is below `min_resolution` 401"):
        read_fitting(file, (32, 32), min_resolution=401)


def test_an_upright_picture_has_enough_pixels_both_ways():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = read_fitting(jpeg(800, 300, exif=exif), (64, 32))
    assert image.size == (150, 400)


def test_a_picture_that_is_open_stays_open():
    image = Image.open(io.BytesIO(jpeg(512, 400)))
    assert read_fitting(image, (32, 32), min_resolution=400).size == (512, 400)
    assert image.getpixel((0, 0)) == read_image(image).getpixel((0, 0))
    with pytest.raises(BadImage, match="512x400 is below `min_resolution` 401"):
        read_fitting(image, (32, 32), min_resolution=401)


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(96, 96), (96, 64), (64, 96), (33, 96), (20, 24)])
def test_images_are_fitted_as_by_pillow(size, interpolation):
    """Where torch resizes them, of whole pixels, and where Pillow does."""
    image = Image.open(io.BytesIO(jpeg(*size)))
    for height, width, top, left in ((32, 32, 0.5, 0.5), (16, 24, 0.0, 0.3), (96, 96, 1.0, 0.9)):
        method = Image.Resampling[interpolation.upper()]
        expected = np.asarray(ImageOps.fit(image, (width, height), method, centering=(left, top))).astype(int)
        fitted = fit_image(image, height, width, top, left, interpolation)
        error = np.abs(fitted - expected)
        assert fitted.dtype == np.uint8 and error.max() <= 1 and (error > 0).mean() < 2e-3
        part = fit_image(image, height, width, top, left, interpolation, (3, 5, 11, 20))
        assert np.array_equal(part, fitted[3:11, 5:20])


def test_a_picture_of_the_caller_is_not_shared():
    image = Image.new("RGB", (4, 4))
    read_image(image).putpixel((0, 0), (9, 9, 9))
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96)])
def test_crops_are_cut_before_they_become_numbers(shape, interpolation):
    """As of the whole image, to the last bit."""
    config = replace(
        sr_config(), low_resolution=16, crop_size=16, center_crop=False, image_interpolation_mode=interpolation
    )
    maker = SampleMaker(config, "image", "", with_text=False)
    row = {"image": jpeg(128, 100)}
    for draws in SlotDraws(3)(0, 40):
        whole = maker.pixels(row, draws, shape)
        expected = crop_both(whole, 4, *maker.corner(shape, draws), 16, interpolation)
        for given, wanted in zip(maker.images(row, draws, shape), expected):
            assert torch.equal(given, wanted)


def test_batches_stay_uint8_until_they_are_on_their_device(tmp_path):
    """And are reduced there, as each image alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    names = [f"{i}.png" for i in range(4)]
    write_images(tmp_path, dict(zip(names, pixels)), dict.fromkeys(names, ""))
    config = config_of(tmp_path, resolution=32, low_resolution=8, in_memory=False, train_batch_size=4)
    stream = make_train_batches(config)
    samples = stream._draw()
    assert samples.pixels.dtype == torch.uint8 and samples.low_res is None
    batch = samples.finish(None, config, torch.device("cpu"))
    assert torch.equal(batch.images, to_float(samples.pixels))
    for image, low_res in zip(batch.images, batch.low_res):
        torch.testing.assert_close(low_res, reduce(image[None], 4)[0], atol=1e-6, rtol=0)
    elsewhere = samples.finish(None, config, torch.device("meta"))
    assert elsewhere.images.device.type == elsewhere.low_res.device.type == "meta"


def test_a_stream_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(512, 400))
    opened = []
    monkeypatch.setattr("fsspec.open", lambda name, mode: opened.append(name) or open(path, mode))
    cell = {"bytes": None, "path": "hf://datasets/me/set@main/a.jpg"}
    assert read_fitting(cell, (32, 32), "me/set", min_resolution=400).size == (128, 100)
    assert len(opened) == 1
