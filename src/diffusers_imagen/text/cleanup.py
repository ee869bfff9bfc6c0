"""Texts as DeepFloyd IF's networks were trained on: without markup, addresses, file names and other refuse of the web."""

import functools
import re
import warnings

from diffusers import IFPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available, logging


logger = logging.get_logger(__name__)

CLEANER = object.__new__(IFPipeline)  # without components, for its method

# The time of diffusers' expressions grows with the square of a text's length, and with the third power of a number's. IF
# reads 77 tokens: what is beyond this length is read only where nearly all that comes before it is removed.
MAX_CLEANED = 2000
LONG_NUMBER = re.compile(r"[\d.]{200}")


def clean_captions(texts: list[str]) -> list[str]:
    """Texts as diffusers' `IFPipeline` encodes them with `clean_caption=True`; its own method does the work.

    That needs the packages beautifulsoup4 and ftfy. Without them, texts are in lower case and stripped, as in
    `IFPipeline`; so is a text whose markup beautifulsoup4 rejects, which is an error there, or with a number of 200 digits,
    which takes minutes there. The first 2000 characters of a text are cleaned, the rest is dropped.
    """
    if not (is_bs4_available() and is_ftfy_available()):
        warn_of_missing_packages()
        return [plain_caption(text) for text in texts]
    with warnings.catch_warnings():  # of bs4, about texts that look like a file's name or an address
        warnings.simplefilter("ignore")
        return [clean_caption(text) for text in texts]


def clean_caption(text: str) -> str:
    """Return a single text, cleaned."""
    text = text[:MAX_CLEANED]
    if LONG_NUMBER.search(text):
        return plain_caption(text)
    try:
        return CLEANER._text_preprocessing([text], clean_caption=True)[0]
    except Exception:  # of several kinds, for markup such as "<!["
        return plain_caption(text)


def plain_caption(text: str) -> str:
    """Return the form of a text that needs no packages."""
    return text.lower().strip()


@functools.cache
def warn_of_missing_packages() -> None:
    """Say once that texts are not quite those of training."""
    logger.warning(
        "Texts are only put in lower case and stripped, because beautifulsoup4 or ftfy is not installed; "
        "`pip install diffusers-imagen[deepfloyd]` cleans them as DeepFloyd IF was trained."
    )
