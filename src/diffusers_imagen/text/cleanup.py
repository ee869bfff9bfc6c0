"""Texts as DeepFloyd IF's networks were trained on: without markup, addresses, file names and other refuse of the web."""

import functools
import warnings

from diffusers.utils import is_bs4_available, is_ftfy_available, logging


logger = logging.get_logger(__name__)

# diffusers' expressions take time that grows with the third power of a text's length, at worst: seconds for this one.
# IF reads 77 tokens, so that what is beyond is read only where nearly all that comes before it is removed.
MAX_CLEANED = 2000


def clean_captions(texts: list[str]) -> list[str]:
    """Texts as diffusers' `IFPipeline` encodes them with `clean_caption=True`; its own method does the work.

    That needs the packages beautifulsoup4 and ftfy. Without them, texts are in lower case and stripped, as in
    `IFPipeline`; so is a text whose markup beautifulsoup4 rejects, which is an error there. The first 2000 characters of
    a text are cleaned, the rest is dropped.
    """
    if not (is_bs4_available() and is_ftfy_available()):
        warn_of_missing_packages()
        return [plain_caption(text) for text in texts]
    with warnings.catch_warnings():  # of bs4, about texts that look like a file's name or an address
        warnings.simplefilter("ignore")
        return [clean_caption(text) for text in texts]


def clean_caption(text: str) -> str:
    """A single text, cleaned."""
    text = text[:MAX_CLEANED]
    try:
        return preprocessor()([text], clean_caption=True)[0]
    except Exception:  # of several kinds, for markup such as "<!["
        return plain_caption(text)


def plain_caption(text: str) -> str:
    """The form of a text that needs no packages."""
    return text.lower().strip()


@functools.cache
def preprocessor():
    """The method of diffusers that cleans texts, of a pipeline without components."""
    from diffusers import IFPipeline  # here, because it takes a while to import

    return object.__new__(IFPipeline)._text_preprocessing


@functools.cache
def warn_of_missing_packages() -> None:
    """Says once that texts are not quite those of training."""
    logger.warning(
        "Texts are only put in lower case and stripped, because beautifulsoup4 or ftfy is not installed; "
        "`pip install diffusers-imagen[deepfloyd]` cleans them as DeepFloyd IF was trained."
    )
