"""What a model of transformers has to be before it is used, loaded by whom and from wherever."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging


UNUSED = "pooler"  # of encoders; the states that condition the networks are those before it


def refuse_missing_weights(what: str, info: dict[str, Any]) -> None:
    """Refuses a model of which weights were missing where it was loaded: transformers fills them with random ones.

    Args:
        what (`str`): The argument and its value, which begin the message: "`text_encoder` is 'a'".
        info (`dict`): What `from_pretrained(..., output_loading_info=True)` says.

    Raises:
        ValueError: If weights that the states depend on are missing, or have other shapes.
    """
    missing = sorted(name for name in info["missing_keys"] if UNUSED not in name.split("."))
    missing += sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{what}, whose text encoder lacks {len(missing)} weights, {missing[0]} among them: it is not complete, or "
            "of another kind than its config.json says."
        )


def refuse_broken_weights(what: str, model: PreTrainedModel) -> None:
    """Refuses a model with weights that are not finite.

    Args: as `refuse_missing_weights`.

    Raises:
        ValueError: If there are such weights; names one.
    """
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ValueError(f"{what}, whose text encoder has weights that are not finite, {broken[0]} among them.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports and progress bars of loading: what is missing is refused in one line."""
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
