"""Extension of griffe for the API reference: converts docstrings in the style of diffusers for the site's parser."""

import re
from typing import Any

from griffe import Extension


REFERENCE = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\]")  # [`ImagenUNetModel`], [`~transformers.PreTrainedModel`]
# `    prompt (`str` or `list[str]`, *optional*, defaults to `None`): text`
PARAMETER = re.compile(r"^( {4,}\*{0,2}[\w, ]+) \(((?:[^()]|\([^()]*\))*)\):", re.MULTILINE)
DEFAULT = re.compile(r",? *(\*optional\*|defaults to [^,]+)")


class DiffusersDocstrings(Extension):
    """Rewrite types of parameters and references to classes before docstrings are parsed."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    """
    Return the docstring with plain types, without defaults, which the signature has, and with class names as code.
    """

    def parameter(match: re.Match) -> str:
        types = DEFAULT.sub("", match[2]).replace("`", "").strip(" ,")
        return f"{match[1]} ({types}):" if types else f"{match[1]}:"

    return PARAMETER.sub(parameter, REFERENCE.sub(r"`\1`", text))
