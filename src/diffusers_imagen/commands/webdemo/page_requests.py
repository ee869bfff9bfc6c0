"""Page requests as arguments of a pipeline; all values are checked, because requests need not come from the page."""

import html
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image

from ...utils.arguments import is_finite
from ...utils.images import BadImage, open_image, read_image
from .page_tasks import Task, limits_of


MAX_SEED = 2**31 - 1
MAX_IMAGES = 8
MAX_PROMPT_LENGTH = 1000  # in characters
MIN_STRENGTH = 0.1
UNREADABLE = "The image cannot be read, or was deleted in the meantime: upload it again."


class DrawingRequest(NamedTuple):
    """One drawing."""

    seed: int
    arguments: dict[str, Any]  # of the pipeline's call, without the generator


def read_request(task: Task, values: Mapping[str, Any]) -> DrawingRequest:
    """Read a visitor's request.

    Args:
        task ([`Task`]): Task of the tab.
        values (`dict`): Values of its fields by name; the fields are those of `page_layout`.

    Raises:
        gr.Error: For values that the page would not send, or that are invalid.
    """
    arguments: dict[str, Any] = {}
    if task.reads_text:
        arguments["prompt"] = read_text("The prompt", values["prompt"])
        arguments["negative_prompt"] = read_text("The negative prompt", values["negative_prompt"]).strip() or None
        if task.needs_prompt and not arguments["prompt"].strip():
            raise refusal("Enter a prompt.")
    if task.takes_mask:
        image, mask = read_drawn_mask(values["picture"])
        arguments |= fitted(task, image, mask)
        arguments["strength"] = float(number("Strength", values["strength"], MIN_STRENGTH, 1))
    elif task.takes_picture:
        arguments |= fitted(task, read_picture(values["picture"]))
    arguments["num_images_per_prompt"] = whole("Images", values["images"], 1, MAX_IMAGES)
    arguments["num_inference_steps"] = [
        whole("Steps", values[f"{stage.name}_steps"], 1, limits_of(stage)[0]) for stage in task.stages
    ]
    arguments["guidance_scale"] = [
        float(number("Guidance", values[f"{stage.name}_guidance"], 1, limits_of(stage)[1])) for stage in task.stages
    ]
    return DrawingRequest(choose_seed(values["seed"], values["random_seed"]), arguments)


def choose_seed(seed: Any, is_random: Any) -> int:
    """Return the seed of a drawing, which the page shows so that the images can be reproduced."""
    return random.SystemRandom().randint(0, MAX_SEED) if is_random is True else whole("Seed", seed or 0, 0, MAX_SEED)


def generator_of(request: DrawingRequest) -> torch.Generator:
    """Return the source of all noise of a drawing, as on the command line."""
    return torch.Generator().manual_seed(request.seed)


# ---- texts and numbers


def read_text(name: str, text: Any) -> str:
    """Return a text within the limits; empty for None."""
    if not isinstance(text, (str, type(None))):
        raise refusal(f"{name} is not a text.")
    text = text or ""
    if len(text) > MAX_PROMPT_LENGTH:
        raise refusal(f"{name} has {len(text)} characters, but should have at most {MAX_PROMPT_LENGTH}.")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise refusal(f"{name} is not valid Unicode.")
    return text


def number(name: str, value: Any, lowest: float, highest: float) -> float:
    """Return a number within the page's limits."""
    if not is_finite(value) or not lowest <= value <= highest:
        raise refusal(f"{name} should be a number from {lowest} to {highest}.")
    return value


def whole(name: str, value: Any, lowest: int, highest: int) -> int:
    """Return a number within the page's limits, without its fraction."""
    return int(number(name, value, lowest, highest))


# ---- images


def read_picture(value: Any) -> Image.Image:
    """Read an uploaded image, upright and in RGB."""
    try:
        return read_image(file_of(value))
    except BadImage as error:  # its text may have the path
        raise refusal(UNREADABLE) from error


def read_drawn_mask(value: Any) -> tuple[Image.Image, Image.Image]:
    """Read an image, and a mask of the same size, white where the visitor painted.

    The editor places an image on a larger, transparent canvas, which is cropped.
    """
    value = value if isinstance(value, dict) else {}
    try:
        canvas = open_image(file_of(value.get("background"))).convert("RGBA")
        mask = Image.new("L", canvas.size, 0)
        for layer in value.get("layers") or ():
            painted = open_image(file_of(layer)).convert("RGBA").getchannel("A")
            if painted.size != canvas.size:
                raise BadImage(f"its mask is {painted.size}, but should be {canvas.size}")
            mask.paste(255, mask=painted.point(lambda opacity: 255 if opacity > 0 else 0))
    except (BadImage, OSError, SyntaxError) as error:  # Pillow's errors for damaged files
        raise refusal(UNREADABLE) from error
    box = canvas.getchannel("A").getbbox()
    if box is None or mask.crop(box).getbbox() is None:
        raise refusal("Paint over the part to repaint.")
    return read_image(canvas.crop(box)), mask.crop(box)


def file_of(value: Any) -> str:
    """Return the path of a file that gradio stores for the page."""
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str):
        raise refusal("Upload an image first.")
    return path


def fitted(task: Task, image: Image.Image, mask: Image.Image | None = None) -> dict[str, Any]:
    """
    Crop an image and its mask to sizes that the networks support; return them and the result's size as arguments.
    """
    width, height = task.size_for(*image.size)
    scale = min(image.width / width, image.height / height)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    left, top = ((whole - part) // 2 for whole, part in zip(image.size, size))
    box = (left, top, left + size[0], top + size[1])
    arguments: dict[str, Any] = {"image": image.crop(box), "height": height, "width": width}
    if mask is not None:
        arguments["mask_image"] = mask.crop(box)
        if arguments["mask_image"].getbbox() is None:
            raise refusal(
                "The painted part is outside the center of the image, to which such a long image is cropped."
            )
    return arguments


def refusal(text: str) -> gr.Error:
    """Return a one-line error that the page shows, but which is not logged; gradio interprets it as HTML."""
    return gr.Error(html.escape(" ".join(text.split()), quote=False), print_exception=False)
