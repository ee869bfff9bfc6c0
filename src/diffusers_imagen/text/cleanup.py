"""Caption cleaning as in DeepFloyd IF's training: removes markup, addresses, file names and similar text."""

import functools
import re
import warnings
from typing import Any

from diffusers.utils import is_bs4_available, is_ftfy_available, logging

from ..utils.modules import quiet_transformers


logger = logging.get_logger(__name__)

# The time of diffusers' expressions is quadratic in a text's length, and cubic in a number's. IF uses 77 tokens:
# characters after this length are used only if nearly all characters before are removed.
MAX_CLEANED = 2000
LONG_NUMBER = re.compile(r"[\d.]{200}")


def clean_captions(texts: list[str]) -> list[str]:
    """Clean texts as diffusers' `IFPipeline` does with `clean_caption=True`, by calling its method.

    This needs the packages beautifulsoup4 and ftfy. Without them, texts are lower-cased and stripped, as in
    `IFPipeline`; so is a text whose markup beautifulsoup4 rejects, which raises an error there, or with a number of
    200 digits, which takes minutes there. Only the first 2000 characters of a text are used.
    """
    if not (is_bs4_available() and is_ftfy_available()):
        warn_of_missing_packages()
        return [plain_caption(text) for text in texts]
    with warnings.catch_warnings():  # bs4 warns about texts that look like file names or addresses
        warnings.simplefilter("ignore")
        return [clean_caption(text) for text in texts]


def clean_caption(text: str) -> str:
    """Clean a single text."""
    text = text[:MAX_CLEANED]
    if LONG_NUMBER.search(text):
        return plain_caption(text)
    try:
        return cleaner()._text_preprocessing([text], clean_caption=True)[0]
    except Exception:  # of several types, for markup such as "<!["
        return plain_caption(text)


@functools.cache
def cleaner() -> Any:
    """Return diffusers' `IFPipeline` without components, for its method."""
    with quiet_transformers():  # its import reports that torchvision is not installed
        from diffusers import IFPipeline
    return object.__new__(IFPipeline)


def plain_caption(text: str) -> str:
    """Lower-case and strip a text, without optional packages."""
    return text.lower().strip()


@functools.cache
def warn_of_missing_packages() -> None:
    """Warn once that texts are not cleaned as in training."""
    logger.warning(
        "Texts are only lower-cased and stripped, because beautifulsoup4 or ftfy is not installed; "
        "`pip install diffusers-imagen[deepfloyd]` to clean them as in DeepFloyd IF's training."
    )
