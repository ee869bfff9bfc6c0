"""From the stages' tensors to what a call returns, past the safety checker and the watermarker of DeepFloyd IF.

Both are components that a pipeline may have. As in diffusers' pipelines of IF, pictures (`output_type="pil"`) are checked
and then marked, arrays ("np") are checked only, and tensors ("pt" and "latent"), which are for further work, are neither.
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


CHECKED, MARKED = ("pil", "np"), ("pil",)  # of the output types
# IF's watermark has 62 px on a picture of 1024, and none on one below this size: diffusers fails there
MIN_MARKED_SIZE = 17


class Finished(NamedTuple):
    """What a call returns: the images of the stages by resolution, and what the safety checker said of them."""

    images: dict[int, Images]
    nsfw_detected: list[bool] | None = None  # an entry for each image, of all stages together; None without a check
    watermark_detected: list[bool] | None = None


def check_filter(components: Mapping[str, Any]) -> None:
    """Raises ValueError for parts of a filter that are of another kind, or a safety checker without what it reads."""
    checker, extractor, watermarker = (unwrapped(components.get(name)) for name in SAFETY_PARTS)
    if checker is not None and not isinstance(checker, IFSafetyChecker):
        raise bad_argument("safety_checker", checker, "an IFSafetyChecker")
    if extractor is not None and not isinstance(extractor, BaseImageProcessor):
        raise bad_argument("feature_extractor", extractor, "an image processor of transformers")
    if watermarker is not None and not isinstance(watermarker, IFWatermarker):
        raise bad_argument("watermarker", watermarker, "an IFWatermarker")
    if checker is not None and extractor is None:
        raise ValueError(
            "`feature_extractor` is None, but should be the image processor that `safety_checker` reads images by; "
            "or give `safety_checker=None` too, which leaves the check out."
        )


def finish_images(pipe: Any, images: Mapping[int, torch.Tensor], output_type: str) -> Finished:
    """The images of a call as it asked for them, checked and marked by the components that the pipeline has.

    An image in which the safety checker finds something, at any stage, is black at every stage.

    Args:
        pipe: The pipeline.
        images: By the stage's resolution, `(B, C, H, W)` in [-1, 1]; the images of all stages belong together.
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
    """Which of the images `(B, H, W, C)` in [0, 1] the safety checker flags: as unfit for work, and as marked by others.

    The checker makes those black in the array. It reads a slice at a time where the networks do.
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
    """The pictures with IF's watermark in their corner: of the size that it has at the stage's resolution."""
    for resolution, pictures in images.items():
        if max(resolution, min(pictures[0].size)) >= MIN_MARKED_SIZE:
            pipe.watermarker.apply_watermark(pictures, resolution)
    return images
