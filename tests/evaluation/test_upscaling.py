"""Super-resolution against bicubic interpolation: closed forms, and torchmetrics on whole pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen.evaluation.picture_sets import fitted, from_tensor, reduced, resized, to_tensor
from diffusers_imagen.evaluation.upscaling import PEAK, compare, consistency, upscaling_figures
from diffusers_imagen.training.data.pyramid import reduce


class Pictures:
    """Pictures at hand."""

    has_pictures, name = True, "pictures"

    def __init__(self, pictures):
        self.pictures = pictures

    def picture(self, index: int) -> Image.Image:
        return self.pictures[index]


@pytest.fixture
def smooth() -> Image.Image:
    """A picture without what reduction to 16 px would lose."""
    x, y = np.meshgrid(np.linspace(60, 180, 64), np.linspace(50, 200, 64))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).round().astype(np.uint8))


def test_a_constant_error_has_its_decibels(smooth):
    brighter = Image.fromarray((np.array(smooth) + 10).astype(np.uint8))
    noise, structure, agreement = compare(*(to_tensor(one) for one in (brighter, smooth, reduced(smooth, 64, 16))))
    assert noise == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    assert 0.9 < structure < 1
    assert agreement == pytest.approx(20 * np.log10(255 / 10), abs=0.1)  # reduced to 8 bits


def test_the_perfect_result_is_the_peak(smooth):
    real = Pictures([smooth, smooth.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    found = upscaling_figures(real, real, [0, 1], 16, 64)
    assert found["super-resolution"]["PSNR (dB)"].value == PEAK
    assert found["super-resolution"]["SSIM"].value == pytest.approx(1)
    assert found["super-resolution"]["consistency (dB)"].value > 50
    assert 30 < found["bicubic"]["PSNR (dB)"].value < PEAK
    assert consistency(real, Pictures([reduced(one, 64, 16) for one in real.pictures]), [0, 1], 16).value > 50


def test_pictures_are_reduced_as_training_reduces_them(smooth):
    """In [0, 1] here and in [-1, 1] there, clamped alike."""
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = reduce(pixels[None] * 2 - 1, 4)[0] / 2 + 0.5
    torch.testing.assert_close(resized(pixels, 16), expected, atol=1e-6, rtol=0)
    assert np.array_equal(np.array(from_tensor(to_tensor(smooth))), np.array(smooth))


def test_a_picture_of_the_size_stays_as_it_is(smooth):
    assert fitted(smooth, 64) is smooth
    wide = Image.fromarray(
        np.concatenate([np.zeros((64, 32, 3), np.uint8), np.array(smooth), np.zeros((64, 32, 3), np.uint8)], 1)
    )
    assert np.array_equal(np.array(fitted(wide, 64)), np.array(smooth))
