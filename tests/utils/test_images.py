"""Pictures of every mode and depth, read in one way by training, pipelines and commands."""

import io
import os
import socket
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen.commands import common
from diffusers_imagen.pipelines.image_inputs import read_images, read_masks
from diffusers_imagen.training.data.pixels import read_image as read_cell
from diffusers_imagen.utils.images import BadImage, open_image, picture_extensions, read_image, to_rgb


RED, HALF_RED = (200, 40, 30), (200, 40, 30, 128)


def paletted() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    image.info["transparency"] = 0
    image.putpixel((0, 0), 0)
    return image


def sixteen_bits(kind: str = "<u2", value: int = 200 * 257) -> Image.Image:
    return Image.fromarray(np.full((2, 2), value, dtype=kind))


def transparent_sixteen_bits() -> Image.Image:
    image = sixteen_bits(value=1000)
    image.info["transparency"] = 1000
    return image


MODES = {
    "RGB": (Image.new("RGB", (2, 2), RED), RED),
    "RGBX": (Image.new("RGBX", (2, 2), (*RED, 0)), RED),
    "L": (Image.new("L", (2, 2), 77), (77, 77, 77)),
    "1": (Image.new("1", (2, 2), 1), (255, 255, 255)),
    "I;16": (sixteen_bits(), (200, 200, 200)),
    "I;16B": (sixteen_bits(">u2"), (200, 200, 200)),
    "I;16 dark": (sixteen_bits(value=200), (1, 1, 1)),
    "I;16 transparent": (transparent_sixteen_bits(), (0, 0, 255)),
    "I": (Image.new("I", (2, 2), 51400), (200, 200, 200)),
    "I of bytes": (Image.new("I", (2, 2), 200), (200, 200, 200)),
    "F": (Image.new("F", (2, 2), 0.5), (128, 128, 128)),
    "F a little too bright": (Image.new("F", (2, 2), 1.02), (255, 255, 255)),
    "F of bytes": (Image.new("F", (2, 2), 200.0), (200, 200, 200)),
    "F of 16 bits": (Image.new("F", (2, 2), 51400.0), (200, 200, 200)),
    "CMYK": (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (Image.new("RGB", (2, 2), RED).convert("YCbCr"), RED),
    "HSV": (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
    "LAB": (Image.new("LAB", (2, 2), (255, 128, 128)), (255, 255, 255)),
    "LA": (Image.new("LA", (2, 2), (77, 0)), (0, 0, 255)),
    "La": (Image.new("La", (2, 2), (0, 0)), (0, 0, 255)),
    "RGBA": (Image.new("RGBA", (2, 2), HALF_RED), (100, 20, 142)),
    "RGBa": (Image.new("RGBA", (2, 2), HALF_RED).convert("RGBa"), (100, 20, 142)),
    "P": (paletted(), (0, 0, 255)),
    "PA": (paletted().convert("PA"), (0, 0, 255)),
}


@pytest.mark.parametrize("image, expected", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_on_the_background(image, expected):
    rgb = to_rgb(image, "blue")
    assert rgb.mode == "RGB"
    assert np.abs(np.array(rgb.getpixel((0, 0))) - expected).max() <= 1 + (image.mode == "YCbCr")


@pytest.mark.parametrize("image", [image for image, _ in MODES.values()], ids=MODES)
def test_training_pipelines_and_commands_read_the_same(image, tmp_path):
    expected = np.asarray(to_rgb(image))
    (pixels,) = read_images(image)
    assert np.array_equal((pixels.permute(1, 2, 0).numpy() * 127.5 + 127.5).round(), expected)
    (mask,) = read_masks(image)
    assert np.array_equal(mask[0].numpy(), np.asarray(to_rgb(image).convert("L")) >= 128)
    if image.mode not in ("La", "RGBa", "HSV", "YCbCr"):  # of which Pillow writes no files that it reads
        image.save(tmp_path / "a.tif")
        rgb = read_cell("a.tif", str(tmp_path))
        assert np.array_equal(np.asarray(common.read_image("image", tmp_path / "a.tif")), np.asarray(rgb))
        assert torch.equal(read_images(Image.open(tmp_path / "a.tif"))[0], read_images(rgb)[0])


def test_a_16_bit_png_is_no_white_picture(tmp_path):
    """Every one of the 256 levels of grey, as a 16-bit PNG holds it."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "a.png")
    for image in (common.read_image("image", tmp_path / "a.png"), read_cell("a.png", str(tmp_path))):
        assert np.array_equal(np.asarray(image)[..., 0], levels)
    for given in (Image.open(tmp_path / "a.png"), levels * 257, levels.astype(np.uint8)):
        torch.testing.assert_close((read_images(given)[0][0] + 1) * 127.5, torch.from_numpy(levels).float())


def test_palette_and_its_transparency_survive_a_file(tmp_path):
    paletted().save(tmp_path / "a.png", transparency=0)
    image = read_image(str(tmp_path / "a.png"), "white")
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((1, 1)) == RED
    assert read_image((tmp_path / "a.png").read_bytes()).getpixel((1, 1)) == RED
    assert read_image(tmp_path / "a.png").getpixel((1, 1)) == RED


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(read_image(str(tmp_path / "a.png")))
    assert upright.shape == (8, 4, 3) and (upright[:4] == 255).all() and (upright[4:] == 0).all()
    (given,), (mask,) = read_images(Image.open(tmp_path / "a.png")), read_masks(Image.open(tmp_path / "a.png"))
    assert given.shape == (3, 8, 4) and (given[:, :4] == 1).all() and (given[:, 4:] == -1).all()
    assert torch.equal(mask[0], (given[0] > 0).float())


def float_tiff(value: float) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(file, "TIFF")
    return file.getvalue()


def huge_png() -> bytes:
    """The header of a picture with 10^10 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def postscript() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    return file.getvalue()


BAD_FILES = {
    "nan": (float_tiff(float("nan")), r"1 of its 2 values are not finite \(NaN or infinite\)"),
    "infinite": (float_tiff(float("inf")), "not finite"),
    "negative": (float_tiff(-0.5), r"values from -0.5 to 0.5, but should be in \[0, 1\]"),
    "too much": (float_tiff(1e6), "values from 0.5 to 1e.06"),
    "bomb": (huge_png(), "DecompressionBombError"),
    "a program": (postscript(), "cannot identify it as an image"),
    "text": (b"no picture", "cannot identify it as an image"),
    "nothing": (b"", "(?:cannot identify it as an|there is no) image"),
}


@pytest.mark.parametrize("data, message", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_no_picture_is_said(data, message, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, str(tmp_path / "a.png"), tmp_path / "a.png"):
        with pytest.raises(BadImage, match=message):
            read_image(source)
    with pytest.raises(BadImage, match=message):
        read_cell({"bytes": data, "path": None})
    with pytest.raises(ValueError, match=rf"`image` is '.*a.png', which cannot be read: .*{message}"):
        common.read_image("image", tmp_path / "a.png")


def test_integers_beyond_16_bits_are_refused():
    for value in (-1, 65536):
        with pytest.raises(BadImage, match=f"integers from {value} to {value}, but should have 8 or 16 bits"):
            to_rgb(Image.new("I", (2, 2), value))


def test_only_regular_files_are_opened(tmp_path):
    """A pipe without a writer, which would wait for ever, a socket, a device and a folder."""
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        found = []

        def read() -> None:
            for path in (tmp_path / "pipe.png", tmp_path / "s.png", "/dev/zero", tmp_path):
                try:
                    open_image(path)
                except BadImage as error:
                    found.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(10)
    assert len(found) == 4 and all("not a regular file" in text for text in found)
    with pytest.raises(BadImage, match="FileNotFoundError"):
        read_image(tmp_path / "missing.png")


def test_files_that_count_as_pictures():
    extensions = picture_extensions()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic"} < extensions
    assert not {".txt", ".json", ".pdf", ".eps", ".h5", ".mpg", ".partial", ""} & extensions
