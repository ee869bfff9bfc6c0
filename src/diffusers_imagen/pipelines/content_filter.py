"""Conversion of the stages' tensors to a call's output, with DeepFloyd IF's safety checker and watermarker.

Both are optional components of a pipeline. As in diffusers' pipelines of IF, PIL images (`output_type="pil"`) are
checked and then watermarked, arrays ("np") are only checked, and tensors ("pt" and "latent"), meant for further
processing, are neither.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from diffusers.utils import numpy_to_pil
from transformers import BaseImageProcessor

from ..utils.arguments import bad_argument
from ..utils.modules import is_offloaded, unwrapped
from .pipeline_output import Images
from .slicing import shared_size
from .stage_table import SAFETY_PARTS


CHECKED, MARKED = ("pil", "np"), ("pil",)  # output types
# IF's watermark is 62 px on an image of 1024 px, and vanishes on images below this size, for which diffusers fails
MIN_MARKED_SIZE = 17


class Finished(NamedTuple):
    """Output of a call: the images of the stages by resolution, and the results of the safety checker."""

    images: dict[int, Images]
    nsfw_detected: list[bool] | None = None  # one entry per image, over all stages; None without a safety checker
    watermark_detected: list[bool] | None = None


def check_filter(components: Mapping[str, Any]) -> None:
    """Raise ValueError for components of the wrong class, or a safety checker without its feature extractor."""
    checker, extractor, watermarker = (unwrapped(components.get(name)) for name in SAFETY_PARTS)
    if checker is not None and not isinstance(checker, IFSafetyChecker):
        raise bad_argument("safety_checker", checker, "an IFSafetyChecker")
    if extractor is not None and not isinstance(extractor, BaseImageProcessor):
        raise bad_argument("feature_extractor", extractor, "an image processor of transformers")
    if watermarker is not None and not isinstance(watermarker, IFWatermarker):
        raise bad_argument("watermarker", watermarker, "an IFWatermarker")
    if checker is not None and extractor is None:
        raise ValueError(
            "`feature_extractor` is None, but should be the image processor of `safety_checker`; or pass "
            "`safety_checker=None` too, which disables the check."
        )


def finish_images(pipe: Any, images: Mapping[int, torch.Tensor], output_type: str) -> Finished:
    """Convert the images of a call to the requested output type, checked and watermarked by the pipeline's components.

    An image that the safety checker flags at any stage is black at every stage.

    Args:
        pipe: The pipeline.
        images: By the stage's resolution, `(B, C, H, W)` in [-1, 1]; in the same order for all stages.
        output_type: "pil", "np", "pt" or "latent".
    """
    process = pipe.image_processor.postprocess
    checks = pipe.safety_checker is not None and output_type in CHECKED
    marks = pipe.watermarker is not None and output_type in MARKED
    if not checks:
        finished = {resolution: process(x, output_type=output_type) for resolution, x in images.items()}
        return Finished(mark(pipe, finished) if marks else finished)
    arrays = {resolution: process(x, output_type="np") for resolution, x in images.items()}
    verdicts = [check(pipe, array) for array in arrays.values()]
    nsfw, watermarked = (np.any([verdict[part] for verdict in verdicts], axis=0) for part in (0, 1))
    for array in arrays.values():
        array[nsfw | watermarked] = 0.0
    if output_type == "pil":
        arrays = {resolution: numpy_to_pil(array) for resolution, array in arrays.items()}
    return Finished(mark(pipe, arrays) if marks else arrays, nsfw.tolist(), watermarked.tolist())


def check(pipe: Any, images: np.ndarray) -> tuple[list[bool], list[bool]]:
    """Return which of the images `(B, H, W, C)` in [0, 1] the safety checker flags: as NSFW, and as watermarked.

    The checker makes flagged images black in the array. With `enable_slicing` it runs on one slice at a time.
    """
    checker = pipe.safety_checker
    device = pipe._execution_device if is_offloaded(checker) else checker.device
    nsfw: list[bool] = []
    watermarked: list[bool] = []
    size = shared_size(pipe.slice_size) or len(images)
    for start in range(0, len(images), size):
        part = images[start : start + size]
        pixels = pipe.feature_extractor(numpy_to_pil(part), return_tensors="pt").pixel_values
        _, *found = checker(images=part, clip_input=pixels.to(device, checker.dtype))
        nsfw += found[0]
        watermarked += found[1]
    return nsfw, watermarked


def mark(pipe: Any, images: dict[int, Any]) -> dict[int, Any]:
    """Add IF's watermark to the corner of the images, in its size at the stage's resolution."""
    for resolution, pictures in images.items():
        if max(resolution, min(pictures[0].size)) >= MIN_MARKED_SIZE:
            pipe.watermarker.apply_watermark(pictures, resolution)
    return images
