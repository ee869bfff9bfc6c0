"""Parts that the benchmark measures by themselves: group normalization, and decoding of JPEG files."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_measures import Case, Group
from PIL import Image, ImageDraw

from diffusers_imagen.models.normalization import GroupNorm
from diffusers_imagen.training.data.pixels import fit_image, read_fitting, read_image


GROUPS = 16
SHAPES = ((64, 32, 64, 64), (16, 96, 32, 32), (2, 48, 128, 128), (16, 128, 16, 16))
PICTURES = ((512, 64), (1024, 64), (512, 256), (1024, 256), (2048, 256))  # pixels of the file and of the batch
FILES = 8
QUALITY = 92


def normalization_groups(settings: Any) -> list[Group]:
    """Return forward and backward passes of group normalization in channels-last layout: torch's own, and ours."""
    return [
        Group("normalization", "x".join(map(str, shape)), shape[0], partial(normalization_cases, shape, settings))
        for shape in SHAPES
    ]


def normalization_cases(shape: tuple[int, ...], settings: Any) -> list[Case]:
    ours = GroupNorm(GROUPS, shape[1]).to(settings.device, settings.dtype)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, GROUPS, ours.weight, ours.bias, ours.eps)

    note = "forward and backward"
    return [
        Case(name, partial(normalization_step, function, shape, settings), note=note)
        for name, function in (("ours", ours), ("torch", plain))
    ]


def normalization_step(function: Callable, shape: tuple[int, ...], settings: Any) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(shape, generator=generator)
        .to(settings.device, settings.dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    x.requires_grad_()

    def step() -> None:
        function(x).backward(grad)
        x.grad = None

    return step


def decoding_groups() -> list[Group]:
    """Return how fast JPEG files become images of a batch: decoded in part as training does it, and as a whole."""
    return [
        Group("decoding", f"JPEG {large} -> {small} px", FILES, partial(decoding_cases, large, small))
        for large, small in PICTURES
    ]


def decoding_cases(large: int, small: int) -> list[Case]:
    files = [picture(large, seed) for seed in range(FILES)]
    note = f"PSNR {closeness(files, small):.1f} dB"
    return [
        Case("ours", lambda: partial(decode, partial(read_fitting, size=(small, small)), files, small), note=note),
        Case("full decode", lambda: partial(decode, read_image, files, small)),
    ]


def decode(read: Callable[[bytes], Image.Image], files: list[bytes], side: int) -> list[np.ndarray]:
    return [fit_image(read(file), side, side) for file in files]


def closeness(files: list[bytes], side: int) -> float:
    """Return the PSNR of images decoded in part against those of a full decode, in dB."""
    given, expected = (
        np.stack(decode(read, files, side)).astype(np.float64)
        for read in (partial(read_fitting, size=(side, side)), read_image)
    )
    error = ((given - expected) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def picture(side: int, seed: int) -> bytes:
    """Draw ellipses with sharp edges over noise, as a JPEG file."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    image = coarse.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        left, top = rng.integers(0, side, 2)
        width, height = rng.integers(side // 32, side // 4, 2)
        draw.ellipse((left, top, left + width, top + height), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
