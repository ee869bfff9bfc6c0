"""The page of `diffusers-imagen demo`: draw, enlarge and paint anew in a browser. Needs gradio, the extra `demo`.

It may be served to anybody, so what a visitor can ask for is bounded: one drawing at a time and few that wait, short texts,
numbers within the page's limits, pictures of a bounded size, and nothing that is kept: what was drawn or given is deleted
after a while.
"""

from .page_layout import build
from .page_look import LOOK


__all__ = ["LOOK", "build"]
