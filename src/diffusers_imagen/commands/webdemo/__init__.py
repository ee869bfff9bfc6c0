"""Web page of `diffusers-imagen demo`: generate, upscale and inpaint in a browser. Requires gradio, the extra `demo`.

The page may be public, so requests are limited: one image generation at a time and a short queue, short texts, numbers
within the page's limits, images of limited size, and no permanent storage: generated and uploaded images are deleted
after a while.
"""

from .page_layout import build
from .page_look import LOOK


__all__ = ["LOOK", "build"]
